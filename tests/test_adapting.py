"""What trains in a pretrained part: `adapt`, what it says and returns, its files, and its base under other names."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from eomt.lora.adapting import adapt, load_adapted
from eomt.lora.audit import AuditError, LoRAAudit
from eomt.lora.files import load_adapter
from eomt.lora.groups import parameter_groups
from eomt.lora.report import subtotals, trainable_report
from lora_config import PRESETS, LoRASettings, adapted_layers, apply_lora, preset_for

ROOT = Path(__file__).parent.parent
SETTINGS = LoRASettings(rank=2, target_modules=["query", "value"])


class Attention(nn.Module):
    def __init__(self, names=("q_proj", "v_proj")):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        query, value = self.children()
        return torch.tanh(query(x)) * value(x)


class Encoder(nn.Module):
    """An embedding and blocks, as small as they come."""

    def __init__(self, names=("q_proj", "v_proj"), depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(names)}) for _ in range(depth))
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["attn"](x)
        return self.norm(x)


class Tied(nn.Module):
    """An encoder whose embedding is also the weight of the head."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(4, 6, bias=False)
        self.head.weight = self.encoder.embed.weight

    def forward(self, tokens):
        return self.head(self.encoder(tokens))


TOKENS = torch.tensor([[0, 1, 2, 3]])


def trained(module):
    return sorted(name for name, p in module.named_parameters() if p.requires_grad)


def optimiser(network):
    return torch.optim.AdamW(parameter_groups(network, lr=1e-2))


def begin(network, forward=None, **kwargs):
    audit = LoRAAudit(network, **kwargs)
    audit.before_training(optimiser(network), forward or (lambda: network(TOKENS)))
    return audit


def train(network, audit, loss, steps=20):
    optimizer = optimiser(network)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss().backward()
        audit.after_backward()
        optimizer.step()
        audit.after_step(step)


def randomise(part):
    for layer in adapted_layers(part).values():
        nn.init.normal_(layer.lora_B["default"].weight)


# The order: LoRA, else the last blocks, else frozen


def test_without_anything_the_part_is_frozen():
    assert trained(adapt(Encoder()).module) == []


def test_the_last_blocks_train_in_full_and_what_is_named_besides():
    encoder = Encoder()
    part = adapt(encoder, unfreeze_last_n=1, also=[encoder.norm, encoder.embed.weight])
    assert trained(encoder) == [
        "embed.weight",
        "layers.1.attn.q_proj.bias",
        "layers.1.attn.q_proj.weight",
        "layers.1.attn.v_proj.bias",
        "layers.1.attn.v_proj.weight",
        "norm.bias",
        "norm.weight",
    ]
    assert {id(p) for p in part.parameters()} == {id(p) for p in encoder.parameters() if p.requires_grad}


def test_lora_takes_the_place_of_unfreezing_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        part = adapt(Encoder(), SETTINGS, unfreeze_last_n=1)
    assert all("lora_" in name for name in trained(part.module))
    assert "LoRA takes its place, no block is unfrozen" in caplog.text
    assert part.summary in caplog.text and part.summary == "Trainable: 64 (36.36%) | Total: 176"


def test_more_blocks_than_there_are_and_several_stacks_are_refused():
    for count in (3, -1, 1.5):
        with pytest.raises(ValueError, match=rf"unfreeze_last_n {count}: the backbone has 2 blocks; .* from 0 to 2"):
            adapt(Encoder(), unfreeze_last_n=count)
    with pytest.raises(ValueError, match=r"2 stacks, a.layers \(2 blocks\), b.layers \(2 blocks\); adapt each"):
        adapt(nn.ModuleDict({"a": Encoder(), "b": Encoder()}), unfreeze_last_n=1)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"lora": LoRASettings(target_modules=["quary"])}, ValueError),
        ({"lora": LoRASettings(rank=2, target_modules=["query"], options={"rank_pattern": {"x": 1}})}, ValueError),
        ({"unfreeze_last_n": 9}, ValueError),
        ({"also": ["norm"]}, TypeError),
    ],
)
def test_what_fails_leaves_the_part_as_it_was(kwargs, error):
    encoder = Encoder()
    encoder.norm.requires_grad_(False)
    before = trained(encoder)
    with pytest.raises(error):
        adapt(encoder, **kwargs)
    assert trained(encoder) == before


