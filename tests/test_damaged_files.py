"""Saved networks that were cut off, edited or mixed up are answered with a sentence that names the file."""

import importlib.util
import json
import re

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from eomt.diagnosis.inspection import inspect_model
from eomt.models.checkpoint import load_checkpoint
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

open_ = MaskClassificationSemantic.from_pretrained


def build(**settings):
    torch.manual_seed(0)
    return MaskClassificationSemantic(**{**TINY, **settings})


@pytest.fixture
def model(tmp_path):
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path):
    """On a random base, which lies in its folder, too."""
    build(use_lora=True, lora_rank=4, lora_alpha=8).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_json(path, **changes):
    """None for a change leaves the entry out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_settings(folder, **changes):
    """As an earlier version wrote them, without an id."""
    init = json.loads((folder / "eomt_config.json").read_text())["init"]
    edit_json(folder / "eomt_config.json", init=init | changes, artefact_id=None)


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def scribble(path):
    content = bytearray(path.read_bytes())
    content[20:40] = b"\xff" * 20
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, scribble])
@pytest.mark.parametrize("name", ["adapter_model", "heads", "base"])
def test_a_damaged_file_of_an_adapter_is_named(adapter, damage, name):
    damage(adapter / f"{name}.safetensors")
    with pytest.raises(ValueError, match=rf"adapter/{name}\.safetensors cannot be read"):
        open_(adapter)


@pytest.mark.parametrize("damage", [cut, scribble])
def test_a_damaged_model_is_named_opened_inspected_or_loaded(model, damage):
    damage(model / "model.safetensors")
    for use in (open_, inspect_model, lambda path: load_checkpoint(build().network, path)):
        with pytest.raises(ValueError, match=r"model/model\.safetensors cannot be read"):
            use(model)


@pytest.mark.parametrize("name", ["adapter_model", "heads"])
def test_a_missing_file_of_an_adapter_is_named(adapter, name):
    (adapter / f"{name}.safetensors").unlink()
    for use in (open_, inspect_model):
        with pytest.raises(FileNotFoundError, match=rf"adapter/{name}\.safetensors is missing"):
            use(adapter)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"r": 8}, "adapter_config.json says r 8, .*says 4"),
        ({"r": "four"}, "adapter_config.json.*LoRA rank 'four'"),
        ({"r": None}, "adapter_config.json has no r"),
        ({"lora_alpha": 80}, "adapter_config.json says lora_alpha 80, .*says 8"),
        ({"use_rslora": True}, "adapter_config.json says use_rslora true, .*says false"),
        ({"use_dora": True}, "says use_dora true"),
        ({"peft_type": "IA3"}, "adapter_config.json says peft_type IA3, .*says LORA"),
        ({"peft_type": "NOTHING"}, "adapter_config.json says peft_type NOTHING"),
        ({"peft_type": ["LORA"]}, "adapter_config.json .*peft_type"),
        ({"fan_in_fan_out": True}, "says fan_in_fan_out true"),
        ({"target_modules": ["nothing"]}, "does not fit this module .*attn"),
        ({"target_modules": ".*"}, "target_modules"),
        ({"new_option": 3}, "adapter_config.json says new_option 3"),
    ],
)
def test_an_edited_adapter_config_is_refused_with_what_it_says(adapter, changes, sentence):
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=sentence):
        open_(adapter)


def test_what_an_adapter_config_of_another_version_of_peft_says_beside_its_defaults_changes_nothing(adapter):
    edit_json(adapter / "adapter_config.json", option_to_come=None, another=False, peft_version="9.0.0", revision="x")
    assert open_(adapter).lora is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"init": None}, "eomt_config.json .*init"),
        ({"init": [1]}, "eomt_config.json .*init"),
        ({"init": {"num_classes": 3}}, "eomt_config.json: `init` has no img_size"),
    ],
)
def test_a_configuration_without_its_settings_is_named(model, changes, sentence):
    edit_json(model / "eomt_config.json", artefact_id=None, **changes)
    for use in (open_, inspect_model):
        with pytest.raises(ValueError, match=sentence):
            use(model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_queries": 5}, r"eomt_config.json.*num_queries is unknown.*num_q.*written by eomt-lora 0"),
        ({"num_q": "five"}, "eomt_config.json: num_q 'five'"),
        ({"num_q": -5}, "eomt_config.json: num_q -5"),
        ({"num_q": 5}, "num_q"),
        ({"img_size": [64, "x"]}, "eomt_config.json: img_size"),
        ({"img_size": [64, 100]}, "eomt_config.json: img_size .*multiples"),
        ({"backbone_name": "nothing"}, "backbone_name 'nothing'"),
        ({"backbone_kwargs": {"embed_dim": 64, "depth": 3, "num_heads": 0}}, "backbone"),
        ({"backbone_kwargs": {"embed_dim": 64, "depth": 3, "num_heads": 2, "nothing": 1}}, "backbone"),
        ({"use_lora": "yes"}, "eomt_config.json: use_lora"),
    ],
)
def test_an_edited_setting_is_named(model, changes, sentence):
    edit_settings(model, **changes)
    with pytest.raises(ValueError, match=sentence):
        open_(model)


@pytest.mark.parametrize(
    ("name", "key"),
    [("heads", "network.q.weight"), ("adapter_model", "base_model.model.blocks.0.attn.qkv.lora_A.weight")],
)
def test_tensors_of_other_shapes_or_kinds_are_refused_with_both(adapter, name, key):
    edit_settings(adapter)
    file = adapter / f"{name}.safetensors"
    before = file.read_bytes()
    for edit, sentence in (
        (lambda t: t.update({key: t[key][:, :-1].contiguous()}), rf"{re.escape(key)} is \[\d+, 63\], .* \[\d+, 64\]"),
        (lambda t: t.update({key: t[key].int()}), rf"{re.escape(key)} is torch.int32"),
    ):
        edit_tensors(file, edit)
        with pytest.raises(ValueError, match=sentence):
            open_(adapter)
        file.write_bytes(before)


def test_an_adapter_with_half_a_factor_is_not_inspected(adapter):
    key = "base_model.model.blocks.0.attn.qkv.lora_B.weight"
    edit_tensors(adapter / "adapter_model.safetensors", lambda t: t.pop(key))
    with pytest.raises(ValueError, match=r"adapter: lora_A and lora_B of blocks\.0\.attn\.qkv .* and None"):
        inspect_model(adapter)


NO_NETWORKS = [
    {"attn_mask_probs": torch.tensor(1.0), "q.weight": torch.zeros(3)},
    {"encoder.backbone.blocks.x.attn": torch.zeros(3)},
    {"encoder.backbone.pos_embed": torch.zeros(3), "q.weight": torch.zeros(20, 64)},
]
NO_CHECKPOINTS = [
    {"state_dict": 3, "hyper_parameters": {}},
    {"state_dict": {}, "hyper_parameters": [1]},
    {"hyper_parameters": {"img_size": [64, 64], "num_classes": 3}},
    {"state_dict": {1: 2}, "hyper_parameters": {"img_size": "big"}},
    [1, 2],
]


@pytest.mark.parametrize("content", [*NO_NETWORKS, *NO_CHECKPOINTS], ids=range(8))
def test_a_checkpoint_that_is_none_is_named(tmp_path, content):
    torch.save(content, tmp_path / "odd.ckpt")
    uses = [open_, lambda path: load_checkpoint(build().network, path)]
    for use in [*uses, inspect_model] if any(content is one for one in NO_CHECKPOINTS) else uses:
        with pytest.raises(ValueError, match=r"odd\.ckpt"):
            use(tmp_path / "odd.ckpt")


KEYS = ("encoder.backbone.pos_embed", "q.weight", "attn_mask_probs", "class_head.bias")
ODD = [(key, torch.Tensor.flatten) for key in KEYS[:2]]  # the others are flat
ODD += [(key, edit) for key in KEYS for edit in (lambda t: t[None], lambda t: t * torch.nan)]


@pytest.mark.parametrize(("key", "edit"), ODD)
def test_a_checkpoint_with_an_odd_tensor_is_refused(tmp_path, key, edit):
    state = build().network.state_dict()
    torch.save(state | {key: edit(state[key])}, tmp_path / "odd.bin")
    with pytest.raises(ValueError, match=r"odd\.bin"):
        load_checkpoint(build().network, tmp_path / "odd.bin")


def test_an_adapter_without_peft_is_answered_before_the_network_is_built(adapter, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    monkeypatch.setattr("eomt.training.mask_classification_semantic.build_network", lambda *_: 1 / 0)
    with pytest.raises(ImportError, match="pip install peft"):
        open_(adapter)
