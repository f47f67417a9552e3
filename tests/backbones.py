"""Plain backbones as others keep them, and what loads them."""

import pytest
import torch
from safetensors.torch import save_file

from eomt.models.vit import ViT

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3}
DINOV2, REGISTERS, GIANT = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"
DINOV3, GATED = "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"
MAE, PLAIN, DEIT = "vit_base_patch16_224.mae", "vit_base_patch16_224", "deit_tiny_distilled_patch16_224"
DEIT3, ABSOLUTE = "deit3_small_patch16_224", "vit_small_patch16_rope_ape_224"
ROPE = "vit_small_patch16_rope_224"
ONE_BLOCK = {"patch_embed.proj.weight": torch.ones(8, 3, 2, 2), "blocks.0.attn.qkv.weight": torch.ones(24, 8)}
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


NAMES = [DINOV2, REGISTERS, GIANT, DINOV3, GATED, MAE, PLAIN, DEIT]


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


def refused(tmp_path, state, message, name=DINOV2, patch=14, kwargs=TINY):
    with pytest.raises(ValueError, match=message) as error:
        timm_vit(name, (4 * patch, 4 * patch), patch, kwargs, weights=save(tmp_path, state))
    assert "\n" not in str(error.value)
