"""What is not a number trains nothing, is not saved, and gets no score."""

import math

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from eomt.files import read_json, write_json
from eomt.inference.prediction import predict
from eomt.models.finite import first_not_finite
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

IMAGE = torch.zeros(3, 64, 128, dtype=torch.uint8)


def build(**settings):
    torch.manual_seed(0)
    return MaskClassificationSemantic(**{**TINY, **settings})


def broken(value=math.nan, **settings):
    module = build(**settings)
    with torch.no_grad():
        module.network.mask_head[2].bias[3] = value
    return module


def spoil(path, key, value=math.nan):
    """One number of a file of weights."""
    tensors = load_file(path)
    tensors[key].view(-1)[0] = value
    save_file(tensors, path, {"img_size": "[64, 128]"})


def test_the_first_tensor_with_a_value_that_is_no_number_is_named():
    good = {"a": torch.ones(2, 2), "b": torch.tensor(3), "c": torch.ones(0), "d": torch.ones(1, dtype=torch.bfloat16)}
    assert first_not_finite(good) is None and first_not_finite({}) is None
    assert first_not_finite({"huge": torch.full((9,), 3e38)}) is None, "a sum would overflow"
    for value in (math.nan, math.inf, -math.inf):
        assert first_not_finite({**good, "e": torch.tensor([0, value]), "f": torch.tensor(math.nan)}) == "e"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_is_not_finite_is_not_saved_and_the_earlier_one_stays(tmp_path, value):
    build().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"mask_head\.2\.bias holds NaN or infinity.* nothing was saved"):
        broken(value).save_pretrained(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("settings", "file", "key"),
    [
        ({}, "model.safetensors", "network.q.weight"),
        ({"use_lora": True}, "heads.safetensors", "network.q.weight"),
        ({"use_lora": True}, "base.safetensors", "network.encoder.backbone.blocks.0.attn.qkv.weight"),
        ({"use_lora": True}, "adapter_model.safetensors", "base_model.model.blocks.0.attn.qkv.lora_B.weight"),
    ],
)
def test_a_saved_network_that_is_not_finite_is_not_opened(tmp_path, settings, file, key):
    build(**settings).save_pretrained(tmp_path)
    spoil(tmp_path / file, key)
    with pytest.raises(ValueError, match=r"(q\.weight|qkv\..*weight) holds NaN or infinity.* take an earlier one"):
        MaskClassificationSemantic.from_pretrained(tmp_path)


def test_a_further_adapter_that_is_not_finite_is_not_added(tmp_path):
    for name in ("one", "other"):
        build(use_lora=True).save_pretrained(tmp_path / name)
    spoil(tmp_path / "other" / "heads.safetensors", "network.q.weight")
    config = read_json(tmp_path / "other" / "eomt_config.json")
    del config["artefact_id"]  # as an earlier version saved it
    write_json(tmp_path / "other" / "eomt_config.json", config)
    module = MaskClassificationSemantic.from_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=r"q\.weight holds NaN or infinity"):
        module.add_adapter(tmp_path / "other", "other")
    assert module.adapter_names == ["default"]


def test_training_does_not_start_from_weights_that_are_not_finite(tmp_path):
    build().save_pretrained(tmp_path)
    spoil(tmp_path / "model.safetensors", "network.q.weight")
    with pytest.raises(ValueError, match=r"ckpt_path .*: q\.weight holds NaN or infinity"):
        build(ckpt_path=str(tmp_path))


@pytest.mark.parametrize("factor", [math.nan, 1e30])
def test_a_network_whose_outputs_are_not_finite_draws_no_picture(factor):
    module = build()
    with torch.no_grad():
        module.network.mask_head[2].weight *= factor
        module.network.upscale[0].conv1.weight *= factor
    with pytest.raises(ValueError, match="outputs are not finite"):
        predict(module.network, IMAGE)


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint():
    module = broken()
    with pytest.raises(ValueError, match=r"mask_head\.2\.bias holds NaN or infinity"):
        module.on_save_checkpoint({"state_dict": module.state_dict()})
