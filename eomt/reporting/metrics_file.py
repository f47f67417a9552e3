"""`metrics.csv`: a row for each set of metrics that is logged, over all parts of a run."""

import csv
import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from eomt.files import replacing

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """Appends rows to `metrics.csv`, which a run that goes on continues.

    Each row is on its way to the disk when it is logged, so that a killed run loses none. A row that cannot be written
    ends no run: it waits, and is written with a later one.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.file = Path(save_dir) / "metrics.csv"
        self.columns: list[str] = []
        self.waiting: list[dict[str, Any]] = []
        self.failed = False

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
        """Writes a row, and those that could not be written before."""
        self.waiting.append({**metrics, "step": step})
        try:
            self.write()
            self.waiting, self.failed = [], False
        except OSError as error:
            if not self.failed:
                log.warning("%s cannot be written (%s): the run goes on, and its rows wait", self.file, error)
            self.failed = True

    def write(self) -> None:
        """Writes the rows that wait, under a header that has all of their columns."""
        if not self.columns and self.file.is_file():
            with self.file.open(newline="") as content:
                self.columns = csv.DictReader(content).fieldnames or []
        new = sorted({name for row in self.waiting for name in row} - set(self.columns))
        if new:
            self.widen([*self.columns, *new])
        with self.file.open("a", newline="") as content:
            csv.DictWriter(content, self.columns).writerows(self.waiting)

    def widen(self, columns: list[str]) -> None:
        """Writes the file anew with more columns."""
        rows = []
        if self.file.is_file():
            with self.file.open(newline="") as content:
                rows = list(csv.DictReader(content))
        with replacing(self.file) as draft, draft.open("w", newline="") as content:
            writer = csv.DictWriter(content, columns)
            writer.writeheader()
            writer.writerows(rows)
        self.columns = columns
