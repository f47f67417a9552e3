"""Checkpoints that are written beside their place and renamed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from eomt.files import check_room, replacing
from eomt.fingerprints import checksums


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


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, of the weights that were scored or of none.

    Lightning's averages put what they score into a checkpoint. Another callback that swaps weights has put the trained
    ones back by then: a checkpoint of them would bear a score that is not theirs.
    """

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__name__, "ModelCheckpoint", 1)  # as in earlier checkpoints

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether a checkpoint with this score is to be written now."""
        if not super().check_monitor_top_k(trainer, current):
            return False
        averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
        if averaged or checksums(trainer.lightning_module) == trainer.lightning_module.scored:
            return True
        rank_zero_warn(
            f"{self.dirpath}/{self.filename}.ckpt is not written: the weights are not those that were scored, which "
            "the run's artefact has"
        )
        return False


def tensor_bytes(content: Any) -> int:
    """The bytes of all tensors in nested mappings and sequences."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, Mapping) else content if isinstance(content, (list, tuple)) else ()
    return sum(map(tensor_bytes, parts))
