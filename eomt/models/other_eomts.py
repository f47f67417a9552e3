"""The tensors of other programs' EoMTs, under the published names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eomt.models.backbone_weights import BIASES, combine
from eomt.settings.eomt_files import EomtFile
from eomt.settings.eomt_names import BACKBONE, LIGHTLY

POS_EMBED, REGISTERS = f"{BACKBONE}pos_embed", f"{BACKBONE}reg_token"


def map_eomt(stored: Mapping[str, Tensor], file: EomtFile) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors of a file under the published names less `network.`, and the names of those that make none.

    Args:
        stored: by the file's own names.

    Raises:
        ValueError: tensors that are parts of one do not go together.
    """
    try:
        tensors = combine(file.names.made_of, stored)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    left_out = [*file.names.left_out, *drop_biases(tensors, stored, file)]
    if file.program == LIGHTLY:  # which keeps no probabilities, and predicts without masks
        tensors.setdefault("attn_mask_probs", torch.zeros(file.sizes["num_blocks"]))
    for name in [name for name, tensor in tensors.items() if not tensor.numel()]:  # no registers
        del tensors[name]
    if POS_EMBED in tensors and tensors[POS_EMBED].ndim == 2:  # of patches alone, as an embedding [N, C]
        positions = tensors[POS_EMBED][None]
        # timm's models without registers have a position of the class token, too
        none = positions.new_zeros(1, 0 if REGISTERS in tensors else 1, positions.shape[2])
        tensors[POS_EMBED] = torch.cat((none, positions), dim=1)
    if file.said.pixels:
        for name, values in zip(("mean", "std"), file.said.pixels, strict=True):
            tensors.setdefault(f"encoder.pixel_{name}", torch.tensor(values).reshape(1, -1, 1, 1))
    return tensors, left_out


def drop_biases(tensors: dict[str, Tensor], stored: Mapping[str, Tensor], file: EomtFile) -> list[str]:
    """Takes out biases of keys, which timm's DINOv3 has not, where they are 0 or masked; returns their names."""
    masked = {key.removesuffix("_mask") for key in stored if key.endswith("qkv.bias_mask") and is_usual(stored[key])}
    dropped = []
    for name in [name for name in tensors if BIASES.search(name) and name.endswith("k_bias")]:
        key = file.names.made_of[name][0].key
        if key in masked or not tensors[name].any():
            del tensors[name]
            dropped.append(f"{name}, which is {'masked' if key in masked else '0'}")
    return dropped


def is_usual(mask: Tensor) -> bool:
    """Whether DINOv3's mask of biases leaves those of queries and values, and takes those of keys."""
    q, k, v = mask.chunk(3)
    return bool((q == 1).all() and (k == 0).all() and (v == 1).all())
