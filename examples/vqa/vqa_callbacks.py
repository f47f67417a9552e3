"""What watches a run: its checkpoints, the audit, its time, an end where losses are no numbers, samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from vqa_data import Collate, Questions
from vqa_module import VQAModule
from vqa_report import Samples
from vqa_settings import Settings

from eomt.files import read_pickle
from eomt.training.audit_callback import AuditAdapters
from eomt.training.checkpoint_files import MovableCheckpoint
from eomt.training.finite_steps import FiniteSteps

LIMIT = 3  # steps in a row without a finite loss, which end a run
MONITOR = "val/loss"


class Clock(Callback):
    """Seconds of training and validation, by the clock and of this process on its processors, in all parts of a run."""

    def __init__(self) -> None:
        self.earlier = (0.0, 0.0)
        self.started = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        """Both, from an arbitrary start."""
        return time.monotonic(), time.process_time()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.started = self.now()

    def spent(self) -> tuple[float, float]:
        """Both, so far; of earlier parts up to their last checkpoint."""
        wall, cpu = self.now()
        return self.earlier[0] + wall - self.started[0], self.earlier[1] + cpu - self.started[1]

    def state_dict(self) -> dict[str, float]:
        return dict(zip(("seconds", "cpu_seconds"), self.spent(), strict=True))

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.earlier = (state_dict["seconds"], state_dict["cpu_seconds"])

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.earlier, self.started = self.spent(), self.now()


def make_callbacks(settings: Settings, folder: Path, val_set: Questions, collate: Collate) -> list[Callback]:
    """Checkpoints, the audit, an end where losses are no numbers; early stopping and samples where asked for."""
    place = folder / "checkpoints"
    always = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    last = MovableCheckpoint(place, filename="last", **always)
    callbacks = [last, AuditAdapters(), FiniteSteps(folder, LIMIT, "--lr", "--precision"), Clock()]
    if settings.early_stopping:
        callbacks.append(MovableCheckpoint(place, filename="best", monitor=MONITOR, **always))
        callbacks.append(EarlyStopping(MONITOR, patience=settings.early_stopping_patience))
    if settings.sample_every:
        callbacks.append(Samples(val_set, collate, folder / "samples", settings.sample_every))
    return callbacks


def keep_best(module: VQAModule, callbacks: Sequence[Callback]) -> str:
    """Puts the best epoch's weights in place; says which it is."""
    best = next(one for one in callbacks if isinstance(one, MovableCheckpoint) and one.monitor)
    content = read_pickle(Path(best.best_model_path))
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    return f"epoch {content['epoch'] + 1}, of the lowest {MONITOR}"


def audited(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """The results of the audit; none without adapters."""
    audit = next(one for one in callbacks if isinstance(one, AuditAdapters)).audit
    return audit.results if audit else {}


def spent(callbacks: Sequence[Callback]) -> dict[str, float]:
    """`seconds` and `cpu_seconds` of the run."""
    return next(one for one in callbacks if isinstance(one, Clock)).state_dict()