def test_an_adapter_of_another_base_leaves_the_part_as_it_was(saved):
    encoder = Encoder()
    encoder.norm.weight.data += 1
    before = trained(encoder)
    with pytest.raises(ValueError, match="trained on other base weights"):
        load_adapted(encoder, saved[1])
    assert trained(encoder) == before and encoder.training


def test_arguments_that_are_none_are_named_and_one_module_is_enough(caplog):
    with pytest.raises(TypeError, match=r"lora is \{'rank': 4\}: give LoRASettings"):
        adapt(Encoder(), {"rank": 4})
    with pytest.raises(ValueError, match="unfreeze_last_n True"):
        adapt(Encoder(), None, True)
    with pytest.raises(TypeError, match="also holds 'norm'"):
        adapt(Encoder(), SETTINGS, also="norm")
    encoder = Encoder()
    adapt(encoder, SETTINGS, also=encoder.norm)
    assert encoder.norm.weight.requires_grad and not encoder.embed.weight.requires_grad
    caplog.clear()
    adapt(Encoder(), SETTINGS, expect_untrained=True)
    assert "untrained" not in caplog.text


def test_a_part_that_was_never_trained_and_is_frozen_is_told(caplog):
    adapt(Encoder(), SETTINGS)
    assert "Encoder looks untrained" in caplog.text and "load its weights before" in caplog.text
    caplog.clear()
    known = Encoder()
    known.norm.bias.data += 0.1
    adapt(known, SETTINGS)
    assert "untrained" not in caplog.text


def test_it_says_what_it_did_also_where_no_log_is_set_up():
    code = """
import torch
from eomt.lora.adapting import adapt
adapt(torch.nn.Linear(2, 2))
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stderr.endswith("Linear: Trainable: 0 (0.00%) | Total: 6\n") and said.stdout == ""


def test_a_part_is_adapted_only_once():
    part = adapt(Encoder(), SETTINGS)
    with pytest.raises(ValueError, match="already carries LoRA adapters"):
        adapt(part.module)
    assert trained(part.module)


def test_what_it_returns_can_be_an_attribute_without_doubling_the_state_dict():
    network = Tied()
    keys = len(network.state_dict())
    network.lora = adapt(network.encoder, SETTINGS)
    assert len(network.state_dict()) == keys + 8


def test_peft_s_handle_as_a_submodule_is_an_error():
    network = Tied()
    network.handle = apply_lora(network.encoder, SETTINGS)
    with pytest.raises(AuditError, match=r"stand in the state dict twice, as handle\.base_model.*out of registered"):
        begin(network)


# Tied parameters


def test_a_tied_head_that_is_frozen_with_the_encoder_is_named_once(caplog):
    network = Tied()
    with caplog.at_level(logging.WARNING):
        adapt(network.encoder, SETTINGS, network=network)
    assert "embed.weight of the adapted part is tied to head.weight, which is frozen, too" in caplog.text
    caplog.clear()
    audit = begin(network)
    assert "head.weight is tied to encoder.embed.weight, which is frozen; give that module to `adapt`" in caplog.text
    network.head.weight.data += 1
    audit._steps = 3
    audit.complete = True
    with pytest.raises(AuditError, match=r"during training: encoder\.embed\.weight;"):
        audit.at_end()


def test_a_tied_head_trains_where_it_is_meant_to():
    network = Tied()
    adapt(network.encoder, SETTINGS, also=[network.head], network=network)
    audit = begin(network)
    train(network, audit, lambda: network(TOKENS).square().mean())
    audit.at_end()
    assert audit.complete


def test_a_tied_head_that_was_unfrozen_by_hand_is_told_how():
    network = Tied()
    adapt(network.encoder, SETTINGS)
    network.head.weight.requires_grad_(True)
    with pytest.raises(
        AuditError, match=r"head\.weight is tied to encoder\.embed\.weight: give that module to `adapt`"
    ):
        begin(network)
    head_first = nn.ModuleDict({"head": network.head, "encoder": network.encoder})
    with pytest.raises(AuditError, match=r"trainable: head\.weight; head\.weight is tied to encoder\.embed\.weight"):
        begin(head_first, lambda: network(TOKENS))


# The audit


class Output(dict):
    """As ModelOutput: a mapping that hands out its keys."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: Output(logits=y, text="no", hidden=(y, None)),
        lambda y: {"a": {"b": [y]}, "step": 3},
        lambda y: (y, 2.5, "name", b"x", None, object()),
    ],
)
def test_the_probe_may_return_any_nesting(wrap):
    network = Tied()
    adapt(network.encoder, SETTINGS)
    begin(network, lambda: wrap(network(TOKENS)))


