"""The parts that somebody else may bring: losses, an optimiser, an encoder, a module with more arguments."""

import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, fit
from hydra.utils import instantiate
from torch import nn
from torch.utils.data import DataLoader

from eomt.diagnosis.inspection import inspect_model
from eomt.fingerprints import is_adapter
from eomt.inference.artefacts import merge_adapter
from eomt.lora.audit import AuditError
from eomt.lora.methods import update_norms
from eomt.settings.config_check import check_config
from eomt.training.callbacks import AuditLoRA
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


class AreaLoss:
    """A loss of somebody else's: the last prediction's masks should cover the labelled pixels."""

    def __init__(self, weight=1.0):
        self.weight = weight

    def __call__(self, predictions, labels):
        covered = torch.stack([p.mask_logits().sigmoid().mean() for p in predictions])
        return {"area": self.weight * (covered - (labels != 255).float().mean()).abs()}


class SureOfOutliers:
    """An outlier loss of somebody else's."""

    def __call__(self, prediction, labels):
        return {"outlier": F.softplus(prediction.class_logits).mean()[None]}


class Weighted(MaskClassificationSemantic):
    """A module with one more argument."""

    def __init__(self, *args, my_weight=1.0, **settings):
        super().__init__(*args, **settings)
        self.my_weight = my_weight


class Patches(nn.Module):
    """An encoder without timm."""

    def __init__(self, img_size=(64, 128), patch_size=16, embed_dim=32, depth=3):
        super().__init__()
        self.img_size, self.patch_size, self.embed_dim, self.num_prefix_tokens = (
            tuple(img_size),
            patch_size,
            embed_dim,
            0,
        )
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.patches = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.blocks = nn.ModuleList(Mix(embed_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)

    def embed(self, images):
        return self.patches(images).flatten(2).mT, None


class Mix(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask)[:, 0]
        return x + self.mlp(x)


def node(name, **settings):
    return {"_target_": f"{__name__}.{name}", **settings}


@pytest.fixture
def batches():
    images = torch.randint(0, 255, (4, 3, 64, 128), dtype=torch.uint8)
    labels = torch.randint(0, 3, (4, 64, 128), dtype=torch.uint8)
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=2)


def build(target="MaskClassificationSemantic", **settings):
    """As YAML builds it, after the same check."""
    sys.modules[__name__].MaskClassificationSemantic = MaskClassificationSemantic
    model = node(target, **{**TINY, "num_classes": 3, **settings})
    check_config({"model": model}, any_target=True)
    return instantiate(model, _convert_="all")


def moved(module, batches):
    """Whether training changes what the network says."""
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    fit(module, batches)
    return [name for name, p in module.network.named_parameters() if not torch.equal(p, before[name])]


def test_another_loss_trains(batches):
    module = build(loss=node("AreaLoss", weight=2.0))
    assert isinstance(module.criterion, AreaLoss) and module.criterion.weight == 2.0
    assert moved(module, batches)
    assert set(module.trainer.callback_metrics) >= {"train/area", "train/loss"}
    assert "loss" not in module.hparams, "what is saved stays plain"


def test_another_outlier_loss_trains_beside_the_loss(batches):
    module = build(outlier_loss=node("SureOfOutliers"))
    assert moved(module, batches)
    assert {"train/outlier", "train/mask"} <= set(module.trainer.callback_metrics)
    assert module.hparams.outlier_loss is None


def test_another_optimiser_trains_the_same_groups(batches):
    module = build(optimizer={"_target_": "torch.optim.SGD", "_partial_": True, "momentum": 0.9})
    assert moved(module, batches)
    (optimizer,) = module.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.9
    assert {"heads", "backbone"} == {group["kind"] for group in optimizer.param_groups}


def test_another_encoder_trains_with_and_without_lora(batches):
    names = moved(build(encoder=node("Patches"), warmup_steps=[0, 0]), batches)
    assert any(name.startswith("encoder.blocks.0") for name in names) and "q.weight" in names
    module = build(encoder=node("Patches"), use_lora=True, lora_target_modules=["qkv"], warmup_steps=[0, 0])
    names = [name for name in moved(module, batches) if name.startswith("encoder")]
    assert names and all(".lora_" in name for name in names)


def test_a_subclass_with_one_more_argument_is_configured_trained_saved_and_opened(batches, tmp_path):
    module = build("Weighted", my_weight=2.0)
    assert module.hparams.my_weight == 2.0 and module.hparams.num_q == TINY["num_q"]
    fit(module, batches)
    module.save_pretrained(tmp_path)
    again = Weighted.from_pretrained(tmp_path)
    assert again.my_weight == again.hparams.my_weight == 2.0
    for one, other in zip(module.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"model\.my_wait is unknown; did you mean my_weight"):
        build("Weighted", my_wait=2.0)


class LoHa:
    """An adapter method of somebody else's: Hadamard products of low-rank matrices."""

    update = "(A B) * (C D)"

    def config(self, settings, targets):
        return peft.LoHaConfig(r=settings.rank, alpha=settings.rank, target_modules=targets)

    def probe(self, layer):
        return layer.hada_w2_a[layer.active_adapters[0]]

    def size(self, layer):
        norm = layer.get_delta_weight(layer.active_adapters[0]).norm().item()
        return norm, norm

    def exact_at_start(self, settings):
        return True


