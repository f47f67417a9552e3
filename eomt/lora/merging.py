"""An adapter's base in fewer bytes while it trains, and the adapter added to its base afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from eomt.fingerprints import tensor_hashes
from eomt.lora.files import adapter_in_use
from eomt.lora.quantised import dequantise_base
from lora_config import adapted_layers, listed

if TYPE_CHECKING:
    from peft import PeftModel


def cast_base(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts the frozen linear layers and convolutions: fewer bytes, and what autocast to `dtype` computes anyway.

    The module still belongs to the base it was loaded with; `lora_audit` expects the converted weights from here on.

    Raises:
        ValueError: the base was changed after the adapters were applied.
    """
    if tensor_hashes(module) != module.lora_base.hashes:
        raise ValueError("base weights changed after the adapters were applied; load weights before apply_lora")
    for layer in module.modules():
        weights = list(layer.parameters(recurse=False))
        if isinstance(layer, nn.Linear | nn.Conv2d) and not any(p.requires_grad for p in weights):
            layer.to(dtype)
    module.lora_cast_hashes = tensor_hashes(module)


def merge(handle: PeftModel) -> nn.Module:
    """Adds the updates to the base weights, in float32, and returns the plain module with its original keys.

    A base in 8 or 4 bits is decoded first: the result is the network that was trained and scored.

    The whole module becomes float32, since rounding a small update into bfloat16 weights loses part of it; cast it
    down afterwards if that loss is acceptable. The parameters stay frozen. Of several adapters, the one in use is
    merged and the others are lost.

    Raises:
        ValueError: no adapter is in use, the base was rounded by `cast_base`, or a weight cannot take its update.
    """
    adapter_in_use(handle)
    dequantise_base(handle.base_model.model)
    if hasattr(handle.base_model.model, "lora_cast_hashes"):
        raise ValueError(
            "the base was rounded to bfloat16 for training: load the saved adapter on its base, and merge that"
        )
    check_weights(handle.base_model.model)
    module = handle.float().base_model.merge_and_unload(safe_merge=True)
    for name in ("lora_base", "lora_settings", "lora_also", "lora_loaded", "adapter_method"):
        vars(module).pop(name, None)
    return module


def check_weights(module: nn.Module) -> None:
    """Raises ValueError where an adapted layer's weight is computed anew in each pass, or belongs to others, too."""
    owners: dict[int, list[str]] = {}
    for name, part in module.named_modules():
        for p in part.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name.removesuffix(".base_layer"))
    for name, layer in adapted_layers(module).items():
        weight = dict(layer.base_layer.named_parameters(recurse=False)).get("weight")
        if weight is None:
            raise ValueError(
                f"{name} computes its weight anew in each pass (as weight norm does), so the update would be lost: "
                "remove that from the base before adapting"
            )
        if others := [other for other in owners[id(weight)] if other != name]:
            raise ValueError(
                f"the weight of {name} is that of {listed(others)}, too, which the update would change as well: untie "
                "them before adapting, or leave the adapter unmerged"
            )
