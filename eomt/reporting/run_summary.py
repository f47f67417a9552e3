"""`summary.json`: what a run was, what it cost, and what came out."""

import hashlib
import importlib.metadata
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from eomt.cost.flops import flop_counter
from eomt.files import write_json
from eomt.fingerprints import Identity, sums
from eomt.settings.formats import SUMMARY, stamped

CHECKOUT = Path(__file__).resolve().parents[2]
RECENT = 1000  # steps that a median is taken of
LIBRARIES = ("torch", "torchvision", "lightning", "timm", "peft", "hydra-core", "torchmetrics", "safetensors", "numpy")


class StepClock(Callback):
    """Seconds of every optimiser step: waiting for its batches, and computing."""

    def __init__(self) -> None:
        self.data: deque[float] = deque(maxlen=RECENT)
        self.compute: deque[float] = deque(maxlen=RECENT)
        self.mark: float | None = None
        self.step = [0.0, 0.0]  # of this optimiser step so far: waiting, computing
        self.steps_done = 0
        self.memory_before = resident_set()  # bytes, with everything there but what training adds
        self.started = time.time()
        self.parts = 1  # a resumed run has more

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.steps_done = trainer.global_step
        self.memory_before = resident_set()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.mark = None  # starting loader processes is no step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        now = time.perf_counter()
        if self.mark is not None:
            self.step[0] += now - self.mark
        self.mark = now

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.step[1] += now - self.mark
        self.mark = now
        if trainer.global_step > self.steps_done:  # not after each accumulated batch
            self.data.append(self.step[0])
            self.compute.append(self.step[1])
            self.step, self.steps_done = [0.0, 0.0], trainer.global_step

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.mark = None  # nor is validation

    def elapsed(self) -> float:
        """Seconds since the run began; if it was resumed, those of its earlier parts up to their checkpoints, too."""
        return time.time() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {
            "elapsed": self.elapsed(),
            "data": list(self.data),
            "compute": list(self.compute),
            "parts": self.parts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started -= state["elapsed"]
        self.data.extend(state["data"])
        self.compute.extend(state["compute"])
        self.parts += state.get("parts", 1)  # which earlier versions did not count

    def summary(self) -> dict[str, float]:
        """Medians over optimiser steps; `total` is their sum."""
        data, compute = (statistics.median(values) if values else 0.0 for values in (self.data, self.compute))
        return {"total": data + compute, "data": data, "compute": compute}


class CountFlops(Callback):
    """Counts the floating-point operations of one training step: its matrix products, convolutions and attention.

    `flops` is per process and optimiser step; None for a compiled network, where they cannot be seen.
    """

    flops: int | None = None
    counter: FlopCounterMode | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if self.flops is None and not module.hparams.compile:
            self.counter = flop_counter()
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.flops = self.counter.get_total_flops() * trainer.accumulate_grad_batches
            self.counter = None

    def on_exception(self, *args: Any) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)

    def state_dict(self) -> dict[str, int | None]:
        return {"flops": self.flops}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        self.flops = state["flops"]


class HashBatches(Callback):
    """Identifies the first training batches: proof that two runs saw the same crops in the same order.

    Resizing rounds differently on other processors, so that labels alone are compared bit for bit between machines, and
    the means of each image's channels within rounding.

    Args:
        num_batches: how many; a resumed run keeps those it began with.
    """

    def __init__(self, num_batches: int = 20) -> None:
        self.num_batches = num_batches
        self.seen = 0
        self.hash = self.labels = ""
        self.means: list[float] = []

    @property
    def identity(self) -> Identity | None:
        """The batches' identity; None before the first one."""
        means = torch.tensor(self.means)
        contents = {"images": (tuple(means.shape), sums(means))}
        return Identity(self.hash, self.labels or None, contents) if self.hash else None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.seen < self.num_batches:
            self.seen += 1
            self.hash = _add(self.hash, batch)
            if self.seen > 1 and not self.labels:
                return  # the first batches were seen by an earlier version, which kept the hash alone
            self.labels = _add(self.labels, batch[1:])
            channels = batch[0].reshape(*batch[0].shape[:2], -1)
            self.means += (channels.sum(-1, dtype=torch.double) / channels.shape[-1]).flatten().tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "hash": self.hash, "labels": self.labels, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _add(digest: str, tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 over an earlier one and the bytes of tensors."""
    total = hashlib.sha256(digest.encode())
    for tensor in tensors:
        total.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def peak_memory(before_training: int) -> dict[str, Any]:
    """The most memory used so far: what torch allocated on the GPU, otherwise this process's resident set.

    Args:
        before_training: the resident set then, in bytes; libraries are most of it.
    """
    if torch.cuda.is_available():
        return {"bytes": torch.cuda.max_memory_allocated(), "of": "torch allocations on the GPU"}
    return {
        "bytes": peak_resident_set(),
        "of": "resident set of the process",
        "before_training": before_training,
    }


def resident_set() -> int:
    """Bytes of this process in memory; where the system has no /proc to ask, the most there have been so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_set()


def peak_resident_set() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def library_versions() -> dict[str, str]:
    """The versions of Python and of those libraries that are installed: benchmarks run where some are missing."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit(checkout: Path = CHECKOUT) -> str | None:
    """The commit of the code that runs, with "-dirty" where it was changed; None outside a checkout."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Describes what computes here: system, name, instructions and threads of the processor, GPUs."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def processor() -> str | None:
    """The name of the CPU; None where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or None


def file_sizes(directory: str | Path) -> dict[str, int]:
    """Bytes of every file below the folder."""
    directory = Path(directory)
    return {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}


def provenance(seeds: Sequence[int]) -> dict[str, Any]:
    """Says where figures come from that others will read: command line, commit, machine, versions and seeds.

    To be asked for before anything is written into the checkout, which would not be clean any more.
    """
    script = Path(sys.argv[0])
    inside = script.is_absolute() and script.is_relative_to(CHECKOUT)
    words = ["python", str(script.relative_to(CHECKOUT) if inside else script), *sys.argv[1:]]
    facts = {"commands": [shlex.join(words)], "git_commit": git_commit(), "machine": machine()}
    return facts | {"versions": library_versions(), "seeds": list(seeds)}


def write_summary(path: str | Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes facts about a run, completed by those about machine and code, and returns them all."""
    summary = stamped(SUMMARY, facts) | {
        "versions": library_versions(),
        "git_commit": git_commit(),
        "machine": machine(),
        "command": sys.argv,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(path, summary)
    return summary
