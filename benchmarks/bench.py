"""What the benchmarks share: two sides of one piece of work, timed in turns, weighed each in a process of its own."""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eomt.cost.flops import flop_counter
from eomt.reporting.run_summary import provenance

ROOT = Path(__file__).resolve().parents[1]
Work = Callable[[], Any]  # one round of a side's work; what it returns is compared with the other side's
Build = Callable[[str], Work]  # a device's name -> the work, with everything prepared that is not to be timed


@dataclass
class Case:
    """One comparison.

    Args:
        name: short and unique, `step.full`: what `--only` and the child processes call it.
        what: what is measured, with its sizes; the table's first column.
        peer, ours: names of the two sides.
        build_peer, build_ours: prepare a side.
        check: raises where the two sides' first results differ; returns in words what was compared.
        time_target: the ratio ours / peer that is aimed at; None: not a target.
        memory_target: the same for peak memory; None: memory is not measured.
        speed_target: instead of `time_target`: how many times as fast.
        rounds: how often each side is timed.
        floor: seconds that this work cannot avoid, asked for after it was timed, where FLOPs do not rule.
        memory_from: what is taken off peak memory: "imports" (libraries), or "state" (weights, gradients and
            optimiser state, too, so that activations remain).
        devices: where it can run.
        absolute_seconds: a target for ours alone.
    """

    name: str
    what: str
    peer: str
    build_peer: Build
    build_ours: Build
    check: Callable[[Any, Any], str]
    ours: str = "ours"
    time_target: float | None = None
    memory_target: float | None = None
    speed_target: float | None = None
    rounds: int = 5
    floor: Callable[[], float] | None = None
    memory_from: str = "imports"
    devices: Sequence[str] = ("cpu", "cuda")
    absolute_seconds: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """One line of the table."""

    what: str
    peer: str
    ours: str
    ratio: float | None
    target: str
    met: bool | None
    floor: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def run_case(case: Case, device: str) -> list[Row]:
    """Checks both sides against each other, times them in turns, weighs each in its own process."""
    works = {"peer": case.build_peer(device), "ours": case.build_ours(device)}
    flops, results = {}, {}
    for side, work in works.items():
        torch.manual_seed(0)
        with flop_counter() as counter:
            results[side] = work()
        flops[side] = counter.get_total_flops()
    agreed = case.check(results["peer"], results["ours"])
    results.clear()
    seconds = time_in_turns(works, case.rounds, device)
    del works
    median = {side: statistics.median(values) for side, values in seconds.items()}
    facts = {
        "case": case.name,
        "agreed": agreed,
        "seconds": seconds,
        "flops": flops,
        "sides": {"peer": case.peer, "ours": case.ours},
        **case.facts,
    }
    facts["floor_seconds"] = {side: floor_of(case, flops[side], device) for side in flops}
    rows = [time_row(case, median, facts)]
    if flops["peer"] != flops["ours"]:
        rows.append(flops_row(case, flops))
    if case.memory_target:
        rows.append(memory_row(case, device))
    return rows


