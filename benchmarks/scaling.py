"""How a full training step grows: with the image, the batch, the queries and the classes in an image.

Every point is a process of its own: median seconds of three steps after one, and peak memory above the libraries.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, PeakMemory, Row, synchronize
from benchmarks.step import Task, our_step
from eomt.cost.flops import flop_counter

BASE = Task(classes=60)
AXES = {
    "image side": ("side", (256, 384, 512, 768, 1024)),
    "batch": ("batch", (1, 2, 4, 8)),
    "queries": ("queries", (50, 100, 200, 400)),
    "classes in an image": ("targets", (1, 10, 20, 40, 60)),
}
PLOT = ROOT / "docs" / "images" / "scaling.png"


def point(task: Task, device: str) -> dict[str, Any]:
    """Seconds, bytes and FLOPs of a step."""
    with PeakMemory(device) as memory:
        before = memory.now()
        step = our_step(task, device)
        with flop_counter() as counter:
            step()
        seconds = []
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        peak = memory.peak() - before
    return {"seconds": statistics.median(seconds), "bytes": peak, "flops": counter.get_total_flops()}


def rows(device: str) -> list[Row]:
    grown, table = {}, []
    for axis, (name, values) in AXES.items():
        tasks = [replace(BASE, **{name: value}) for value in values]
        grown[axis] = {"values": values, "points": [point_in_child(task, device) for task in tasks]}
        for quantity, what in (("seconds", "time"), ("bytes", "peak memory")):
            table.append(growth_row(axis, grown[axis], quantity, what))
    table[0].facts["task"] = asdict(BASE)
    plot(grown, PLOT.with_stem(PLOT.stem if device == "cpu" else f"{PLOT.stem}_{device}"))
    return table


def growth_row(axis: str, grown: dict[str, Any], quantity: str, what: str) -> Row:
    """From the smallest to the largest, as factors: of the counted FLOPs, and of time or memory."""
    first, last = grown["points"][0], grown["points"][-1]
    flops, ours = last["flops"] / first["flops"], last[quantity] / first[quantity]
    values = grown["values"]
    return Row(
        f"full step, {axis} {values[0]} to {values[-1]}: growth of {what} against that of FLOPs",
        f"{flops:.2f}x FLOPs",
        f"{ours:.2f}x",
        ours / flops,
        "<= 1.00",
        ours <= flops,
        facts=grown,
    )


def point_in_child(task: Task, device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scaling", json.dumps(asdict(task)), device]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{task}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def plot(grown: dict[str, Any], path: Path) -> None:
    """A panel an axis: time, memory and FLOPs as multiples of the first point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(grown), figsize=(3.2 * len(grown), 3.2), layout="constrained")
    for panel, (axis, curve) in zip(panels, grown.items(), strict=True):
        first = curve["points"][0]
        for quantity, name, style in (
            ("flops", "counted FLOPs", "k--"),
            ("seconds", "time", "o-"),
            ("bytes", "memory", "s-"),
        ):
            panel.plot(
                curve["values"], [point[quantity] / first[quantity] for point in curve["points"]], style, label=name
            )
        panel.set(xlabel=axis, xticks=curve["values"])
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("multiple of the first point")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    print(json.dumps(point(Task(**json.loads(sys.argv[1])), sys.argv[2])))
