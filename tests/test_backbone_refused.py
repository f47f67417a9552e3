"""Plain backbones that are not what they are taken for: each is refused by what it is."""

import json

import pytest
import torch
from backbones import (
    DEIT3,
    DINOV2,
    DINOV3,
    ONE_BLOCK,
    PLAIN,
    REGISTERS,
    TINY,
    assert_loads,
    facebook_dinov3,
    library,
    made,
    refused,
    save,
    timm_vit,
)

from eomt.models.checkpoint import read_checkpoint
from eomt.settings.model import ModelSettings


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
