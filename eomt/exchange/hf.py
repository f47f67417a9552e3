"""transformers' folders of EoMT: written from a network of ours, once they are known to compute the same."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eomt.exchange.extras import require
from eomt.files import check_room, replacing_files
from eomt.fingerprints import first_misfit
from eomt.models.eomt import EoMT
from eomt.models.vit import ViT
from eomt.settings.eomt_names import HEADS, TRANSFORMERS
from lora_config import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

TOLERANCE = 1e-5  # of the largest logit
RENAMED = {  # in timm's names: transformers'
    "patch_embed.proj.": "embeddings.patch_embeddings.",
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "blocks.": "layers.",
    "norm.": "layernorm.",
    ".ls1.gamma": ".layer_scale1.lambda1",
    ".ls2.gamma": ".layer_scale2.lambda1",
    ".gamma_1": ".layer_scale1.lambda1",
    ".gamma_2": ".layer_scale2.lambda1",
    ".attn.": ".attention.",
}


def write_hf(module: MaskClassificationSemantic, directory: str | Path) -> float:
    """Writes config.json, weights and the image processor of transformers' EoMT.

    `AutoModelForUniversalSegmentation` and the processor's `post_process_semantic_segmentation` then give the class map
    of `predict`. The names of the classes are in `id2label`, their colours in `class_colors`.

    Args:
        module: a whole network, without adapters.

    Returns:
        The largest difference of a logit on random pixels, relative to the largest one.

    Raises:
        ImportError: transformers is not installed. OSError: the disk has no room.
        ValueError: transformers' EoMT cannot be this network; nothing is written.
    """
    require("hf", "--to hf", "transformers")
    check_kind(module)
    with quietly():
        return _write_checked(module, directory)


def _write_checked(module: MaskClassificationSemantic, directory: str | Path) -> float:
    import transformers

    rotary = is_rotary(module.network)
    kind = "EomtDinov3" if rotary else "Eomt"
    if not hasattr(transformers, f"{kind}ForUniversalSegmentation"):
        raise ImportError(f"transformers {transformers.__version__} has no {kind}: pip install -U transformers")
    config = getattr(transformers, f"{kind}Config")(**config_of(module))
    model = getattr(transformers, f"{kind}ForUniversalSegmentation")(config).eval()
    load(model, their_state(module.network))
    difference = compare(module.network, model)
    check_room(directory, sum(tensor.nbytes for tensor in model.state_dict().values()))
    with replacing_files(directory) as draft:
        model.save_pretrained(draft)
        processor_of(module, transformers).save_pretrained(draft)
    return difference


@contextmanager
def quietly() -> Iterator[None]:
    """Without the notes that importing transformers prints where torchao is installed, and without its bars."""
    notes = logging.getLogger("torch.utils._pytree")
    level = notes.level
    notes.setLevel(logging.ERROR)
    try:
        from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

        had_bars = is_progress_bar_enabled()
        disable_progress_bar()
        yield
        if had_bars:
            enable_progress_bar()
    finally:
        notes.setLevel(level)


def is_rotary(network: EoMT) -> bool:
    """Whether the backbone is timm's of DINOv3."""
    return getattr(network.encoder.backbone, "pos_embed", None) is None


def is_gated(network: EoMT) -> bool:
    """Whether the MLPs have a gate (SwiGLU)."""
    mlp = network.encoder.blocks[0].mlp
    return hasattr(mlp, "fc1_g") or mlp.fc1.out_features == 2 * mlp.fc2.in_features


def check_kind(module: MaskClassificationSemantic) -> None:
    """Raises ValueError where transformers' EoMT has no such network, saying what it lacks."""
    network = module.network
    if not isinstance(network.encoder, ViT):
        raise ValueError(f"--to hf is for timm's backbones, and the encoder is a {type(network.encoder).__name__}")
    height, width = network.encoder.img_size
    reason = None
    if height != width:
        reason = f"is for square images alone, and img_size is [{height}, {width}]: train or open it with a square one"
    elif not isinstance(network.class_head, nn.Linear):
        reason = "has a linear class head, and this one is of cosines (head: arcface)"
    elif is_rotary(network) and is_gated(network):
        reason = "computes one activation in gated MLPs and heads, and DINOv3's gates have another one than the heads"
    elif network.encoder.num_prefix_tokens - registers(network) != 1:
        reason = "has one class token before its registers, and this backbone has another number"
    if reason:
        raise ValueError(f"transformers' EoMT {reason}; --to onnx writes any network")


def registers(network: EoMT) -> int:
    """How many register tokens the backbone has."""
    tokens = getattr(network.encoder.backbone, "reg_token", None)
    return 0 if tokens is None else tokens.shape[1]


def config_of(module: MaskClassificationSemantic) -> dict[str, Any]:
    """The entries of transformers' configuration."""
    network, encoder = module.network, module.network.encoder
    inner = encoder.blocks[0].mlp.fc2.in_features
    names = module.class_names
    config = {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.blocks[0].attn.num_heads,
        "layer_norm_eps": encoder.norm.eps,
        "image_size": encoder.img_size[0],
        "patch_size": encoder.patch_size,
        "num_upscale_blocks": len(network.upscale),
        "num_blocks": network.num_blocks,
        "num_queries": network.num_q,
        "num_register_tokens": registers(network),
        "id2label": dict(enumerate(names)),
        "label2id": {name: k for k, name in enumerate(names)},
    }
    if module.hparams.class_colors:
        config["class_colors"] = [list(color) for color in module.hparams.class_colors]
    if is_rotary(network):
        biased = encoder.blocks[0].attn.q_bias is not None
        return config | {"intermediate_size": inner, "query_bias": biased, "value_bias": biased, "key_bias": False}
    # of a gated MLP, transformers takes two thirds of the width, rounded up to 8
    return config | {
        "use_swiglu_ffn": is_gated(network),
        "mlp_ratio": math.ceil(inner * 1.5 / encoder.embed_dim) if is_gated(network) else inner // encoder.embed_dim,
    }


