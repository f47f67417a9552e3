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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # and not this folder, whose modules have names of others
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from benchmarks import step, val  # noqa: E402
from benchmarks.bench import PeakMemory, Work, about, matrix_rate, synchronize  # noqa: E402
from benchmarks.infer import adapted, inference, merged, network  # noqa: E402
from benchmarks.peer import SIZES, normalized  # noqa: E402
from eomt.cost.flops import flop_counter  # noqa: E402
from eomt.cost.training_cost import training_cost  # noqa: E402
from eomt.files import write_json  # noqa: E402
from eomt.models.eomt import EoMT  # noqa: E402

EXAMPLES = """examples:
  python benchmarks/gpu.py                                   # ViT-S and ViT-L/16, 1024x1024, bf16: up to 8 minutes
  python benchmarks/gpu.py --device cpu --side 64 --sizes small --rounds 1    # whether it runs, on any machine"""
OURS = {"full": {}, "lora": step.LORA, "lora, last 4": step.LAST}
INFERENCE = {
    "inference": network,
    "inference, adapters unmerged": lambda *of_size: adapted(*of_size)[0],
    "inference, adapters merged": merged,
}
COMPILED = ", compiled"


@dataclass(frozen=True)
class Line:
    """Something to measure: its name, how it is built, and the settings of a training step whose memory is known."""

    name: str
    build: Callable[[], Work]
    settings: dict[str, Any] | None = None
    batch: int = 1


def lines(task: step.Task, device: str) -> Iterator[Line]:
    """What is measured for one size of the network, what matters most first: all of it eager, then compiled."""
    yield from peer_lines(task, device, compiled=False)
    yield from our_lines(task, device, compiled=False)
    yield Line("validation, every block in whole maps", partial(val.straight, device, task.size, task.side))
    yield from our_lines(task, device, compiled=True)
    yield from peer_lines(task, device, compiled=True)


def peer_lines(task: step.Task, device: str, compiled: bool) -> Iterator[Line]:
    suffix = COMPILED * compiled
    yield Line(f"transformers' full step{suffix}", partial(peer_step, task, device, compiled))
    yield Line(f"transformers' inference{suffix}", partial(peer_inference, task, device, compiled))


def our_lines(task: step.Task, device: str, compiled: bool) -> Iterator[Line]:
    suffix, of_size = COMPILED * compiled, (device, task.size, task.side)
    for name, settings in OURS.items():
        build = partial(step.our_step, task, device, compile=compiled, **settings)
        yield Line(f"{name} step{suffix}", build, settings, task.batch)
    yield Line(f"lora, last 4 step, trunk cache{suffix}", partial(step.cached_step, task, device, compile=compiled))
    for name, make in INFERENCE.items():
        yield Line(f"{name}{suffix}", partial(our_inference, make, of_size, compiled))
    what = f"validation of a {2 * task.side}x{task.side} image{suffix}"
    yield Line(what, partial(val.ours, *of_size, compile=compiled))


def peer_step(task: step.Task, device: str, compiled: bool) -> Work:
    work = step.peer_step(task, device)
    work.loss = torch.compile(work.loss) if compiled else work.loss
    return work


def our_inference(make: Callable[..., EoMT], of_size: tuple[str, str, int], compiled: bool) -> Work:
    model = make(*of_size)
    if compiled:
        model.compile_parts()
    return inference(model, of_size[0])


def peer_inference(task: step.Task, device: str, compiled: bool) -> Work:
    """transformers' network, its attention masks faded out as at the end of a training."""
    network = step.theirs(task).to(device).eval()
    network.attn_mask_probs.zero_()
    network = torch.compile(network) if compiled else network
    image = torch.rand(1, 3, task.side, task.side, generator=torch.Generator().manual_seed(2)).to(device)

    @torch.no_grad()
    def infer() -> tuple[Tensor, Tensor]:
        with step.autocast(device):
            found = network(normalized(image))
        return found.masks_queries_logits, found.class_queries_logits

    return infer


def measure(line: Line, task: step.Task, device: str, rounds: int) -> dict[str, Any]:
    """Seconds (the median and all), peak bytes, counted operations and their rate, and the estimate of the peak."""
    torch.compiler.reset()  # what earlier lines compiled counts towards the limit of recompilations
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
    if not line.name.endswith(COMPILED):  # whose operations are those of the eager line
        with flop_counter() as counter:
            work()
        flops = counter.get_total_flops()
    median = statistics.median(seconds)
    found = {"what": line.name, "seconds": median, "all_seconds": seconds, "peak_bytes": peak, "flops": flops}
    if line.settings is not None:
        found["estimated_peak_bytes"] = estimated_peak(line, task, device)
    return found


def with_rate(row: dict[str, Any], rows: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """Adds the operations per second; those of a compiled line are counted in the eager one among the rows."""
    eager = [other.get("flops") for other in rows if other["what"] + COMPILED == row["what"]]
    flops = row.get("flops") or next(iter(eager), None)
    if not flops or "seconds" not in row:
        return row
    rate = flops / row["seconds"]
    return row | {"flops": flops, "flops_per_second": rate, "share_of_matrix_rate": rate / matrix_rate(device)}


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
    for size, row in work_of(args):
        rows = facts["sizes"].setdefault(size, [])
        if time.monotonic() > end:
            print("out of time: what follows was not measured", flush=True)
            break
        rows.append(with_rate(tried(row), rows, args.device))
        print(json.dumps({"size": size} | rows[-1]), flush=True)
        write_json(args.out, facts)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def work_of(args: argparse.Namespace) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """All that is to be measured, with the size of its network: what is eager of all sizes before what is compiled."""
    early, late = [], []
    for size in args.sizes.split(","):
        task = replace(step.Task(size, args.side), batch=args.batch)
        for line in lines(task, args.device):
            place = late if line.name.endswith(COMPILED) else early
            place.append((size, partial(measure, line, task, args.device, args.rounds)))
        early.append((size, partial(fit_16_mixed, task, args.device)))
    return early + late


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