class LayerNorms(LoHa):
    """A method whose parameters are named like nothing that is known."""

    def config(self, settings, targets):
        return peft.LNTuningConfig(target_modules=["norm1"])


def of(name, heads=2, width=64):
    return {"backbone_name": name, "backbone_kwargs": {"embed_dim": width, "depth": 3, "num_heads": heads}}


IA3 = {"lora_method": "ia3", "lora_target_modules": ["attn.qkv", "fc2"]}
METHODS = {
    "ia3": IA3,
    "ia3 in DINOv3": {**IA3, **of("vit_small_patch16_dinov3_qkvb")},
    "ia3 in EVA": {**IA3, **of("eva02_tiny_patch14_224", width=48)},
    "own": {"lora_method": f"{__name__}.LoHa", "lora_rank": 4},
}
ADAPTED = {"use_lora": True, "lora_lr": 0.1, "warmup_steps": [0, 0]}


def outputs(module):
    with torch.no_grad(), module.eval().network.deployed():
        masks, classes = module.network(torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0)))
    return torch.cat([t.flatten() for t in (*masks, *classes)])


@pytest.mark.parametrize("method", METHODS)
def test_another_adapter_method_trains_is_audited_saved_opened_and_merged(method, batches, tmp_path):
    module = build(**ADAPTED, **METHODS[method])
    audit = AuditLoRA()
    fit(module, batches, audit, max_steps=4)
    assert len(audit.audit.results) == 10 and all(check["passed"] for check in audit.audit.results.values())
    (group,) = [group for group in module.trainer.optimizers[0].param_groups if group["kind"] == "lora"]
    assert group["weight_decay"] == 0 and {id(p) for p in group["params"]} == {
        id(p) for p in module.adapter_parameters()
    }
    expected, norms = outputs(module), update_norms(module.backbone)
    assert len(norms) == 6 and all(norm > 0 for norm in norms.values())

    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(is_adapter(key) for key in kept if ".backbone." in key)
    module.save_pretrained(tmp_path / "adapter")
    again = MaskClassificationSemantic.from_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(again), expected) and update_norms(again.backbone) == norms
    assert again.hparams.lora_method == module.hparams.lora_method
    facts = inspect_model(tmp_path / "adapter")
    assert facts["fit"]["fits"] and facts["parts"]["adapters"]["tensors"] == len(module.adapter_parameters())

    merge_adapter(again)
    assert not any(is_adapter(name) for name, _ in again.named_parameters())
    torch.testing.assert_close(outputs(again), expected, rtol=1e-4, atol=1e-4)


def test_ia3_trains_on_a_base_in_bfloat16_and_two_of_them_share_it(batches, tmp_path):
    build().save_pretrained(tmp_path / "base")
    settings = {**ADAPTED, **IA3, "ckpt_path": str(tmp_path / "base"), "base_dtype": "bfloat16"}
    expected = {}
    for name, lr in (("day", 0.1), ("night", 0.2)):
        module, audit = build(**{**settings, "lora_lr": lr}), AuditLoRA()
        fit(module, batches, audit, max_steps=4, precision="bf16-mixed")
        assert all(check["passed"] for check in audit.audit.results.values())
        module.save_pretrained(tmp_path / name)
        expected[name] = outputs(MaskClassificationSemantic.from_pretrained(tmp_path / name))
    both = MaskClassificationSemantic.from_pretrained(tmp_path / "day")
    both.add_adapter(tmp_path / "night", "night")
    for name, adapter in (("night", "night"), ("day", "default")):
        both.use_adapter(adapter)
        assert torch.equal(outputs(both), expected[name])
    assert not torch.equal(expected["day"], expected["night"])


def test_the_audit_refuses_a_method_whose_adapters_do_not_move(batches):
    module = build(**{**ADAPTED, "lora_lr": 1e-30}, **METHODS["ia3"])
    with pytest.raises(AuditError, match="updates_nonzero: the update l - 1 is still zero"):
        fit(module, batches, AuditLoRA(), max_steps=4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_method": "ia4"}, "lora_method 'ia4' is unknown: choose from .* did you mean ia3"),
        ({"lora_method": "mine.Nothing"}, r"lora_method 'mine\.Nothing': import mine first"),
        ({"lora_method": "ia3", "lora_options": {"lora_bias": True}}, "lora_options .*: IA3 has none"),
        ({"lora_method": f"{__name__}.LayerNorms"}, "trains .*: parameters of an adapter are known by names"),
    ],
)
def test_a_method_that_cannot_be_is_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        MaskClassificationSemantic(**TINY, use_lora=True, **settings)


@pytest.mark.parametrize("name", ["os.abort", "pathlib.Path", "this.s"])
def test_a_name_in_saved_settings_that_is_no_method_is_neither_imported_nor_called(name):
    sys.modules.pop("this", None)
    with pytest.raises(ValueError, match="lora_method"):
        MaskClassificationSemantic(**TINY, use_lora=True, lora_method=name)
    assert "this" not in sys.modules