def test_two_adapted_parts_pass_one_audit_and_a_fault_names_its_part():
    network = nn.ModuleDict({"a": Encoder(), "b": Encoder()})
    for part, rank in (("a", 1), ("b", 2)):
        adapt(network[part], LoRASettings(rank=rank, target_modules=["query"]))
    forward = lambda: [network["a"](TOKENS), network["b"](TOKENS)]  # noqa: E731
    audit = begin(network, forward)
    train(network, audit, lambda: sum(y.square().sum() for y in forward()))
    audit.at_end()
    assert audit.complete and all(result["passed"] for result in audit.results.values())
    with pytest.raises(AuditError, match=r"does not depend on the adapters of b\.layers\.0"):
        begin(network, lambda: network["a"](TOKENS), trainable_elsewhere=[])


def test_frozen_tensors_are_hashed_once_for_several_adapted_parts(monkeypatch):
    from eomt.lora import audit

    network = nn.ModuleDict({"a": Encoder(), "b": Encoder(), "head": nn.Linear(4, 2)})
    network["b"].embed = network["a"].embed
    for part in ("a", "b"):
        adapt(network[part], SETTINGS)
    hashed = []

    def counted(tensors):
        hashed.extend(id(tensor) for tensor in tensors.values())
        return hash_tensors(tensors)

    hash_tensors = audit.hash_tensors
    monkeypatch.setattr(audit, "hash_tensors", counted)
    begin(network, lambda: network["head"](network["a"](TOKENS) + network["b"](TOKENS)))
    frozen = {id(p) for p in network.parameters() if not p.requires_grad}
    assert frozen <= {*hashed} and len(hashed) == len({*hashed})


def test_naming_one_adapted_part_does_not_ask_to_freeze_the_other():
    network = nn.ModuleDict({"a": Encoder(), "b": Encoder(), "head": nn.Linear(4, 2)})
    adapt(network["a"], SETTINGS)
    adapt(network["b"], LoRASettings(rank=1, target_modules=["query"]))
    forward = lambda: network["head"](network["a"](TOKENS) + network["b"](TOKENS))  # noqa: E731
    heads = list(network["head"].parameters())
    audit = begin(network, forward, adapted=network["a"], settings=SETTINGS, trainable_elsewhere=heads)
    assert audit.results["targets_found"]["detail"] == "6 layers adapted"


def test_layers_that_were_adapted_by_hand_are_not_passed_over():
    import peft

    network = Tied()
    peft.get_peft_model(network.encoder, peft.LoraConfig(r=1, target_modules=["q_proj"]))
    with pytest.raises(AuditError, match=r"encoder\.layers\.0\.attn\.q_proj.* without `adapt`"):
        LoRAAudit(network)


def test_a_conversion_to_bfloat16_names_the_setting():
    network = Tied()
    adapt(network.encoder, SETTINGS)
    with pytest.raises(AuditError, match=r"base_as_loaded: .*bf16-true does; set trainer.precision=bf16-mixed"):
        begin(network.bfloat16())


def test_reentrant_checkpointing_is_not_blamed_on_the_learning_rate():
    from torch.utils.checkpoint import checkpoint

    network = Tied()
    adapt(network.encoder, SETTINGS)
    network.head.weight = nn.Parameter(network.head.weight.detach().clone())
    with pytest.warns(UserWarning), pytest.raises(AuditError, match=r"use_reentrant=False, or leave"):
        begin(network, lambda: network.head(checkpoint(network.encoder, TOKENS, use_reentrant=True)))
    first, second = (layer["attn"] for layer in network.encoder.layers)
    with pytest.raises(AuditError, match="re-entrant activation checkpointing cuts adapters off"):
        begin(network, lambda: network.head(checkpoint(second, first(torch.rand(1, 4)), use_reentrant=True)))
    audit = begin(network)
    loss = lambda: network.head(checkpoint(network.encoder, TOKENS, use_reentrant=True)).sum()  # noqa: E731
    with pytest.warns(UserWarning), pytest.raises(AuditError, match=r"checkpointing .* use_reentrant=False") as error:
        train(network, audit, loss)
    assert "learning rate" not in str(error.value)


