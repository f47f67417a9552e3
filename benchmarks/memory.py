"""The estimate of a training step's memory against what the step takes on this machine, each in a process of its own.

`python -m benchmarks.memory [--device cuda]`

On a CPU it is measured twice: as the process usually holds it, with the gaps that the C library keeps between blocks in
use, and with every block of 64 KiB and more mapped for itself, which leaves none. On a GPU torch counts what it
allocated, without gaps.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.bench import ROOT, PeakMemory, Row
from benchmarks.step import Task, autocast, batch_of
from eomt.cost.training_cost import training_cost
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

TINY = {"backbone_name": "vit_tiny_patch16_224", "backbone_kwargs": {"embed_dim": 192, "depth": 8, "num_heads": 3}}
SMALL = {"backbone_name": "vit_small_patch14_reg4_dinov2"}
LARGE = {"backbone_name": "vit_large_patch14_reg4_dinov2"}
VARIANTS = {
    "full": {},
    "LoRA": {"use_lora": True},
    "LoRA, last 4": {"use_lora": True, "lora_blocks": 4},
    "frozen": {"freeze": ["backbone"]},
}
NETWORKS = {
    "cpu": {
        "tiny, 256x256, batch 4": (TINY | {"num_q": 50, "num_blocks": 3}, 256, 4),
        "ViT-S/16, 512x512, batch 2": (SMALL, 512, 2),
    },
    "cuda": {
        "ViT-S/16, 512x512, batch 4": (SMALL, 512, 4),
        "ViT-L/16, 1024x1024, batch 1": (LARGE, 1024, 1),
        "ViT-L/16, 1024x1024, batch 2": (LARGE, 1024, 2),
    },
}


def measure(device: str = "cpu") -> Iterator[dict[str, Any]]:
    """For each network and variant: bytes that training adds: `estimated`, `measured` and `without_gaps`."""
    for what, (settings, side, batch) in NETWORKS[device].items():
        for variant, changes in VARIANTS.items():
            yield compare(f"{what}, {variant}", {**settings, **changes}, Task(side=side, batch=batch), device)


def rows(device: str) -> list[Row]:
    """The same as lines of the table: what was measured without gaps, and the estimate."""
    table = []
    for row in measure(device):
        sizes = [row["without_gaps"], row["estimated"]]
        shown = [f"{size / 2**20:,.0f} MiB {word}" for size, word in zip(sizes, ("measured", "estimated"), strict=True)]
        table.append(Row(f"memory that training adds, {row['what']}", *shown, sizes[1] / sizes[0], "", None, facts=row))
    return table


def compare(what: str, settings: dict[str, Any], task: Task, device: str) -> dict[str, Any]:
    """One row of `measure`."""
    settings = {"img_size": (task.side, task.side), "num_classes": task.classes, "pretrained": False, **settings}
    precision = "32-true" if device == "cpu" else "bf16-mixed"
    cost = training_cost(settings, task.batch, precision=precision, device=device, targets=task.targets)
    case = {"settings": settings, "task": asdict(task), "device": device}
    measured = in_child(case)
    without_gaps = in_child(case, MALLOC_MMAP_THRESHOLD_="65536") if device == "cpu" else measured
    row = {"what": what, "precision": precision, "estimated": cost.peak - cost.weights}
    return row | {"measured": measured, "without_gaps": without_gaps}


def in_child(case: dict[str, Any], **environment: str) -> int:
    """`step_memory` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def step_memory(settings: dict[str, Any], task: dict[str, Any], device: str) -> int:
    """Bytes that training steps add, at their peak, to a process that holds the network, in Lightning's order."""
    module = MaskClassificationSemantic(**settings).to(device).train()
    module.log = module.log_dict = lambda *args, **options: None
    images, labels = batch_of(Task(**task), device)
    optimizer = module.optimizer()
    with PeakMemory(device) as memory:
        built = memory.now()
        for _ in range(3):  # the optimiser's state comes with the first one
            with autocast(device):
                loss = module.training_step((images, labels), 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return memory.peak() - built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(step_memory(**json.loads(args.case)))
        return
    for row in measure(args.device):
        sizes = "".join(f"{row[name] / 2**20:8,.0f} MiB {name}" for name in ("estimated", "measured", "without_gaps"))
        ratios = "  ".join(f"{row['estimated'] / row[name]:.2f}" for name in ("measured", "without_gaps"))
        print(f"{row['what']:<42}{sizes}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
