"""LoRA on a base in 32, 16, 8 and 4 bits: mIoU and memory, each a run of its own.

python benchmarks/quantised_base.py benchmarks/quantised_base.json --name "toy streets" --seeds 0 1 2 -- \
    experiment=toy_night variant=lora_r8 trainer.precision=bf16-mixed model.ckpt_path=outputs/toy_source/model

What stands behind `--` goes to train_with_lora.py. A file keeps what it has of other names. Nothing else should run.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from eomt.files import read_json, write_json
from eomt.reporting.run_summary import provenance

ROOT = Path(__file__).resolve().parents[1]
BASES = {
    "float32": [],
    "base_dtype=bfloat16": ["model.base_dtype=bfloat16"],
    "base_quantisation=8bit": ["model.base_quantisation=8bit"],
    "base_quantisation=4bit": ["model.base_quantisation=4bit"],
}


def main() -> None:
    """Trains every base with every seed and adds them to the file."""
    args = parse()
    facts = provenance(args.seeds)
    rows = []
    for base, words in BASES.items():
        runs = [train([*args.overrides, *words, f"seed={seed}"]) for seed in args.seeds]
        rows.append({"base": base, "runs": runs, "miou": statistics.mean(run["miou"] for run in runs)})
        rows[-1]["peak_memory"] = max(run["peak_memory"] for run in runs)
        rows[-1]["added"] = max(run["added"] for run in runs)
        print(f"{base:<24}{rows[-1]['miou']:.4f} mIoU {rows[-1]['peak_memory'] / 2**20:,.0f} MiB", flush=True)
    parts = read_json(args.out, {"parts": {}})["parts"]
    write_json(args.out, {"what": __doc__.splitlines()[0], "parts": parts | {args.name: facts | {"rows": rows}}})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--name", required=True, help="of the task in the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    return parser.parse_intermixed_args()  # overrides may stand behind `--`


def train(words: list[str]) -> dict[str, Any]:
    """Scores and memory of one run, in a process of its own."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train_with_lora.py"), *words, f"output_dir={folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        summary = read_json(Path(folder, "run", "summary.json"))
    peak = summary["peak_memory"]
    memory = {"peak_memory": peak["bytes"], "added": peak["bytes"] - peak["before_training"]}
    return {name: summary[name] for name in ("seed", "miou", "steps")} | memory


if __name__ == "__main__":
    main()