def test_the_layers_of_torch_s_transformer_are_called_in_eval_mode_too():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    adapt(encoder, LoRASettings(rank=1, target_modules=["mlp"]))
    x = torch.rand(1, 3, 4)
    begin(encoder, lambda: encoder(x))
    randomise(encoder)
    encoder.eval()
    with torch.no_grad():
        inference = encoder(x)
    encoder.train()
    for part in encoder.modules():
        part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
    encoder.layers[0].self_attn.dropout = encoder.layers[1].self_attn.dropout = 0.0
    assert torch.allclose(inference, encoder(x), atol=1e-5)


def test_gpt2_s_transposed_layers_are_adapted_saved_and_merged(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D

    def network():
        torch.manual_seed(0)
        return nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": conv1d(12, 4), "c_proj": conv1d(4, 4)})})

    def run(module):
        return module["attn"]["c_attn"](torch.ones(1, 4))

    module = network()
    part = adapt(module, LoRASettings(rank=2, target_modules=["query", "out"]))
    randomise(module)
    expected = run(module.eval())
    part.save(tmp_path)
    again = network()
    load_adapted(again, tmp_path)
    assert torch.equal(run(again), expected)
    assert torch.allclose(run(part.merge()), expected, atol=1e-6) and not adapted_layers(module)


# Files


@pytest.fixture
def saved(tmp_path):
    part = adapt(Encoder(), SETTINGS)
    randomise(part.module)
    part.save(tmp_path / "adapter")
    return part.module.eval()(TOKENS), tmp_path / "adapter"


def test_an_adapter_carries_its_settings(saved):
    part = load_adapted(Encoder(), saved[1])
    assert (part.settings.rank, part.settings.alpha, part.settings.dropout) == (2, 32, 0.05)
    assert torch.equal(part.module(TOKENS), saved[0]) and part.parameters() == []
    again = LoRASettings.from_adapter(saved[1], rank=2, alpha=None)
    assert again.target_modules == tuple(sorted(adapted_layers(part.module)))


@pytest.mark.parametrize(("flag", "own"), [({"rank": 8}, 2), ({"alpha": 16}, 32), ({"dropout": 0.1}, 0.05)])
def test_a_contradicting_flag_is_an_error_with_both_values(saved, flag, own):
    (name, value), *_ = flag.items()
    with pytest.raises(ValueError, match=rf"LoRA {name} {value}: the adapter in .* was trained with {own}; leave"):
        LoRASettings.from_adapter(saved[1], **flag)


@pytest.mark.parametrize("content", ["[1]", "{", '{"peft_type": "IA3"}', '{"peft_type": "LORA", "r": 2}'])
def test_a_damaged_record_of_settings_is_one_sentence(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        LoRASettings.from_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="does not say what a LoRA was trained with"):
        LoRASettings.from_adapter(tmp_path)


def test_a_compiled_network_is_the_same_base(saved):
    network = nn.ModuleDict({"encoder": Encoder()})
    load_adapted(torch.compile(network["encoder"]), saved[1])
    assert torch.equal(network["encoder"](TOKENS), saved[0])
    blocks = Encoder()
    for layer in blocks.layers:
        layer["attn"] = torch.compile(layer["attn"], backend="eager")
    load_adapter(blocks, saved[1])
    assert torch.equal(blocks(TOKENS), saved[0])


def test_an_adapter_of_a_compiled_network_fits_the_plain_one(tmp_path):
    compiled = Encoder()
    for layer in compiled.layers:
        layer["attn"] = torch.compile(layer["attn"], backend="eager")
    part = adapt(compiled, SETTINGS)
    randomise(compiled)
    part.save(tmp_path)
    plain = Encoder()
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(TOKENS), compiled.eval()(TOKENS))
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()


def test_the_same_weights_under_another_version_s_names_are_the_same_base(saved):
    renamed = Encoder(("query", "value"))
    load_adapted(renamed, saved[1])
    assert torch.equal(renamed(TOKENS), saved[0])
    assert sorted(adapted_layers(renamed))[0] == "layers.0.attn.query"


@pytest.mark.parametrize("change", ["value", "order"])
def test_other_weights_are_refused_whatever_their_names(saved, change):
    other = Encoder(("query", "value") if change == "value" else ("q_proj", "v_proj"))
    if change == "value":
        other.norm.weight.data += 1
    else:
        other.layers[0], other.layers[1] = other.layers[1], other.layers[0]
    with pytest.raises(ValueError, match="trained on other base weights"):
        load_adapted(other, saved[1])


