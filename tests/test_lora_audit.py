"""The LoRA audit: runs that are right pass it, and every planted fault stops with a sentence naming the layers."""

import json
import logging
import random

import pytest
import timm
import torch
from torch import nn

from eomt.fingerprints import fingerprint
from eomt.lora.audit import AuditError, LoRAAudit
from eomt.lora.methods import update_norms
from lora_config import LoRASettings, adapted_layers, apply_lora

torch.set_num_threads(1)


class Network(nn.Module):
    """A backbone to adapt and a head that trains, as small as they come."""

    def __init__(self, backbone="vit_tiny_patch16_224", **kwargs):
        super().__init__()
        torch.manual_seed(0)
        sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
        self.backbone = timm.create_model(backbone, **sizes | kwargs)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SETTINGS = LoRASettings(rank=4)


def adapt(network, settings=SETTINGS):
    return apply_lora(network.backbone, settings)


def optimiser(network, lr=1e-2):
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr, weight_decay=0)


def audit_of(network, settings=SETTINGS, **kwargs):
    return LoRAAudit(network, network.backbone, settings, **kwargs)


def begin(network, audit, optimizer, **kwargs):
    audit.before_training(optimizer, lambda: network(IMAGE), **kwargs)


def train(network, audit, optimizer, steps=5, first=1, each_step=lambda step: None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        network(IMAGE).square().mean().backward()
        audit.after_backward()
        optimizer.step()
        audit.after_step(step)
        each_step(step)


# Runs that are right


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"rank_pattern": {"attn.proj": 2}, "alpha_pattern": {"attn.proj": 8}},
    ],
    ids=str,
)
def test_a_right_run_passes_every_check(options):
    network, settings = Network(), LoRASettings(rank=4, options=options)
    adapt(network, settings)
    audit, optimizer = audit_of(network, settings), optimiser(network)
    begin(network, audit, optimizer)
    train(network, audit, optimizer)
    audit.at_end()
    assert audit.complete
    assert len(audit.results) == 10 and all(result["passed"] for result in audit.results.values())
    json.dumps(audit.results)


def test_the_fused_backbone_passes_once_its_attention_calls_the_layer():
    network = Network("vit_small_patch16_dinov3_qkvb")
    for block in network.backbone.blocks:
        block.attn.qkv_bias_separate = True
    adapt(network)
    begin(network, audit_of(network), optimiser(network))


def test_any_module_can_be_audited():
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    settings = LoRASettings(rank=2, target_modules=["0", "2"])
    apply_lora(module, settings)
    audit = LoRAAudit(module, module, settings)
    audit.before_training(optimiser(module), lambda: [module(torch.ones(1, 6))])


