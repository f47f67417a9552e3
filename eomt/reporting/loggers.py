"""Loggers of which a line that cannot be written does not end a run."""

import csv
import math
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from eomt.files import Tolerated, replacing

LONGEST = 200  # letters of a folder that is called by a job; file systems take 255 bytes


class MetricsFile(Logger):
    """`metrics.csv`, a row for each set of metrics, over all parts of a run; rows that cannot be written wait.

    Each row is written when it is logged, so that a killed run loses none.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.file = Path(save_dir) / "metrics.csv"
        self.waiting: list[dict[str, Any]] = []
        self.tolerated = Tolerated(self.file.name)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: they stand in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # else left empty
        self.waiting.append({**known, "step": step})
        self.save()

    @rank_zero_only
    def save(self) -> None:
        with self.tolerated:
            append_rows(self.file, self.waiting)
            self.waiting = []


class EventFile(TensorBoardLogger):
    """TensorBoard's events; after an error, of which the first is warned, they go on in a new file.

    Args:
        job: what tells the run from others of its group, by which TensorBoard then calls it.
        args, options: see `TensorBoardLogger`.
    """

    def __init__(self, *args: Any, job: str | None = None, **options: Any) -> None:
        if job:
            options["version"] = job.replace(os.sep, "_")[:LONGEST]
        super().__init__(*args, **options)
        self.tolerated = Tolerated("tensorboard/")

    @property
    def experiment(self) -> Any:
        """What writes; None as long as it cannot be opened."""
        with self.tolerated:
            return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Raises ValueError for a value that cannot be logged."""
        with self.tolerated:
            try:
                if self.experiment is not None:
                    super().log_metrics(metrics, step)
            except ValueError as error:  # Lightning takes any error for a value that cannot be logged
                if not isinstance(error.__cause__, OSError):
                    raise
                self._experiment = None  # its thread has ended
                raise error.__cause__ from None

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        with self.tolerated:
            if self.experiment is not None:
                super().log_hyperparams(*args, **options)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[str], step: int | None = None) -> None:
        """Shows picture files under a name, as Lightning's logger for wandb does."""
        with self.tolerated:
            if self.experiment is not None:
                for path in images:
                    pixels = np.asarray(Image.open(path).convert("RGB"))
                    self.experiment.add_image(key, pixels, step, dataformats="HWC")

    def save(self) -> None:
        with self.tolerated:
            if self.experiment is not None:
                super().save()

    def finalize(self, status: str) -> None:
        with self.tolerated:
            if self.experiment is not None:
                super().finalize(status)


def finish_loggers(loggers: Sequence[Logger], ended_well: bool = True) -> None:
    """Ends what a logger keeps open beyond the fit, so that the next run of this process begins one of its own."""
    for logger in loggers:
        getattr(logger, "finish", lambda ended_well: None)(ended_well)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a CSV file, all of them or none; where they have a new column the file is written anew."""
    if not rows:
        return
    columns, earlier = [], []
    if path.is_file():
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
    wanted = sorted(set(columns).union(*rows))
    if wanted == columns:
        size = path.stat().st_size
        try:
            write_rows(path, "a", columns, rows)
        except OSError:
            os.truncate(path, size)  # a part of a line
            raise
        return
    if columns:
        with path.open(newline="") as file:
            earlier = list(csv.DictReader(file))
    with replacing(path) as draft:
        write_rows(draft, "w", wanted, [*earlier, *rows])


def write_rows(path: Path, mode: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes or appends rows of these columns; a new file begins with their names."""
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, columns)
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)
