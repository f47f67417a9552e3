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


class MovableCheckpoint(ModelCheckpoint):
    """Lightning's, which also knows its best score where a run goes on in a folder that was moved or copied."""

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__name__, "ModelCheckpoint", 1)  # as in earlier checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the scores over if the best checkpoint is in this folder; otherwise the next is the best there."""

        def here(path: str) -> str:
            return path and str(Path(self.dirpath or "", Path(path).name))

        if Path(here(state_dict["best_model_path"])).is_file():
            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            moved = {name: here(state_dict[name]) for name in paths if name in state_dict}
            models = {here(path): score for path, score in state_dict.get("best_k_models", {}).items()}
            state_dict = {**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)


class BestCheckpoint(MovableCheckpoint):
    """The same, of the weights that were scored or of none.

    Lightning's averages put what they score into a checkpoint. Another callback that swaps weights has put the trained
    ones back by then: a checkpoint of them would bear a score that is not theirs.
    """

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
