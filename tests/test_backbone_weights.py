"""Plain backbones from files: every usual form computes what its own library computes, or is refused by what it is."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eomt.models.checkpoint import read_checkpoint
from eomt.models.resampling import resample_pos_embed
from eomt.models.vit import ViT
from eomt.settings.backbone_choice import choose_backbone, read_backbone_file
from eomt.settings.backbone_names import name_tensors
from eomt.settings.backbones import recognise
from eomt.settings.compose import compose_run
from eomt.settings.model import ModelSettings

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3}
DINOV2, REGISTERS, GIANT = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"
DINOV3, GATED = "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"
MAE, PLAIN, DEIT = "vit_base_patch16_224.mae", "vit_base_patch16_224", "deit_tiny_distilled_patch16_224"
DEIT3, ABSOLUTE = "deit3_small_patch16_224", "vit_small_patch16_rope_ape_224"
ROPE = "vit_small_patch16_rope_224"
ONE_BLOCK = {"patch_embed.proj.weight": torch.ones(8, 3, 2, 2), "blocks.0.attn.qkv.weight": torch.ones(24, 8)}
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


def scatter(module):
    """Makes every weight random, far from where libraries let them begin."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + float("norm" in name and "weight" in name))
    return module.eval()


def library(name):
    """transformers' model with random weights, in timm's sizes."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    patch = 16 if name in (DINOV3, GATED, MAE, PLAIN, DEIT) else 14
    options = {**SIZES, "image_size": 4 * patch, "patch_size": patch, "intermediate_size": 192, "layer_norm_eps": 1e-6}
    kinds = {
        DINOV2: ("Dinov2", {}),
        GIANT: ("Dinov2", {"use_swiglu_ffn": True}),
        REGISTERS: ("Dinov2WithRegisters", {}),
        DINOV3: ("DINOv3ViT", {"num_register_tokens": 4, "layer_norm_eps": 1e-5}),
        GATED: ("DINOv3ViT", {"num_register_tokens": 4, "layer_norm_eps": 1e-5, "use_gated_mlp": True}),
        MAE: ("ViTMAE", {"mask_ratio": 0.0}),
        PLAIN: ("ViT", {}),
        DEIT: ("DeiT", {}),
    }
    kind, further = kinds[name]
    if name == GATED:
        further = {**further, "hidden_act": "silu"}
    config = getattr(transformers, f"{kind}Config")(**options | further)
    torch.manual_seed(0)
    return scatter(getattr(transformers, f"{kind}Model")(config)), patch


def of_version_4(state):
    """The names that transformers gave before version 5, in which most files of the hub are."""
    vit, old = any(".layernorm_before." in key for key in state), {}
    for key, tensor in state.items():
        if ".mlp.up_proj." in key and key.replace("up_proj", "gate_proj") in state and "encoder." in key:
            continue
        if ".mlp.gate_proj." in key and "encoder." in key:
            tensor = torch.cat([tensor, state[key.replace("gate_proj", "up_proj")]])
            key = key.replace("gate_proj", "weights_in")
        if not key.startswith("model.layer."):  # DINOv3's attention is as it was
            for new, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                key = key.replace(f".attention.{new}.", f".attention.attention.{name}.")
            key = key.replace(".attention.o_proj.", ".attention.output.dense.").replace(".down_proj.", ".weights_out.")
        if vit:
            key = key.replace("mlp.fc1.", "intermediate.dense.").replace("mlp.fc2.", "output.dense.")
            key = f"encoder.layer.{key.removeprefix('layers.')}" if key.startswith("layers.") else key
        old[key.removeprefix("model.")] = tensor
    return old


def tokens(encoder, images):
    with torch.no_grad():
        x, rope = encoder.embed(images)
        for block in encoder.blocks:
            x = block(x) if rope is None else block(x, rope=rope)
        return encoder.norm(x)


def library_tokens(model, pixels):
    options = {}
    if type(model).__name__ == "ViTMAEModel":  # which shuffles patches
        count = (pixels.shape[-1] // 16) ** 2
        options = {"noise": torch.arange(count).float().expand(len(pixels), -1)}
    with torch.no_grad():
        return model(pixels, **options).last_hidden_state


def save(folder, state, name="model.safetensors"):
    state = {key: tensor.contiguous().clone() for key, tensor in state.items()}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / name) if name.endswith(".safetensors") else torch.save(state, folder / name)
    return folder / name


def timm_vit(name, size=(56, 56), patch=14, kwargs=TINY, seed=0, **options):
    torch.manual_seed(seed)
    encoder = ViT(size, patch, name, False, kwargs, **options)
    return encoder if options else scatter(encoder)


NAMES = [DINOV2, REGISTERS, GIANT, DINOV3, GATED, MAE, PLAIN, DEIT]


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


def facebook_dinov2(backbone):
    """Facebook's names of a timm model's weights, the class token's position where they have it."""
    state = dict(backbone.state_dict()) | {"mask_token": torch.zeros(1, 48)}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"], state["pos_embed"] = (
            state["cls_token"] - 0.5,
            torch.cat([torch.full((1, 1, 48), 0.5), state["pos_embed"]], 1),
        )
    if backbone.blocks[0].mlp.fc1.out_features == 2 * backbone.blocks[0].mlp.fc2.in_features:
        state = {key.replace(".fc1.", ".w12.").replace(".fc2.", ".w3."): tensor for key, tensor in state.items()}
    return state


