"""Plain backbones from files: every usual form computes what its own library computes, or is refused by what it is."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from backbones import (
    ABSOLUTE,
    DEIT,
    DEIT3,
    DINOV2,
    DINOV3,
    GATED,
    GIANT,
    MAE,
    NAMES,
    REGISTERS,
    ROPE,
    assert_loads,
    facebook_dinov2,
    facebook_dinov3,
    in_chunks,
    library,
    library_tokens,
    made,
    of_version_4,
    save,
    timm_vit,
    tokens,
)
from safetensors.torch import load_file

from eomt.models.resampling import resample_pos_embed
from eomt.models.vit import ViT
from eomt.settings.backbone_choice import choose_backbone, read_backbone_file
from eomt.settings.compose import compose_run
from eomt.settings.model import ModelSettings

# The forms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", [4, 5])
def test_tokens_are_those_of_transformers_on_the_same_weights(name, version, tmp_path):
    model, patch = library(name)
    state = model.state_dict() if version == 5 else of_version_4(model.state_dict())
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    encoder = timm_vit(name, (4 * patch, 4 * patch), patch, weights=save(tmp_path, state)).eval()
    images = torch.rand(2, 3, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(1))
    found, expected = tokens(encoder, images), library_tokens(model, encoder.normalize(images))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    report = encoder.report
    assert set(report.loaded) == encoder.backbone.state_dict().keys() and not report.resampled
    assert {key.rpartition(".")[2] for key in report.left_out} <= {"mask_token", "weight", "bias"}


@pytest.mark.parametrize("name", [DINOV2, REGISTERS, GIANT])
@pytest.mark.parametrize("arranged", [dict, in_chunks])
def test_facebooks_dinov2_loads(name, arranged, tmp_path):
    encoder = made(name, 14)
    state = arranged(facebook_dinov2(encoder.backbone))
    loaded = assert_loads(encoder, save(tmp_path, state, "dinov2_pretrain.pth"), ["mask_token"])
    assert ("class token's position" in str(loaded.report)) == (name == REGISTERS)


@pytest.mark.parametrize("name", [DINOV3, GATED])
def test_facebooks_dinov3_loads_with_biases_where_its_mask_leaves_them(name, tmp_path):
    encoder = made(name, 16)
    state = facebook_dinov3(encoder.backbone)
    assert_loads(encoder, save(tmp_path, state, "dinov3.pth"), {
        "mask_token", "rope_embed.periods",
        *(f"blocks.{i}.attn.qkv.bias_mask" for i in range(3)),
        *(f"blocks.{i}.attn.k_bias, which is 0" for i in range(3)),
    })  # fmt: skip


def test_facebooks_deit_iii_loads_with_its_own_names_of_layer_scale(tmp_path):
    encoder = made(DEIT3, 16)
    state = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key): t for key, t in encoder.backbone.state_dict().items()}
    assert "blocks.0.gamma_1" in state
    head = {"head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)}
    loaded = assert_loads(encoder, save(tmp_path, {**state, **head}, "deit_3_small_224_21k.pth"), head)
    assert ": a ViT 48 wide" in str(loaded.report)


@pytest.mark.parametrize("name", [DINOV2, REGISTERS, DINOV3, MAE, DEIT, DEIT3, ABSOLUTE, ROPE])
def test_timms_own_file_loads_without_its_head(name, tmp_path):
    encoder = made(name, 14 if "dinov2" in name else 16)
    state = dict(encoder.backbone.state_dict()) | {"head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)}
    assert_loads(encoder, save(tmp_path, state), ["head.weight", "head.bias"])


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {f"backbone.{key}": tensor for key, tensor in state.items()},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {f"module.backbone.{key}": tensor for key, tensor in state.items()},
        lambda state: {f"student.backbone.{key}": tensor for key, tensor in state.items()},
        lambda state: {"teacher": {f"backbone.{key}": tensor for key, tensor in state.items()}},
        lambda state: {"state_dict": {f"model.{key}": t for key, t in state.items()}, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    ],
    ids=["backbone", "module", "module.backbone", "student", "teacher", "state_dict", "model"],
)
def test_wrappers_are_seen_through(wrapped, tmp_path):
    encoder = made(DINOV2, 14)
    torch.save(wrapped(dict(encoder.backbone.state_dict())), tmp_path / "file.pth")
    path = tmp_path / "file.pth"
    left = ["optimizer.state.0.exp_avg"] if "optimizer" in str(torch.load(path).keys()) else []
    assert_loads(encoder, path, left)


def test_of_teacher_and_student_the_teacher_is_taken_and_the_student_named(tmp_path):
    encoder = made(DINOV2, 14)
    state = encoder.backbone.state_dict()
    both = {"teacher": {f"backbone.{key}": t for key, t in state.items()} | {"dino_head.mlp.0.weight": torch.ones(2)}}
    both["student"] = {f"module.backbone.{key}": t + 1 for key, t in state.items()}
    torch.save(both, tmp_path / "checkpoint.pth")
    left = [f"student.module.backbone.{key}" for key in state]
    assert_loads(encoder, tmp_path / "checkpoint.pth", [*left, "teacher.dino_head.mlp.0.weight"])


@pytest.mark.parametrize("names", [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_an_averaged_copy_beside_the_weights_is_another_backbone_and_alone_it_is_loaded(names, tmp_path):
    encoder = made(DINOV2, 14)
    state = dict(encoder.backbone.state_dict())
    torch.save(dict.fromkeys(names, state), tmp_path / "both.pth")
    with pytest.raises(ValueError, match=rf"{names[1]}\.\S+ and {names[0]}\.\S+ are both .*keep one backbone"):
        read_backbone_file(tmp_path / "both.pth")
    torch.save({names[1]: state}, tmp_path / "averaged.pth")
    assert_loads(encoder, tmp_path / "averaged.pth")


def test_another_decoder_than_maes_tells_nothing_of_the_family(tmp_path):
    encoder = made(DEIT, 16)
    state = {f"deit.{key}": tensor for key, tensor in encoder.backbone.state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deit"}))
    assert_loads(encoder, save(tmp_path, state | {"decoder.0.weight": torch.ones(2)}).parent, ["decoder.0.weight"])


def test_maes_decoder_is_left_out_by_name(tmp_path):
    encoder = made(MAE, 16)
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
    decoder |= {f"decoder_blocks.{i}.norm1.weight": torch.ones(8) for i in range(2)}
    path = save(tmp_path, dict(encoder.backbone.state_dict()) | decoder, "mae.pth")
    loaded = assert_loads(encoder, path, decoder)
    assert "decoder_blocks.*.norm1.weight (2)" in str(loaded.report)
    assert ": an MAE ViT 48 wide" in str(loaded.report)


def test_half_precision_is_loaded_in_full(tmp_path):
    encoder = made(DINOV2, 14)
    state = {key: tensor.half() for key, tensor in encoder.backbone.state_dict().items()}
    loaded = timm_vit(DINOV2, weights=save(tmp_path, state))
    for key, tensor in loaded.backbone.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[key].float())


# Places


def test_a_folder_of_one_file_or_of_shards_is_a_file(tmp_path):
    encoder = made(DINOV2, 14)
    state = dict(encoder.backbone.state_dict())
    assert_loads(encoder, save(tmp_path / "one", state, "anything.pth").parent)
    keys, names = list(state), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = (keys[:10], keys[10:])
    for name, half in zip(names, halves, strict=True):
        save(tmp_path / "two", {key: state[key] for key in half}, name)
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_loads(encoder, tmp_path / "two")
    (tmp_path / "two" / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {names[1]}"):
        read_backbone_file(tmp_path / "two")
    save(tmp_path / "one", state, "other.pth")
    with pytest.raises(ValueError, match=r"has anything.pth, other.pth: give one of them"):
        read_backbone_file(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="has no file that ends in"):
        (tmp_path / "none").mkdir()
        read_backbone_file(tmp_path / "none")


def test_pickled_code_in_a_file_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"model": {}, "args": Code()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="pickled objects, which are never loaded"):
        read_backbone_file(tmp_path / "file.pth")
    assert not (tmp_path / "ran").exists()


# Other sizes


def test_positions_and_patches_are_resampled_as_timm_does_it_and_the_table_says_so(tmp_path):
    source = made(DINOV2, 14)
    encoder = timm_vit(DINOV2, (64, 128), 16, weights=save(tmp_path, source.backbone.state_dict()))
    expected = resample_pos_embed(source.backbone.pos_embed.detach(), 1, (4, 4), (4, 8))
    assert torch.equal(encoder.backbone.pos_embed, expected)
    assert encoder.backbone.patch_embed.proj.weight.shape[-1] == 16
    assert encoder.backbone.resampled.keys() == {"pos_embed", "patch_embed.proj.weight"}
    table = str(encoder.report)
    assert "pos_embed from 4x4 to 4x8 patches" in table and "patch_embed.proj.weight from 14x14 to 16x16" in table
    assert "antialiased" in table and "antialiased" not in str(timm_vit(DINOV2, weights=tmp_path).report)


# A real one


@pytest.fixture(scope="module")
def real():
    """A pretrained DINOv2 ViT-S/14, where $EOMT_WEIGHTS says it is."""
    root = os.environ.get("EOMT_WEIGHTS")
    if not root:
        pytest.skip("EOMT_WEIGHTS names no folder with pretrained weights")
    return Path(root) / "dinov2_vits14_transformers.safetensors"


def test_the_usual_configuration_takes_a_real_file_by_its_place_alone(real):
    config = compose_run([f"model.backbone_weights={real}", "data.root=x"])
    settings = ModelSettings(img_size=[64, 64], num_classes=3, backbone_weights=config.model.backbone_weights)
    assert settings.with_backbone().backbone_name == DINOV2
    with pytest.raises(ValueError, match=r"holds a DINOv2 ViT-S/14 of 12 blocks.*backbone_name says vit_large_patch14"):
        ModelSettings(
            img_size=[64, 64], num_classes=3, backbone_weights=str(real), backbone_name="vit_large_patch14_dinov2"
        )


def test_tokens_of_a_real_file_are_those_of_transformers_at_its_own_size(real):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model = transformers.Dinov2Model(config).eval()
    new = {
        "attention.query": "q_proj",
        "attention.key": "k_proj",
        "attention.value": "v_proj",
        "output.dense": "o_proj",
    }
    state = {}
    for key, tensor in load_file(real).items():
        for theirs, name in new.items():
            key = key.replace(f"attention.{theirs}", f"attention.{name}")
        state[key] = tensor.float()
    missing, unknown = model.load_state_dict(state, strict=False)
    assert missing == ["embeddings.mask_token"] and not unknown
    encoder = ViT((518, 518), 14, choose_backbone(None, real), weights=real).eval()
    images = torch.rand(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    found, expected = tokens(encoder, images), library_tokens(model, encoder.normalize(images))
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(encoder.report.loaded) == 174 and not encoder.report.left_out
