"""What steps, validation and inference take on a GPU: seconds, peak memory, and the share of the card's matrix rate.

One command for a machine with torch; benchmarks/README.md says what else it needs and how that is carried. Each line is
measured in this process, transformers' EoMT among them, and written at once, so that what ran out of time is all
that is missing. Memory is compared with the estimate that a run prints before it starts.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from benchmarks import step, val  # noqa: E402
from benchmarks.bench import PeakMemory, Work, about, matrix_rate, synchronize  # noqa: E402
from benchmarks.infer import adapted, inference, merged, network  # noqa: E402
from benchmarks.peer import SIZES  # noqa: E402
from eomt.cost.flops import flop_counter  # noqa: E402
from eomt.cost.training_cost import training_cost  # noqa: E402
from eomt.files import write_json  # noqa: E402

EXAMPLES = """examples:
  python benchmarks/gpu.py                                   # ViT-S and ViT-L/16, 1024x1024, bf16: up to 8 minutes
  python benchmarks/gpu.py --device cpu --side 64 --sizes small --rounds 1    # whether it runs, on any machine"""
OURS = {"full": {}, "lora": step.LORA, "lora, last 4": step.LAST}


@dataclass(frozen=True)
class Line:
    """Something to measure: its name, how it is built, and the settings of a training step whose memory is known."""

    name: str
    build: Callable[[], Work]
    settings: dict[str, Any] | None = None
    batch: int = 1


def lines(task: step.Task, device: str) -> Iterator[Line]:
    """What is measured for one size of the network, what matters most first."""
    eager = partial(step.our_step, task, device)
    yield Line("transformers' full step", partial(step.peer_step, task, device))
    for name, settings in OURS.items():
        yield Line(f"{name} step", partial(eager, **settings), settings, task.batch)
    yield Line("lora, last 4 step, trunk cache", partial(step.cached_step, task, device))
    of_size = (device, task.size, task.side)
    yield Line("inference", lambda: inference(network(*of_size), device))
    yield Line("inference, adapters unmerged", lambda: inference(adapted(*of_size)[0], device))
    yield Line("inference, adapters merged", lambda: inference(merged(*of_size), device))
    yield Line(f"validation of a {2 * task.side}x{task.side} image", partial(val.ours, *of_size))
    yield Line("validation, every block in whole maps", partial(val.straight, *of_size))
    for name, settings in OURS.items():
        yield Line(f"{name} step, compiled", partial(eager, compile=True, **settings), settings, task.batch)
    yield Line("transformers' full step, compiled", partial(compiled_peer, task, device))


def compiled_peer(task: step.Task, device: str) -> Work:
    work = step.peer_step(task, device)
    work.loss = torch.compile(work.loss)
    return work


def measure(line: Line, task: step.Task, device: str, rounds: int) -> dict[str, Any]:
    """Seconds (the median and all), peak bytes, counted operations and their rate, and the estimate of the peak."""
    with PeakMemory(device) as memory:
        work = line.build()
        for _ in range(3):  # compiles, and makes the optimiser's state
            work()
        synchronize(device)
        memory.now()
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        peak = memory.peak()
    flops = None
    if "compiled" not in line.name:  # whose operations are counted eagerly
        with flop_counter() as counter:
            work()
        flops = counter.get_total_flops()
    median = statistics.median(seconds)
    found = {"what": line.name, "seconds": median, "all_seconds": seconds, "peak_bytes": peak, "flops": flops}
    if flops:
        found |= {"flops_per_second": flops / median, "share_of_matrix_rate": flops / median / matrix_rate(device)}
    if line.settings is not None:
        found["estimated_peak_bytes"] = estimated_peak(line, task, device)
    return found


def estimated_peak(line: Line, task: step.Task, device: str) -> int:
    """What `scripts/cost.py` would say of this step."""
    sizes = {"img_size": (task.side, task.side), "num_classes": task.classes, "num_q": task.queries}
    name = {"backbone_name": SIZES[task.size][3], "pretrained": False}
    precision = "32-true" if device == "cpu" else "bf16-mixed"
    return training_cost(sizes | name | line.settings, line.batch, precision=precision, device=device).peak


def fit_16_mixed(task: step.Task, device: str) -> dict[str, Any]:
    """20 steps by Lightning in 16-mixed, where gradients are scaled and AdamW is fused; the losses, first and last."""
    module = step.module_of(task, **step.LORA)
    losses = []
    module.log_dict = lambda values, *args, **kwargs: losses.extend(
        float(value) for key, value in values.items() if key.endswith("loss")
    )
    module.log = lambda key, value, *args, **kwargs: losses.append(float(value)) if key.endswith("loss") else None
    images, labels = step.batch_of(task, "cpu")
    loader = DataLoader([(images, labels)] * 20, batch_size=None)
    trainer = lightning.Trainer(
        max_steps=20,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="16-mixed" if device == "cuda" else "32-true",
        gradient_clip_val=0.01,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, loader)
    fused = trainer.optimizers[0].param_groups[0]["fused"]
    return {
        "what": "20 steps in 16-mixed",
        "steps": trainer.global_step,
        "losses": losses[:1] + losses[-1:],
        "fused": fused,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", default="small,large", help="of the network, the first first (default %(default)s)")
    parser.add_argument("--side", type=int, default=1024, help="of the training crop, pixels (default %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images a step (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="how often each is timed (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.5, help="start nothing after that (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "speed_gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries whether all of it runs")
    end = time.monotonic() + 60 * args.minutes
    facts = {"schema_version": 2} | about(args.device, seeds=(0,))
    facts |= {"side": args.side, "batch": args.batch, "sizes": {}}
    for size in args.sizes.split(","):
        task = replace(step.Task(size, args.side), batch=args.batch)
        rows = facts["sizes"][size] = []
        work = [partial(measure, line, task, args.device, args.rounds) for line in lines(task, args.device)]
        for row in (*work, partial(fit_16_mixed, task, args.device)):
            if time.monotonic() > end:
                print("out of time: what follows was not measured", flush=True)
                break
            rows.append(tried(row))
            print(json.dumps({"size": size} | rows[-1]), flush=True)
            write_json(args.out, facts)
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return 0


def tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measured, or its error: the others go on."""
    try:
        return work()
    except Exception as error:  # out of memory, a compiler that is missing, ...
        line = work.args[0]
        return {
            "what": getattr(line, "name", "20 steps in 16-mixed"),
            "error": f"{type(error).__name__}: {error}"[:500],
        }


if __name__ == "__main__":
    sys.exit(main())