def facebook_dinov3(backbone):
    state = {"mask_token": torch.zeros(1, 48), "rope_embed.periods": backbone.rope.periods.bfloat16()}
    own = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    own |= {".fc1_g.": ".w1.", ".fc1_x.": ".w2."}
    if backbone.blocks[0].mlp.__class__.__name__ == "SwiGLU":
        own |= {".fc2.": ".w3."}
    for key, tensor in backbone.state_dict().items():
        if key.endswith("q_bias"):
            v = backbone.state_dict()[key.replace("q_bias", "v_bias")]
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.full_like(tensor, 0.7), v])
            state[key.replace("q_bias", "qkv.bias_mask")] = (
                torch.ones(3, 48).index_fill(0, torch.tensor(1), 0).flatten()
            )
        elif not key.endswith("v_bias"):
            for timms, theirs in own.items():
                key = key.replace(timms, theirs)
            state[key] = tensor
    return state


def in_chunks(state):
    return {key.replace("blocks.", f"blocks.{int(key.split('.')[1]) // 2}.") if "blocks." in key else key: t
            for key, t in state.items()}  # fmt: skip


def assert_loads(encoder, path, left_out=()):
    """A file gives a new encoder the weights of this one, and the report names what is left."""
    patch = encoder.patch_size
    loaded = timm_vit(encoder.timm_name, encoder.img_size, patch, seed=1, weights=path)
    own, there = loaded.backbone.state_dict(), encoder.backbone.state_dict()
    assert own.keys() == there.keys()
    assert not [key for key in own if not torch.allclose(own[key], there[key], atol=1e-6)]
    assert set(loaded.report.left_out) == set(left_out)
    assert all(name in str(loaded.report) for name in left_out if "." not in name)
    return loaded


def made(name, patch):
    encoder = timm_vit(name, (4 * patch, 4 * patch), patch)
    encoder.timm_name = name
    return encoder


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


# What is refused


def refused(tmp_path, state, message, name=DINOV2, patch=14, kwargs=TINY):
    with pytest.raises(ValueError, match=message) as error:
        timm_vit(name, (4 * patch, 4 * patch), patch, kwargs, weights=save(tmp_path, state))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(REGISTERS, TINY), (DINOV2, TINY | {"embed_dim": 24}), (DINOV2, TINY | {"depth": 4}), (PLAIN, TINY)],
    ids=["registers", "width", "depth", "kind"],
)
def test_another_backbone_than_the_files_is_refused_and_both_are_described(name, kwargs, tmp_path):
    message = r"holds a DINOv2 ViT 48 wide, patch/14 of 3 blocks; backbone_name says \S+, a .* of \d blocks"
    refused(tmp_path, timm_vit(DINOV2).backbone.state_dict(), message, name, kwargs=kwargs)


