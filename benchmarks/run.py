"""Measures what this project costs against transformers' EoMT and against plain recipes, on the same weights and data.

One table: what, the other side, ours, their ratio, the ratio that is aimed at, and the seconds that the counted work
takes at least on this machine (of either side). Sides are timed in turns, in one process; peak memory is taken in a
process for each side. Everything, every single round among it, goes to a JSON file.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PARTS = ("step", "loss", "ways", "data", "val", "infer", "startup", "equality", "memory", "scaling")
EXAMPLES = """examples:
  python benchmarks/run.py                                  # everything, about half an hour on two cores
  python benchmarks/run.py --only step,loss
  python benchmarks/run.py --device cuda                    # ViT-L/16 at 1024x1024 in bf16

Nothing else should run meanwhile."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PART,...", help=f"some of {', '.join(PARTS)}; the others keep their results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON (default benchmarks/speed_DEVICE.json)")
    parser.add_argument("--weigh", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = args.only.split(",") if args.only else list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(PARTS)}")

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that measure memory
    if args.weigh:
        print(json.dumps(weigh_case(*args.weigh, args.device)))
        return 0
    out = args.out or ROOT / "benchmarks" / f"speed_{args.device}.json"
    origins = {part: origin(part, args.device) for part in parts}
    measured = {}
    for part in parts:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)
        measured[part] = origins[part] | {"rows": measure(part, args.device)}
        write(out, measured)
    show([row for part in measured.values() for row in part["rows"]])
    print(f"written to {out}")
    return 0


def measure(part: str, device: str) -> list[dict[str, Any]]:
    """A part's lines of the table."""
    from benchmarks.bench import run_case

    module = import_module(f"benchmarks.{part}")
    cases = [case for case in getattr(module, "cases", lambda device: [])(device) if device in case.devices]
    rows = []
    for work in (*(partial(run_case, case) for case in cases), getattr(module, "rows", lambda device: [])):
        for row in work(device):
            ratio = "" if row.ratio is None else f", ratio {row.ratio:.3g} {row.target}"
            print(f"  {row.what}: {row.peer} / {row.ours}{ratio}", file=sys.stderr, flush=True)
            rows.append(asdict(row))
    return rows


def weigh_case(name: str, side: str, device: str) -> dict[str, int]:
    from benchmarks.bench import weigh

    cases = import_module(f"benchmarks.{name.split('.')[0]}").cases(device)
    return weigh(next(case for case in cases if case.name == name), side, device)


def origin(part: str, device: str) -> dict[str, Any]:
    """Where a part's figures come from; most draw all that is random from seed 0."""
    from benchmarks.bench import about

    return about(device, getattr(import_module(f"benchmarks.{part}"), "SEEDS", (0,)))


def write(path: Path, measured: dict[str, Any]) -> None:
    """Adds these parts to what the file has of others."""
    from eomt.files import read_json, write_json

    earlier = read_json(path, {"parts": {}})["parts"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema_version": 2, "parts": earlier | measured})


def show(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from benchmarks.speed_figures import SPEED_TITLES, speed_cells

    table = Table(*SPEED_TITLES)
    for row in rows:
        table.add_row(*speed_cells(row), style="red" if row["met"] is False else None)
    console = Console()
    console.width = max(console.width, 200 if not console.is_terminal else 0)  # a file has room
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
