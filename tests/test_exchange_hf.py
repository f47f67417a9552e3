"""Networks written for transformers: its own classes open them and give the same class maps."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_other_programs import CLASSES, DINOV3, DINOV3_GATED, GATED, PLAIN, REGISTERS, dinov3, settings_of

from eomt.exchange.hf import write_hf
from eomt.toys.scene import draw_scene
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to write for")
COLORS = [[128, 64, 128], [70, 130, 180], [107, 142, 35], [0, 0, 142]]
ALL = [REGISTERS, PLAIN, GATED, "vit_tiny_patch16_224", pytest.param(DINOV3, marks=dinov3)]


def network_of(name, **changes):
    """Ours, its weights random and far from where training begins."""
    torch.manual_seed(0)
    module = MaskClassificationSemantic(**settings_of(name, class_names=CLASSES, class_colors=COLORS) | changes)
    with torch.no_grad():
        for key, p in module.named_parameters():
            p.copy_((2 if "class_head" in key else 0.2) * torch.randn(p.shape) + ("norm" in key and "weight" in key))
    return module.eval()


def open_theirs(folder, **options):
    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
    return model, transformers.AutoImageProcessor.from_pretrained(folder, **options)


def their_classes(folder, picture, **options):
    """The class map that a user of transformers gets."""
    model, processor = open_theirs(folder, **options)
    inputs = processor(images=picture, return_tensors="pt")
    offsets = inputs.pop("patch_offsets")
    with torch.no_grad():
        outputs = model(**inputs)
    outputs.patch_offsets = offsets
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[picture.size[::-1]])[0]


@pytest.fixture(scope="session")
def picture():
    """A real street, or a drawn one where there is none."""
    if root := os.environ.get("EOMT_CAMVID"):
        return Image.open(min((Path(root) / "val").iterdir())).convert("RGB")
    return Image.fromarray(draw_scene(np.random.default_rng(0), (96, 128), "clear")[0])


@pytest.mark.parametrize("name", ALL)
def test_transformers_opens_what_was_written_and_gives_the_same_class_map(name, tmp_path, picture):
    module = network_of(name)
    assert write_hf(module, tmp_path) < 1e-5
    model, processor = open_theirs(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    with torch.no_grad(), module.network.deployed():
        expected, found = module.network(images), model((images - mean) / std)
    for ours, theirs in zip(expected, (found.masks_queries_logits, found.class_queries_logits), strict=True):
        torch.testing.assert_close(theirs, ours[0], atol=1e-5 * ours[0].abs().max().item(), rtol=0)
    ours = module.predict(picture)
    assert len(ours.unique()) > 1
    assert (ours == their_classes(tmp_path, picture, backend="pil")).float().mean() > 0.9999
    assert (ours == their_classes(tmp_path, picture)).float().mean() > 0.99  # torchvision resizes, and rounds otherwise


def test_names_and_colours_of_the_classes_go_along(tmp_path):
    write_hf(network_of(REGISTERS), tmp_path)
    config = open_theirs(tmp_path)[0].config
    assert config.id2label == dict(enumerate(CLASSES)) and config.class_colors == COLORS


def test_masks_that_have_not_faded_are_left_out_as_in_prediction(tmp_path, picture):
    module = network_of(REGISTERS)
    assert (module.network.attn_mask_probs == 1).all()
    write_hf(module, tmp_path)
    assert (module.predict(picture) == their_classes(tmp_path, picture, backend="pil")).float().mean() > 0.9999


REFUSED = {
    "is for square images alone": (REGISTERS, {"img_size": [64, 128]}),
    "has a linear class head": (REGISTERS, {"head": "arcface"}),
    "computes one activation": (DINOV3_GATED, {}),
    "has one class token before its registers": ("vit_base_patch16_siglip_224", {}),
    "backbone lacks or has more": ("vit_base_patch16_clip_224", {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_network_that_transformers_has_not_is_refused_by_what_it_lacks(message, tmp_path):
    name, changes = REFUSED[message]
    with pytest.raises(ValueError, match=f"transformers' EoMT .*{message}"):
        write_hf(network_of(name, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    module, find = network_of(REGISTERS), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(ImportError, match=r"eomt-lora\[hf\]"):
        write_hf(module, tmp_path)


def test_writing_for_transformers_prints_no_bars_and_leaves_them_as_they_were(tmp_path, capfd):
    from transformers.utils.logging import is_progress_bar_enabled

    before = is_progress_bar_enabled()
    write_hf(network_of(REGISTERS), tmp_path)
    assert capfd.readouterr() == ("", "") and is_progress_bar_enabled() == before