def test_several_adapters_of_one_part_are_added_and_used(saved):
    part = load_adapted(Encoder(), saved[1])
    part.add(saved[1], "night")
    part.use("base")
    assert torch.equal(part.module(TOKENS), Encoder()(TOKENS))
    part.use("night")
    assert torch.equal(part.module(TOKENS), saved[0])


def test_a_loaded_adapter_trains_on_under_the_audit(saved):
    network = Tied()
    network.encoder = Encoder()
    part = load_adapted(network.encoder, saved[1], is_trainable=True)
    audit = begin(network)
    train(network, audit, lambda: network(TOKENS).square().mean(), steps=3)
    assert audit.complete and len(part.parameters()) == 8


def test_a_loaded_adapter_trains_on_with_a_tied_head(saved, caplog):
    network = Tied()
    network.head.weight = network.encoder.embed.weight
    part = load_adapted(network.encoder, saved[1], is_trainable=True, network=network)
    assert "embed.weight of the adapted part is tied to head.weight, which is frozen, too" in caplog.text
    with pytest.raises(ValueError, match="already carries LoRA adapters"):
        load_adapted(network.encoder, saved[1])
    network = Tied()
    part = load_adapted(network.encoder, saved[1], is_trainable=True, also=[network.head], network=network)
    audit = begin(network)
    train(network, audit, lambda: network(TOKENS).square().mean(), steps=3)
    audit.at_end()
    assert audit.complete and network.head.weight.requires_grad and len(part.parameters()) == 9


def test_a_part_without_adapters_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="Encoder has no adapters: give `adapt` LoRASettings"):
        adapt(Encoder()).save(tmp_path)


# Rates, reports, presets


def test_adapters_have_their_own_rate_and_no_weight_decay():
    network = nn.ModuleDict({"encoder": Encoder(), "head": nn.Linear(4, 2)})
    part = adapt(network["encoder"], SETTINGS)
    lora, heads = parameter_groups(network, lr=1e-4, lora_lr=5e-4, weight_decay=0.01)
    assert (lora["lr"], lora["weight_decay"], heads["lr"], heads["weight_decay"]) == (5e-4, 0, 1e-4, 0.01)
    assert len(lora["params"]) == len(part.adapter_parameters()) and len(heads["params"]) == 2


def test_the_report_has_a_subtotal_a_part_and_says_lora_only_where_there_is_one():
    network = nn.ModuleDict({"vision": Encoder(), "text": Encoder(), "head": nn.Linear(4, 2)})
    adapt(network["text"])
    parts = {name: network[name] for name in ("vision", "text", "head")}
    assert trainable_report(network, parts=parts).startswith("TRAINABLE PARAMETERS\n")
    adapt(network["vision"], SETTINGS)
    report = trainable_report(network, parts=parts)
    assert report.startswith("TRAINABLE PARAMETERS (LoRA)\n") and "  vision LoRA: 64\n" in report
    assert subtotals(network, parts) == {"vision LoRA": 64, "vision": 0, "text": 0, "head": 10}


def test_presets_give_settings_for_a_number_of_images():
    assert LoRASettings.for_images(1999) == LoRASettings(4, 32, 0.1, target_modules=("attention",))
    assert LoRASettings.for_images(5001, dropout=0, target_modules="query").dropout == 0
    assert preset_for(2000).lr == 5e-4
    with pytest.raises(ValueError, match=r"images -1: .*at least 0"):
        LoRASettings.for_images(-1)


def test_presets_are_those_of_the_configurations():
    folder = Path(__file__).parent.parent / "configs" / "lora"
    for preset in PRESETS:
        model = yaml.safe_load((folder / f"{preset.name}.yaml").read_text())["model"]
        settings = preset.settings
        assert [model[f"lora_{name}"] for name in ("rank", "alpha", "dropout")] == [
            settings.rank,
            settings.alpha,
            settings.dropout,
        ]
        assert float(model["lora_lr"]) == preset.lr


def test_the_file_of_an_adapter_holds_no_layers_that_it_does_not_adapt(saved):
    content = json.loads((saved[1] / "adapter_config.json").read_text())
    assert content["exclude_modules"] is None and len(content["target_modules"]) == 4
