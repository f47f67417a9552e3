"""Fingerprints: SHA-256 of tensors, and of a module's weights as they were before adapters."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


# what the names of adapter parameters begin with in PEFT, by method: LoRA, IA3, LoHa, LoKr, OFT, BOFT, VeRA, HRA
ADAPTER_PREFIXES = ("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "hra_")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(part.startswith(ADAPTER_PREFIXES) for part in name.split("."))


def tensor_hashes(module: nn.Module) -> dict[str, str]:
    """SHA-256 of each base tensor (parameters and persistent buffers), by its name before adaptation."""
    return hash_tensors(base_tensors(module))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of the base tensors: the same before and after adaptation."""
    return combine_hashes(tensor_hashes(module))


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over those of tensors, by name."""
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers but the adapters, under their names before adaptation."""
    from torch import Tensor

    state = module.state_dict(keep_vars=True)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not is_adapter(name)
    }


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 over type, shape and bytes of each tensor, by its name."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter lock
        return dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))


def _hash(tensor: Tensor) -> str:
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.is_meta:  # no bytes there
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
