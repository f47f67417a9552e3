"""How long one waits: for the help, and for the first training step of a tiny network."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.bench import ROOT, Row
from eomt.data.toy_streets import write_toy_streets

ONE_STEP = (
    "experiment=toy_source trainer.max_steps=1 trainer.limit_val_batches=0 data.num_train=8 data.num_val=2 "
    "data.batch_size=4 data.num_workers=0"
).split()


def rows(device: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        from pathlib import Path

        write_toy_streets(Path(folder) / "toy", "clear", 8, 2, (128, 256), 0)
        runs = (f"{folder}/run{i}" for i in range(10))
        first = [*ONE_STEP, f"data.root={folder}/toy"]
        return [
            wait("train_with_lora.py --help", lambda: ["--help"], 2.0, floor="pass"),
            wait(
                "train_with_lora.py, a run of one step of the tiny network, start to end",
                lambda: [*first, f"output_dir={next(runs)}"],
                15.0,
                floor="import torch, lightning, timm, peft, hydra, torchmetrics",
            ),
        ]


def wait(what: str, arguments: Callable[[], Sequence[str]], target: float, floor: str, rounds: int = 5) -> Row:
    """Median seconds from the start of the process to its end; `floor` is what a process must do at least."""
    seconds = {"ours": [], "floor": []}
    for _ in range(rounds):
        seconds["ours"].append(run(str(ROOT / "train_with_lora.py"), *arguments()))
        seconds["floor"].append(run("-c", floor))
    ours, least = (statistics.median(seconds[side]) for side in ("ours", "floor"))
    facts = {"seconds": seconds, "floor": floor}
    return Row(what, "", f"{ours:.2f} s", None, f"<= {target:g} s", ours <= target, f"{least:.3g} s", facts)


def run(*arguments: str) -> float:
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - start