def their_state(network: EoMT) -> dict[str, Tensor]:
    """The network's tensors under transformers' names.

    The probabilities of attention masks are 0: transformers would apply masks that have not faded, and what is
    deployed has none.
    """
    own = {key: tensor.detach().float() for key, tensor in network.state_dict().items()}
    state = {their_head(key): tensor for key, tensor in own.items() if not key.startswith("encoder.")}
    state["attn_mask_probs"] = torch.zeros_like(own["attn_mask_probs"])
    return state | their_backbone(network.encoder, is_rotary(network), is_gated(network))


def their_head(key: str) -> str:
    """transformers' name for a tensor outside the backbone."""
    for theirs, ours in HEADS[TRANSFORMERS].items():
        if key.startswith(ours):
            key = theirs + key.removeprefix(ours)
    return key.replace(".norm.", ".layernorm2d.") if key.startswith("upscale") else key


def their_backbone(encoder: ViT, rotary: bool, gated: bool) -> dict[str, Tensor]:
    """timm's tensors under transformers' names: q, k and v, gate and up apart, positions of patches alone."""
    own = {key: tensor.detach().float() for key, tensor in encoder.backbone.state_dict().items()}
    scales = [f"layers.{i}.layer_scale{k}.lambda1" for i in range(len(encoder.blocks)) for k in (1, 2)]
    state = {name: torch.ones(encoder.embed_dim) for name in scales}  # of a ViT without
    own.setdefault("reg_token", torch.zeros(1, 0, encoder.embed_dim))
    if not rotary:
        positions, patches = own.pop("pos_embed"), math.prod(encoder.grid_size)
        state["embeddings.position_embeddings.weight"] = positions[0, -patches:]
        if positions.shape[1] > patches:  # those of the class token and registers are added to them
            own["cls_token"] = own["cls_token"] + positions[:, :1]
            own["reg_token"] = own["reg_token"] + positions[:, 1:-patches]
    for key, tensor in own.items():
        name = their_name(key, rotary, gated)
        if ".qkv." in name:
            state |= {name.replace("qkv", f"{p}_proj"): part for p, part in zip("qkv", tensor.chunk(3), strict=True)}
        elif gated and ".fc1." in name:
            state |= {
                name.replace("fc1", n): part for n, part in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            }
        else:
            state[name] = tensor
    return state


def their_name(key: str, rotary: bool, gated: bool) -> str:
    """transformers' name for a tensor of timm's backbone; q, k and v still are one."""
    for timms, theirs in RENAMED.items():
        if timms.startswith(".") or key.startswith(timms):
            key = key.replace(timms, theirs, 1)
    key = key.replace(".attention.proj.", ".attention.o_proj." if rotary else ".attention.out_proj.")
    key = re.sub(r"\.([qkv])_bias$", r".\1_proj.bias", key)
    if rotary:
        return key.replace(".mlp.fc1.", ".mlp.up_proj.").replace(".mlp.fc2.", ".mlp.down_proj.")
    key = key.replace(".mlp.fc2.", ".mlp.down_proj.") if gated else key
    return key.replace("embeddings.patch_embeddings.", "embeddings.patch_embeddings.projection.")


def load(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Loads every tensor; ValueError naming those that one of the two networks alone has."""
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("criterion.")}
    misfit = first_misfit(state, own)
    if wrong := sorted(own.keys() ^ state.keys()):
        misfit = f"lacks or has more: {listed(wrong)}"
    if misfit:
        raise ValueError(f"transformers' EoMT cannot be this network, whose backbone {misfit}; --to onnx writes any")
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def compare(network: EoMT, model: PreTrainedModel) -> float:
    """The largest difference of a logit on random pixels, relative to the largest one; ValueError above `TOLERANCE`."""
    encoder = network.encoder
    images = torch.rand(1, 3, *encoder.img_size, generator=torch.Generator().manual_seed(0))
    with network.deployed():
        (masks,), (classes,) = network(images)
    found = model((images - encoder.pixel_mean) / encoder.pixel_std)
    pairs = ((masks, found.masks_queries_logits), (classes, found.class_queries_logits))
    difference = max(((ours - theirs).abs().max() / ours.abs().max()).item() for ours, theirs in pairs)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"transformers' EoMT with these weights has logits that differ by {difference:.1e} of the largest, more "
            f"than {TOLERANCE:g}: this backbone computes something that it has not, and nothing was written"
        )
    return difference


def processor_of(module: MaskClassificationSemantic, transformers: Any) -> Any:
    """The image processor: windows of the network's size, as in evaluation, resized by Pillow, as there."""
    encoder = module.network.encoder
    kind = getattr(transformers, "EomtImageProcessorPil", transformers.EomtImageProcessor)
    return kind(
        size={"shortest_edge": encoder.img_size[0], "longest_edge": None},
        do_split_image=True,
        do_pad=False,
        image_mean=encoder.pixel_mean.flatten().tolist(),
        image_std=encoder.pixel_std.flatten().tolist(),
    )