def test_the_audit_leaves_gradients_modes_and_random_state_alone():
    network = Network(drop_path_rate=0.5)
    adapt(network)
    network.train()
    network.backbone.norm.eval()
    modes = [module.training for module in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    state, python_state = torch.get_rng_state(), random.getstate()
    noisy = lambda: network(IMAGE + torch.rand_like(IMAGE))  # noqa: E731, the same noise with and without adapters
    audit_of(network).before_training(optimiser(network), noisy)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert [module.training for module in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(p.grad is None for p in network.parameters())


def test_a_head_that_starts_at_zero_is_no_bypass():
    network = Network()
    nn.init.zeros_(network.head.weight)
    adapt(network)
    audit, optimizer = audit_of(network), optimiser(network)
    begin(network, audit, optimizer)
    assert "still multiplies by zero" in audit.results["adapters_change_output"]["detail"]
    train(network, audit, optimizer)
    assert audit.complete


def test_a_warm_up_from_zero_is_waited_for():
    network = Network()
    adapt(network)
    audit, optimizer = audit_of(network), optimiser(network, lr=0)
    begin(network, audit, optimizer)

    def warm_up(step):
        optimizer.param_groups[0]["lr"] = 1e-5 * step

    train(network, audit, optimizer, steps=2, each_step=warm_up)
    assert not audit.complete
    train(network, audit, optimizer, steps=3, first=3, each_step=warm_up)
    assert audit.complete


def test_steps_skipped_for_infinite_gradients_do_not_count_as_gradients():
    network = Network()
    adapt(network)
    audit = audit_of(network)
    for p in network.parameters():
        p.grad = torch.full_like(p, float("inf")) if p.requires_grad else None
    audit.after_backward()
    for step in range(19):
        audit.after_step(step)
    with pytest.raises(AuditError, match="no non-zero gradient after 20 optimiser steps"):
        audit.after_step(19)


def test_a_resumed_run_may_start_from_trained_adapters_at_any_step():
    network = Network()
    adapt(network)
    train(network, audit_of(network), optimiser(network))
    audit, optimizer = audit_of(network), optimiser(network)
    begin(network, audit, optimizer, resumed=True)
    train(network, audit, optimizer, first=5000)
    audit.at_end()
    assert audit.complete


def test_a_run_of_one_step_is_reported_as_too_short(caplog):
    network = Network()
    adapt(network)
    audit, optimizer = audit_of(network), optimiser(network)
    begin(network, audit, optimizer)
    train(network, audit, optimizer, steps=1)
    with caplog.at_level(logging.WARNING):
        audit.at_end()
    assert not audit.results["adapters_trained"]["passed"] and "too few" in caplog.text


# Planted faults before training


def test_a_target_that_matches_nothing():
    network = Network()
    adapt(network)
    with pytest.raises(AuditError, match="'querry' matches no linear layer"):
        begin(network, audit_of(network, LoRASettings(target_modules="querry")), optimiser(network))


def test_a_requested_layer_without_adapter():
    network = Network()
    adapt(network)
    wanted = LoRASettings(target_modules=["qkv", "proj", "fc1"])
    with pytest.raises(AuditError, match=r"carry no adapter: blocks\.0\.mlp\.fc1"):
        begin(network, audit_of(network, wanted), optimiser(network))


def test_an_adapter_nobody_asked_for():
    network = Network()
    adapt(network)
    with pytest.raises(AuditError, match=r"not requested: blocks\.0\.attn\.proj"):
        begin(network, audit_of(network, LoRASettings(target_modules=["qkv"])), optimiser(network))


def test_frozen_adapters():
    network = Network()
    adapt(network)
    network.backbone.requires_grad_(False)
    with pytest.raises(AuditError, match=r"adapters are frozen: backbone\.blocks\.0\.attn\.qkv\.lora_A"):
        begin(network, audit_of(network), optimiser(network))


def test_an_unfrozen_base_weight():
    network = Network()
    adapt(network)
    network.backbone.blocks[0].attn.qkv.base_layer.weight.requires_grad_(True)
    with pytest.raises(AuditError, match=r"meant to be frozen, but trainable: backbone\.blocks\.0\.attn\.qkv\.weight"):
        begin(network, audit_of(network), optimiser(network))


def test_a_head_meant_to_be_frozen_but_trainable_and_the_reverse():
    network = Network()
    adapt(network)
    with pytest.raises(AuditError, match=r"meant to be frozen, but trainable: head\.weight, head\.bias"):
        begin(network, audit_of(network, trainable_elsewhere=[]), optimiser(network))
    network.head.bias.requires_grad_(False)
    with pytest.raises(AuditError, match=r"meant to train, but frozen: head\.bias"):
        begin(network, audit_of(network, trainable_elsewhere=list(network.head.parameters())), optimiser(network))


def test_base_weights_that_are_meant_to_train_may():
    network = Network()
    loaded = fingerprint(network.backbone)
    adapt(network)
    norm = list(network.backbone.norm.requires_grad_(True).parameters())
    norm[0].data += 0.1  # as in a resumed run
    audit = audit_of(network, trainable_elsewhere=[*network.head.parameters(), *norm], base_fingerprint=loaded)
    optimizer = optimiser(network)
    begin(network, audit, optimizer)
    train(network, audit, optimizer)
    audit.at_end()


def test_an_optimiser_built_too_early():
    network = Network()
    optimizer = optimiser(network)
    adapt(network)
    with pytest.raises(
        AuditError, match=r"not in the optimiser: backbone\.blocks\.0.*before the adapters were applied"
    ):
        begin(network, audit_of(network), optimizer)


def test_a_head_missing_from_the_optimiser():
    network = Network()
    adapt(network)
    optimizer = torch.optim.AdamW([p for p in network.backbone.parameters() if p.requires_grad])
    with pytest.raises(AuditError, match=r"not in the optimiser: head\.weight, head\.bias; add them"):
        begin(network, audit_of(network), optimizer)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_twice_in_the_optimiser():
    network = Network()
    adapt(network)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad] + [network.head.bias])
    with pytest.raises(AuditError, match=r"more than once: head\.bias"):
        begin(network, audit_of(network), optimizer)


def test_weights_loaded_after_adaptation():
    network, pretrained = Network(), Network()
    for p in pretrained.parameters():
        p.data += 0.1
    adapt(network)
    network.load_state_dict(pretrained.state_dict(), strict=False)  # all but the adapted layers take them
    with pytest.raises(AuditError, match=r"changed after the adapters were applied: .*blocks\.0\.norm1\.weight"):
        begin(network, audit_of(network), optimiser(network))


