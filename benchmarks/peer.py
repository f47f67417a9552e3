"""transformers' EoMT, an independent implementation, and its weights under our names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eomt.models.eomt import EoMT
from eomt.models.vit import ViT

NAMES = {
    "query.weight": "q.weight",
    "class_predictor.": "class_head.",
    "mask_head.fc1.": "mask_head.0.",
    "mask_head.fc2.": "mask_head.2.",
    "mask_head.fc3.": "mask_head.4.",
    "upscale_block.block.": "upscale.",
    ".layernorm2d.": ".norm.",
    "embeddings.cls_token": "encoder.backbone.cls_token",
    "embeddings.register_tokens": "encoder.backbone.reg_token",
    "embeddings.patch_embeddings.projection.": "encoder.backbone.patch_embed.proj.",
    "embeddings.position_embeddings.weight": "encoder.backbone.pos_embed",
    "layernorm.": "encoder.backbone.norm.",
    ".attention.out_proj.": ".attn.proj.",
    ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma",
    "layers.": "encoder.backbone.blocks.",
}
PUBLISHED_DINOV3 = {  # how transformers' names begin: how those of the published code do
    "query.": "q.",
    "class_predictor.": "class_head.",
    "mask_head.fc1.": "mask_head.0.",
    "mask_head.fc2.": "mask_head.2.",
    "mask_head.fc3.": "mask_head.4.",
    "upscale_block.block.": "upscale.",
    "attn_mask_probs": "attn_mask_probs",
    "layernorm.": "encoder.backbone.norm.",
    "layers.": "encoder.backbone.blocks.",
    "embeddings.cls_token": "encoder.backbone.patch_embed.cls_token",
    "embeddings.register_tokens": "encoder.backbone.patch_embed.register_tokens",
    "embeddings.patch_embeddings.": "encoder.backbone.patch_embed.patch_embeddings.",
}
SIZES = {  # width, depth, heads, and timm's name
    "small": (384, 12, 6, "vit_small_patch14_reg4_dinov2"),
    "base": (768, 12, 12, "vit_base_patch14_reg4_dinov2"),
    "large": (1024, 24, 16, "vit_large_patch14_reg4_dinov2"),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def peer_network(
    width: int, depth: int, heads: int, img_size: int, classes: int, queries: int, blocks: int, **options: Any
) -> nn.Module:
    """`EomtForUniversalSegmentation` with a DINOv2 backbone of this shape, random weights, patches of 16."""
    import transformers

    config = transformers.EomtConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=img_size,
        patch_size=16,
        num_upscale_blocks=2,
        num_queries=queries,
        num_blocks=blocks,
        num_register_tokens=4,
        num_labels=classes,
        **options,
    )
    return transformers.EomtForUniversalSegmentation(config)


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict as ours: names replaced, query, key and value in one layer, the loss's own state left out."""
    ours = {}
    for key, tensor in state.items():
        if key.startswith("criterion.") or ".attention.k_proj." in key or ".attention.v_proj." in key:
            continue
        if ".attention.q_proj." in key:
            tensor = torch.cat([state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"])
            key = key.replace("attention.q_proj", "attn.qkv")
        for theirs, our in NAMES.items():
            if theirs[0] == ".":
                key = key.replace(theirs, our)
            elif key.startswith(theirs):
                key = our + key.removeprefix(theirs)
        ours[key] = tensor[None] if key.endswith("pos_embed") else tensor
    return ours


def published_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors of an EoMT on DINOv3 under the names of the published code."""
    published = {}
    for key, tensor in state.items():
        for begins, ours in PUBLISHED_DINOV3.items():
            if key.startswith(begins):
                published["network." + (ours + key.removeprefix(begins)).replace(".layernorm2d.", ".norm.")] = tensor
    return published


def our_network(
    name: str, img_size: Sequence[int], classes: int, queries: int, blocks: int, kwargs: Mapping[str, Any] | None = None
) -> EoMT:
    """The same network of ours, random weights."""
    return EoMT(ViT(img_size, 16, name, False, kwargs), classes, queries, blocks)


def normalized(images: Tensor) -> Tensor:
    """Images in [0, 1] as the peer expects them; ours does so by itself."""
    return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]


def dense_masks(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Label maps uint8 [B, H, W] as the peer takes them: for each image a mask per class, and the classes."""
    classes = [image.unique() for image in labels]
    classes = [present[present != 255].long() for present in classes]
    return [(image == present[:, None, None]).float() for image, present in zip(labels, classes, strict=True)], classes