def test_positions_that_leave_no_grid_beside_the_models_tokens_are_refused_by_file_and_model(tmp_path):
    state = timm_vit("deit3_small_patch16_224", (64, 64), 16).backbone.state_dict()  # none for the class token
    message = r"model.safetensors holds a ViT .* whose 16 position embeddings are .* vit_small_patch14_dinov2 has 1"
    refused(tmp_path, state, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    state = dict(timm_vit(DINOV2).backbone.state_dict())
    state["blocks.1.mlp.fc1.bias"] = torch.full_like(state["blocks.1.mlp.fc1.bias"], value)
    refused(tmp_path, state, r"blocks.1.mlp.fc1.bias holds NaN or infinity")


def test_a_tensor_under_two_spellings_of_its_name_is_refused(tmp_path):
    state = dict(timm_vit(DEIT3, (64, 64), 16).backbone.state_dict())
    refused(tmp_path, state | {"blocks.0.gamma_1": torch.ones(48)}, r"unknown here \(blocks.0.gamma_1\)", DEIT3, 16)


def test_a_weight_that_is_missing_unknown_or_of_another_shape_is_named(tmp_path):
    state = dict(timm_vit(DINOV2).backbone.state_dict())
    refused(tmp_path, {k: v for k, v in state.items() if k != "norm.bias"}, r"are missing there \(norm.bias\)")
    refused(tmp_path, state | {"blocks.0.adapter.weight": torch.ones(3)}, r"unknown here \(blocks.0.adapter.weight\)")
    refused(tmp_path, state | {"norm.bias": torch.ones(3)}, r"norm.bias is \[3\], this network's is \[48\]")
    refused(tmp_path, {k: v for k, v in state.items() if "blocks.1" not in k}, r"its blocks are \[0, 2\]")
    refused(tmp_path, state | {"module.norm.bias": torch.ones(48)}, "are both norm.bias: keep one backbone")


def test_one_of_q_k_and_v_missing_is_named(tmp_path):
    model, _ = library(DINOV2)
    state = model.state_dict()
    del state["encoder.layer.1.attention.k_proj.weight"]
    refused(tmp_path, state, r"missing there \(blocks.1.attn.qkv.weight\).*encoder.layer.1.attention.q_proj.weight")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"network.q.weight": torch.ones(2)}, "a whole EoMT.*model.ckpt_path"),
        ({"query.weight": torch.ones(2)}, "transformers' EoMT"),
        ({"blocks.0.attn.qkv.lora_A.weight": torch.ones(2)}, "an adapter"),
        ({"layer1.0.conv1.weight": torch.ones(2)}, r"no plain ViT.*layer1.0.conv1.weight"),
        ({"patch_embed.proj.weight": torch.ones(8, 4, 2, 2)}, r"no plain ViT.*\[8, 4, 2, 2\]"),
        (ONE_BLOCK | {"blocks.0.attn.relative_position_bias_table": torch.ones(2)}, "no plain ViT.*BEiT"),
        (ONE_BLOCK | {"encoder.layer.0.attention.attention.relative_position_bias.a": torch.ones(2)}, "BEiT"),
        (ONE_BLOCK | {"blocks.0.attn.rel_pos_h": torch.ones(2)}, r"no plain ViT.*blocks\.0\.attn\.rel_pos_h.*SAM"),
        (ONE_BLOCK | {"blocks_token_only.0.norm1.weight": torch.ones(2)}, "no plain ViT.*CaiT"),
    ],
)
def test_what_is_no_plain_backbone_is_refused_by_what_it_is(state, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ModelSettings(img_size=[56, 56], num_classes=3, patch_size=14, backbone_weights=str(save(tmp_path, state)))


def test_biases_of_dinov3_are_left_out_only_where_they_are_0(tmp_path):
    encoder = made(DINOV3, 16)
    state = facebook_dinov3(encoder.backbone)
    refused(tmp_path, state, "q_bias, which is not 0", DINOV3.removesuffix("_qkvb"), 16)
    zero = {key: torch.zeros_like(t) if key.endswith("qkv.bias") else t for key, t in state.items()}
    report = timm_vit(DINOV3.removesuffix("_qkvb"), (64, 64), 16, weights=save(tmp_path, zero)).report
    assert "blocks.0.attn.q_bias, which is 0" in report.left_out
    unmasked = {key: t for key, t in state.items() if not key.endswith("bias_mask")}
    refused(tmp_path, unmasked, "k_bias, which is not 0", DINOV3, 16)
    spoilt = state | {"blocks.0.attn.qkv.bias_mask": torch.full((144,), float("nan"))}
    refused(tmp_path, spoilt, "bias_mask should be 1 for queries and values", DINOV3, 16)


@pytest.mark.parametrize(
    ("change", "kind"), [(lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"), (torch.Tensor.to_sparse, "sparse_coo")]
)
def test_weights_in_8_bits_or_sparse_are_refused_by_file_and_tensor(change, kind, tmp_path):
    state = dict(timm_vit(DINOV2).backbone.state_dict())
    torch.save(state | {"blocks.1.attn.proj.weight": change(state["blocks.1.attn.proj.weight"])}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=rf"backbone_weights \S+file.pth: blocks.1.attn\S+ is torch.{kind}: save"):
        timm_vit(DINOV2, weights=tmp_path / "file.pth")


@pytest.mark.parametrize("prefix", ["network.encoder.backbone.", "encoder.backbone."])
def test_the_backbone_alone_of_an_eomt_loads(prefix, tmp_path):
    encoder = made(DINOV2, 14)
    assert_loads(encoder, save(tmp_path, {prefix + key: t for key, t in encoder.backbone.state_dict().items()}))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1e-3])
def test_another_layer_norm_eps_is_refused_where_outputs_would_differ(eps, tmp_path):
    state = timm_vit(DINOV2).backbone.state_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "layer_norm_eps": eps}))
    if eps <= 1e-5:
        timm_vit(DINOV2, weights=save(tmp_path, state))
        return
    refused(tmp_path, state, r"layer_norm_eps 0.001.*set model.backbone_kwargs=\{norm_eps: 0.001\}")
    timm_vit(DINOV2, kwargs=TINY | {"norm_eps": eps}, weights=tmp_path)


