"""Files that are no EoMT: each is called what it is, or shown by its first keys with what is known."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_other_programs import REGISTERS, settings_of

from eomt.exchange.opening import recognised
from eomt.settings.eomt_files import read_eomt_file
from eomt.settings.eomt_names import LIGHTLY, PUBLISHED, TRANSFORMERS, program_of
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

PATCHES = [8, 3, 4, 4]
VIT = {f"{a}.{b}_proj.weight": [8, 8] for a in ("layers.0.attention", "layers.1.attention") for b in "qkvo"}
VIT |= {"embeddings.cls_token": [1, 1, 8], "embeddings.position_embeddings": [1, 5, 8]}
VIT |= {"embeddings.patch_embeddings.projection.weight": PATCHES}
SWIN = {"embeddings.patch_embeddings.projection.weight": PATCHES, "embeddings.norm.weight": [8]}
SWIN |= {f"encoder.layers.{i}.blocks.0.attention.{p}_proj.weight": [8, 8] for i in range(2) for p in "qkv"}
HIERA = {"pos_embed": [1, 4, 8], "patch_embed.proj.weight": PATCHES}
HIERA |= {"blocks.0.attn.qkv.weight": [24, 8], "blocks.1.attn.qkv.weight": [48, 16]}
UNKNOWN = {  # names as the programs write them
    "a U-Net": {"encoder.conv1.weight": [4, 3, 3, 3], "decoder.blocks.0.conv1.weight": [2], "segmentation_head.b": [2]},
    "T5": {"shared.weight": [4, 4], "encoder.block.0.layer.0.SelfAttention.q.weight": [4, 4]},
    "Swin": SWIN,
    "timm's Swin": {"patch_embed.proj.weight": PATCHES, "layers.0.blocks.0.attn.qkv.weight": [24, 8]},
    "Hiera": HIERA,
    "SegFormer": {"segformer.stages.0.patch_embeddings.proj.weight": PATCHES, "decode_head.classifier.weight": [2]},
    "Mask2Former": {
        "model.pixel_level_module.encoder.embeddings.norm.weight": [8],
        "model.transformer_module.queries_features.weight": [4, 8],
        "class_predictor.weight": [5, 8],
        "class_predictor.bias": [5],
    },
    "SAM": {"shared_image_embedding.positional_embedding": [2, 8], "vision_encoder.patch_embed.projection.weight": [1]},
    "CLIP": {"logit_scale": [1], "vision_model.embeddings.patch_embedding.weight": PATCHES},
    "another encoder": {"encoder.backbone.layer1.0.conv1.weight": [4, 3, 3, 3], "class_head.weight": [2, 4]},
}
NAMED = {
    "a ViT": (VIT, "a ViT 8 wide, patch/4 of 2 blocks, a plain backbone without queries and heads"),
    "an adapter": (
        {"base_model.model.encoder.q.lora_A.weight": [2, 4], "base_model.model.encoder.q.lora_B.weight": [4, 2]},
        "an adapter, which holds no backbone",
    ),
    "an optimiser": ({"state.0.exp_avg": [4], "state.0.exp_avg_sq": [4]}, "the state of an optimiser"),
}


def write(shapes, path):
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


def refusals(path):
    """What `convert.py` says of a file, and `model.ckpt_path`, as one."""
    with pytest.raises(ValueError, match="holds") as converting:
        recognised(path)
    with pytest.raises(ValueError, match="holds") as training:
        MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(path)))
    return str(converting.value), str(training.value)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_file_that_nobody_knows_is_shown_by_its_path_and_keys_with_what_is_known(name, tmp_path):
    path = write(UNKNOWN[name], tmp_path / "x.safetensors")
    for said in refusals(path):
        assert f"{path} is no EoMT that is known here: it holds {min(UNKNOWN[name])}" in said
        assert "known are a published EoMT" in said


@pytest.mark.parametrize("name", NAMED)
def test_a_file_of_another_kind_is_called_what_it_is(name, tmp_path):
    shapes, what = NAMED[name]
    for said in refusals(write(shapes, tmp_path / "x.safetensors")):
        assert "x.safetensors" in said and what in said


def test_heads_alone_are_called_so(tmp_path):
    own = MaskClassificationSemantic(**settings_of(REGISTERS)).network.state_dict()
    shapes = {key: list(t.shape) for key, t in own.items() if key.startswith(("q.", "mask_head", "class_head", "up"))}
    for said in refusals(write(shapes, tmp_path / "heads.safetensors")):
        assert "heads.safetensors holds queries and heads of an EoMT and no backbone: give the folder" in said


def test_a_checkpoint_of_an_optimiser_is_called_what_it_is(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for said in refusals(tmp_path / "optimizer.pt"):
        assert "holds the state of an optimiser" in said


def test_a_configuration_in_the_place_of_weights_is_told_to_be_none(tmp_path):
    write(UNKNOWN["SAM"], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json holds no weights and no index of them: give its folder, .*"):
        read_eomt_file(tmp_path / "config.json")


def test_predicting_with_another_programs_network_names_it_and_the_way_to_open_it(tmp_path, call_script):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    shapes = {"query.weight": [4, 8], "class_predictor.weight": [5, 8], "upscale_block.block.0.conv1.weight": [8, 8]}
    write(shapes | VIT, tmp_path / "model.safetensors")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for place, what, to in (
        (tmp_path, TRANSFORMERS, "eomt"),
        (tmp_path / "model.safetensors", TRANSFORMERS, "eomt"),
        (tmp_path / "peft", "an adapter of PEFT", "adapter"),
    ):
        code, said = call_script("predict.py", place, tmp_path / "x.png", tmp_path / "out", "--device", "cpu")
        assert code == 1 and f"{place} is {what}" in said
        assert f"python scripts/convert.py {place} OUT --to {to}" in said


def test_names_in_files_of_others_cannot_steer_the_screen(tmp_path, call_script, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["\x1b]0;title\x07\x1b[31mNet"]}))
    write({"\x1b[2Jkey": [2]}, tmp_path / "model.safetensors")
    code, said = call_script("convert.py", tmp_path, tmp_path / "out", "--to", "eomt")
    assert code == 1 and "\\x1b[31mNet" in said and "\\x1b[2Jkey" in said and "\x1b" not in said
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "\x1b[31mLORA"}))
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    assert importlib.import_module("convert").main([str(tmp_path), str(tmp_path / "out"), "--to", "adapter"]) == 1
    said = capsys.readouterr()
    assert "an adapter of PEFT (\\x1b[31mLORA)" in said.out and "\x1b" not in said.out + said.err


def test_the_config_beside_an_unknown_file_says_what_it_is(tmp_path):
    write(UNKNOWN["Mask2Former"], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Mask2FormerForUniversalSegmentation"]}))
    for said in refusals(tmp_path):
        assert "is no EoMT, but Mask2FormerForUniversalSegmentation, as the config.json beside it says" in said


def test_a_bare_dinov2_is_named_by_its_size_and_by_the_setting_that_takes_it():
    weights = os.environ.get("EOMT_WEIGHTS")
    if not weights:
        pytest.skip("EOMT_WEIGHTS names no folder with DINOv2 weights")
    path = Path(weights) / "dinov2_vits14_transformers.safetensors"
    for said in refusals(path):
        assert f"{path} holds a DINOv2 ViT-S/14 of 12 blocks, a plain backbone" in said
        assert "model.backbone_weights" in said


@pytest.mark.parametrize(
    ("keys", "program"),
    [
        (["network.q.weight", "network.mask_head.0.weight"], PUBLISHED),
        (["network.encoder.backbone.blocks.0.norm1.weight"], PUBLISHED),
        (["query.weight", "upscale_block.block.0.conv1.weight"], TRANSFORMERS),
        (["model.queries.weight", "model.mask_head.0.weight"], LIGHTLY),
        (["encoder.layer.0.x"], None),
        (["class_predictor.weight", "class_head.weight"], None),
    ],
)
def test_a_program_is_known_by_names_that_no_other_network_has_together(keys, program):
    assert program_of(keys) == program


def test_the_index_of_a_folder_in_parts_means_the_folder(tmp_path):
    parts = {"a.safetensors": ["q.weight"], "b.safetensors": ["mask_head.0.weight"]}
    for file, keys in parts.items():
        save_file({key: torch.ones(3, 4) for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert read_eomt_file(path).sizes["num_q"] == 3
