"""The parts that somebody else may bring: losses, an optimiser, an encoder, a module with more arguments."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, fit
from hydra.utils import instantiate
from torch import nn
from torch.utils.data import DataLoader

from eomt.settings.config_check import check_config
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
    check_config({"model": model})
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