def test_other_rotary_periods_are_refused(tmp_path):
    state = facebook_dinov3(made(DINOV3, 16).backbone)
    state["rope_embed.periods"] = 2 * state["rope_embed.periods"]
    refused(tmp_path, state, "rope_embed.periods are other periods", DINOV3, 16)


# What config.json says


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_attention_heads": 6}, "has 6 attention heads"),
        ({"hidden_size": 64}, "says hidden_size 64"),
        ({"num_hidden_layers": 12}, "says num_hidden_layers 12"),
        ({"patch_size": 16}, "says patch_size 16"),
        ({"model_type": "dinov3_vit"}, "says model_type dinov3_vit"),
        ({"hidden_act": "quick_gelu"}, "says hidden_act quick_gelu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_contradicts_the_weights_is_an_error(said, message, tmp_path):
    config = {"model_type": "dinov2", "num_attention_heads": 3, "hidden_size": 48} | said
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, timm_vit(DINOV2).backbone.state_dict(), message)


def test_another_models_pixel_statistics_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": PLAIN, "pretrained_cfg": {"tag": "mae"}}))
    refused(tmp_path, timm_vit(MAE, (64, 64), 16).backbone.state_dict(), rf"set model.backbone_name={MAE}", PLAIN, 16)


def test_a_named_set_of_weights_has_its_own_statistics_where_the_file_tells_only_the_model(tmp_path):
    name = "vit_large_patch16_dinov3_qkvb"
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    path = save(tmp_path, timm_vit(name, (64, 64), 16).backbone.state_dict())
    encoder = timm_vit(f"{name}.sat493m", (64, 64), 16, weights=path)
    assert encoder.pixel_mean.flatten().tolist() == pytest.approx([0.43, 0.411, 0.296])


# Which timm model