def test_weights_that_are_not_the_ones_that_were_loaded():
    network = Network()
    loaded = fingerprint(network.backbone)
    nn.init.zeros_(network.backbone.cls_token)
    adapt(network)
    with pytest.raises(AuditError, match="not the ones that were loaded"):
        begin(network, audit_of(network, base_fingerprint=loaded), optimiser(network))


def test_a_bypassing_layer():
    network = Network("vit_small_patch16_dinov3_qkvb")  # its attention reads qkv.weight
    adapt(network)
    assert not network.backbone.blocks[0].attn.qkv_bias_separate
    audit = audit_of(network)
    with pytest.raises(
        AuditError, match=r"adapters of blocks\.0\.attn\.qkv, blocks\.1\.attn\.qkv: .*qkv_bias_separate"
    ):
        begin(network, audit, optimiser(network))
    assert audit.results["adapters_change_output"]["passed"] is False


def test_outputs_without_gradient():
    network = Network()
    adapt(network)
    with pytest.raises(AuditError, match="does not depend on the adapters of"):
        audit_of(network).before_training(optimiser(network), lambda: network(IMAGE).detach())


def test_outputs_that_are_not_finite():
    network = Network()
    adapt(network)
    outputs = iter([1, float("nan")])
    with pytest.raises(AuditError, match="change the output before training"):
        audit_of(network).before_training(optimiser(network), lambda: [network(IMAGE), network(IMAGE) * next(outputs)])


def test_adapters_that_change_the_output_at_the_start():
    network = Network()
    adapt(network)
    nn.init.normal_(adapted_layers(network.backbone)["blocks.1.attn.proj"].lora_B["default"].weight)
    with pytest.raises(AuditError, match=r"change the output before training.*update: blocks\.1\.attn\.proj"):
        begin(network, audit_of(network), optimiser(network))


# Planted faults during training


def test_adapters_without_learning_rate():
    network = Network()
    adapt(network)
    audit, optimizer = audit_of(network), optimiser(network, lr=0)
    begin(network, audit, optimizer)
    with pytest.raises(AuditError, match=r"after 20 optimiser steps in backbone\.blocks\.0\.attn\.qkv\.lora_A"):
        train(network, audit, optimizer, steps=30)


def test_orthogonal_adapters_without_learning_rate():
    network, settings = Network(), LoRASettings(rank=4, options={"init_lora_weights": "orthogonal"})
    adapt(network, settings)
    audit, optimizer = audit_of(network, settings), optimiser(network, lr=0)
    begin(network, audit, optimizer)
    assert max(update_norms(network.backbone).values()) > 0  # rounding, which is no update
    with pytest.raises(AuditError, match=r"B A is still zero after 20 optimiser steps in blocks\.0\.attn\.qkv"):
        train(network, audit, optimizer, steps=30)


def test_one_adapter_the_loss_does_not_reach():
    network = Network()
    adapt(network)
    audit, optimizer = audit_of(network), optimiser(network)
    begin(network, audit, optimizer)
    layer = adapted_layers(network.backbone)["blocks.1.attn.qkv"]
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(AuditError, match=r"no non-zero gradient .* backbone\.blocks\.1\.attn\.qkv\.lora_A"):
        train(network, audit, optimizer, steps=20)


def test_a_short_run_with_untrained_adapters_fails_at_the_end():
    network = Network()
    adapt(network)
    audit, optimizer = audit_of(network), optimiser(network, lr=0)
    begin(network, audit, optimizer)
    train(network, audit, optimizer, steps=5)
    with pytest.raises(AuditError, match="after 5 optimiser steps"):
        audit.at_end()


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.base_layer.weight", "pos_embed"])
def test_a_frozen_weight_changed_during_training(name):
    network = Network()
    adapt(network)
    audit, optimizer = audit_of(network), optimiser(network)
    begin(network, audit, optimizer)
    train(network, audit, optimizer)
    network.backbone.get_parameter(name).data.view(-1)[0] += 1e-6
    with pytest.raises(AuditError, match=f"changed during training: backbone.{name.replace('.base_layer', '')};"):
        audit.at_end()
    assert audit.results["frozen_unchanged"]["passed"] is False


def test_running_statistics_of_the_base_must_not_move():
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    settings = LoRASettings(rank=2, target_modules=["0", "2"])
    apply_lora(base, settings)
    audit, optimizer, x = LoRAAudit(base, base, settings), optimiser(base), torch.rand(8, 6)
    audit.before_training(optimizer, lambda: base(x))
    base.train()(x)
    with pytest.raises(AuditError, match=r"changed during training: 1\.running_mean"):
        audit.at_end()
