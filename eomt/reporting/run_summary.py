"""`summary.json`: what a run was, what it cost, and what came out."""

import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "torchvision", "lightning", "timm", "peft", "hydra-core", "torchmetrics", "safetensors", "numpy")


class StepClock(Callback):
    """Seconds of every training step: waiting for data, and computing."""

    def __init__(self) -> None:
        self.data: list[float] = []
        self.compute: list[float] = []
        self.mark: float | None = None
        self.batches_per_step = 1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.batches_per_step = trainer.accumulate_grad_batches
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.mark = None  # starting loader processes is no step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        now = time.perf_counter()
        if self.mark is not None:
            self.data.append(now - self.mark)
        self.mark = now

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.compute.append(now - self.mark)
        self.mark = now

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.mark = None  # nor is validation

    def summary(self) -> dict[str, float]:
        """Medians, times the batches that an optimiser step accumulates; `total` is their sum."""
        data, compute = (
            self.batches_per_step * statistics.median(values) if values else 0.0 for values in (self.data, self.compute)
        )
        return {"total": data + compute, "data": data, "compute": compute}


def peak_memory() -> dict[str, Any]:
    """The most memory used so far: what torch allocated on the GPU, otherwise this process's resident set."""
    if torch.cuda.is_available():
        return {"bytes": torch.cuda.max_memory_allocated(), "of": "torch allocations on the GPU"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "resident set of the process"}


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def git_commit() -> str | None:
    """The commit of the code that runs, with "-dirty" where it was changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpus": gpus}


def file_sizes(directory: str | Path) -> dict[str, int]:
    """Bytes of every file below the folder."""
    directory = Path(directory)
    return {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}


def write_summary(path: str | Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes facts about a run, completed by those about machine and code, and returns them all."""
    summary = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "versions": library_versions(),
        "git_commit": git_commit(),
        "machine": machine(),
        "command": sys.argv,
    }
    Path(path).write_text(json.dumps(summary, indent=2) + "\n")
    return summary