def shapes_of(name):
    with torch.device("meta"):
        backbone = ViT((224, 224), 14 if "patch14" in name else 16, name, False).backbone
    return {key: list(tensor.shape) for key, tensor in backbone.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("vit_small_patch14_dinov2", "a DINOv2 ViT-S/14 of 12 blocks"),
        ("vit_base_patch14_reg4_dinov2", "a DINOv2 ViT-B/14 of 12 blocks with 4 registers"),
        ("vit_large_patch14_dinov2", "a DINOv2 ViT-L/14 of 24 blocks"),
        ("vit_giant_patch14_reg4_dinov2", "a DINOv2 ViT-g/14 of 40 blocks with 4 registers"),
        ("vit_small_patch16_dinov3_qkvb", "a DINOv3 ViT-S/16 of 12 blocks with 4 registers"),
        ("vit_small_plus_patch16_dinov3", "a DINOv3 ViT-S+/16 of 12 blocks with 4 registers"),
        ("vit_base_patch16_dinov3", "a DINOv3 ViT-B/16 of 12 blocks with 4 registers"),
        ("vit_large_patch16_dinov3_qkvb", "a DINOv3 ViT-L/16 of 24 blocks with 4 registers"),
        ("vit_huge_plus_patch16_dinov3_qkvb", "a DINOv3 ViT-H+/16 of 32 blocks with 4 registers"),
        ("vit_7b_patch16_dinov3", "a DINOv3 ViT-7B/16 of 40 blocks with 4 registers"),
        ("vit_base_patch16_rope_224", "a ViT-B/16 of 12 blocks with rotary positions"),
        ("vit_medium_patch16_reg4_gap_256", "a ViT 512 wide, patch/16 of 12 blocks with 4 registers"),
        ("deit_small_distilled_patch16_224", "a DeiT ViT-S/16 of 12 blocks"),
        ("vit_base_patch16_224", "a ViT-B/16 of 12 blocks"),
        (
            "vit_betwixt_patch16_rope_reg4_gap_256",
            "a ViT 640 wide, patch/16 of 12 blocks with 4 registers and rotary positions",
        ),
        (
            "vit_base_patch16_rope_reg1_gap_256",
            "a ViT-B/16 of 12 blocks with 1 register and rotary positions",
        ),
    ],
)
def test_names_and_shapes_tell_which_timm_model_it_is(name, described):
    shapes = shapes_of(name)
    backbone = recognise(name_tensors(shapes), shapes)
    assert str(backbone) == described
    assert backbone.timm_name == (None if described.startswith("a ViT") else name)


def test_an_mae_is_told_by_its_decoder_and_a_vit_that_nothing_tells_asks_for_a_name(tmp_path):
    shapes = shapes_of("vit_large_patch16_224") | {"decoder_pos_embed": [1, 197, 512]}
    assert recognise(name_tensors(shapes), shapes).timm_name == "vit_large_patch16_224.mae"
    path = str(save(tmp_path, timm_vit(PLAIN, (64, 64), 16).backbone.state_dict()))
    with pytest.raises(ValueError, match=r"do not tell which timm model.*give model.backbone_name"):
        choose_backbone(None, path)
    assert choose_backbone(PLAIN, path) == PLAIN and choose_backbone(None, None) == "vit_large_patch14_reg4_dinov2"


# In ckpt_path


@pytest.mark.parametrize("form", [dict, lambda state: {"model": state}])
def test_a_plain_backbone_in_ckpt_path_is_named_with_the_key_that_takes_it(form, tmp_path):
    torch.save(form(dict(timm_vit(DINOV2).backbone.state_dict())), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"a DINOv2 ViT .* of 3 blocks, a plain backbone.*model.backbone_weights"):
        read_checkpoint(tmp_path / "file.pth")


def test_a_plain_backbone_in_ckpt_path_is_named_without_torch(tmp_path):
    path = save(tmp_path, timm_vit(DINOV2).backbone.state_dict())
    with pytest.raises(ValueError, match=r"a plain backbone.*model.backbone_weights"):
        ModelSettings(img_size=[56, 56], num_classes=3, patch_size=14, ckpt_path=str(path))


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