def time_in_turns(works: dict[str, Work], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each round: a, b, a, b, ..., so that a machine that slows down slows both."""
    seconds: dict[str, list[float]] = {side: [] for side in works}
    for turn in range(rounds + 1):
        for side, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            result = work()
            synchronize(device)
            if turn:  # the first one warms up
                seconds[side].append(time.perf_counter() - start)
            del result
    return seconds


def time_row(case: Case, median: dict[str, float], facts: dict[str, Any]) -> Row:
    ratio = median["ours"] / median["peer"]
    floors = [f"{floor:.3g} s" for floor in facts["floor_seconds"].values() if floor is not None]
    shown = [f"{median[side]:.3g} s" for side in ("peer", "ours")]
    if case.speed_target:
        met, target = 1 / ratio >= case.speed_target, f">= {case.speed_target:g}x"
        return Row(f"{case.what}: speed", *shown, 1 / ratio, target, met, " / ".join(floors), facts)
    met = None if case.time_target is None else ratio <= case.time_target
    target = "" if case.time_target is None else f"<= {case.time_target:.2f}"
    if case.absolute_seconds:
        met, target = median["ours"] <= case.absolute_seconds, f"<= {case.absolute_seconds:g} s"
    return Row(f"{case.what}: time", *shown, ratio, target, met, " / ".join(floors), facts)


def flops_row(case: Case, flops: dict[str, int]) -> Row:
    ratio = flops["ours"] / max(1, flops["peer"])
    shown = [f"{flops[side] / 1e9:.4g} GFLOP" for side in ("peer", "ours")]
    return Row(f"{case.what}: counted FLOPs", *shown, ratio, "", None, facts={"case": case.name})


def memory_row(case: Case, device: str) -> Row:
    weights = {side: weigh_in_child(case, side, device) for side in ("peer", "ours")}
    used = {side: weight["peak"] - weight[case.memory_from] for side, weight in weights.items()}
    ratio = used["ours"] / max(1, used["peer"])
    shown = [f"{used[side] / 2**20:,.0f} MiB" for side in ("peer", "ours")]
    facts = {"case": case.name, "bytes": weights, "counted_from": case.memory_from}
    kind = "peak memory" if case.memory_from == "imports" else "peak activation memory"
    target = f"<= {case.memory_target:.2f}"
    return Row(f"{case.what}: {kind}", *shown, ratio, target, ratio <= case.memory_target, facts=facts)


def weigh_in_child(case: Case, side: str, device: str) -> dict[str, int]:
    """Bytes in a fresh process that runs this side alone: with libraries imported, with the work built, at the peak."""
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--weigh", case.name, side, "--device", device]
    returned_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc keeps what is freed, and it would count as used
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | returned_at_once)
    if done.returncode:
        raise RuntimeError(f"{case.name}, {side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def weigh(case: Case, side: str, device: str) -> dict[str, int]:
    """What `weigh_in_child` runs there: bytes with libraries imported, with weights and state, at the peak."""
    with PeakMemory(device) as memory:
        imports = memory.now()
        work = (case.build_peer if side == "peer" else case.build_ours)(device)
        built = memory.now()
        for _ in range(3):  # the optimiser's state comes with the first step
            work()
        peak = memory.peak()
    return {"imports": imports, "state": built + getattr(work, "state_bytes", int)(), "peak": peak}


class PeakMemory:
    """The most memory in use: torch's allocations on a GPU; otherwise this process's resident set, sampled often.

    Sampling, since the kernel's own high-water mark would hold what building took.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.highest = 0
        self.lock = threading.Lock()
        self.done = threading.Event()

    def __enter__(self) -> "PeakMemory":
        if self.device == "cpu":
            self.watcher = threading.Thread(target=self.watch, daemon=True)
            self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()

    def watch(self) -> None:
        while not self.done.wait(0.002):
            with self.lock:
                self.highest = max(self.highest, resident())

    def now(self) -> int:
        """Bytes in use; the peak is counted from here on."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        with self.lock:
            self.highest = resident()
            return self.highest

    def peak(self) -> int:
        return self.highest if self.device == "cpu" else torch.cuda.max_memory_allocated()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def floor_of(case: Case, flops: int, device: str) -> float | None:
    """Seconds that no implementation of this work can go below on this machine."""
    if case.floor is not None:
        return case.floor()
    return flops / matrix_rate(device) if flops else None


@cache
def matrix_rate(device: str) -> float:
    """FLOP per second of a large matrix product: float32 on a CPU, bf16 on a GPU."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    return 2 * size**3 / best_time(lambda: a @ a, device)


@cache
def bandwidth(device: str) -> float:
    """Bytes read or written per second in copying a large tensor."""
    a = torch.empty(2**28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / best_time(lambda: b.copy_(a), device)


def best_time(work: Work, device: str, rounds: int = 8) -> float:
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def about(device: str, seeds: Sequence[int]) -> dict[str, Any]:
    """What the numbers hold for; to be asked before the first file is written."""
    facts = provenance(seeds)
    rates = {"matrix_rate_gflops": matrix_rate(device) / 1e9, "bandwidth_gb_per_s": bandwidth(device) / 1e9}
    peer = {"transformers": importlib.metadata.version("transformers")}
    return facts | {"machine": facts["machine"] | rates, "versions": facts["versions"] | peer}
