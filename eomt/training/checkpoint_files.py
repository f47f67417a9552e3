"""Checkpoints that are written beside their place and renamed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from eomt.files import check_room, replacing


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint as a whole or not at all, on the disk where it is to stay.

    Lightning's own goes through the folder for temporary files, and is copied where that is on another disk: a run that
    is killed meanwhile has neither the earlier checkpoint nor the new one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("a checkpoint is a local file: storage_options mean nothing to it")
        check_room(path, tensor_bytes(checkpoint))
        with replacing(path, alone=True) as draft:
            torch.save(checkpoint, draft)


def tensor_bytes(content: Any) -> int:
    """The bytes of all tensors in nested mappings and sequences."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, Mapping) else content if isinstance(content, (list, tuple)) else ()
    return sum(map(tensor_bytes, parts))
