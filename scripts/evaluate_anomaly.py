"""How well a network tells what it has never seen: AuPRC, FPR95 and component metrics on anomaly benchmarks.

The network runs once over every image; all scores and temperatures come from its logits, which stay on disk.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _data import run_of

if TYPE_CHECKING:
    from eomt.anomaly.datasets import AnomalyDataset
    from eomt.anomaly.evaluation import Result
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

EXAMPLES = """examples:
  python scripts/evaluate_anomaly.py outputs/rba/adapter data=toy_anomalies       # draws its images
  python scripts/evaluate_anomaly.py outputs/rba/adapter data.root=/data/anomaly  # every benchmark that lies there
  python scripts/evaluate_anomaly.py outputs/rba/model data=road_anomaly_21 data.root=/data/anomaly \\
      scores=[msp,max_logit,max_entropy,rba] temperatures=[0.5,0.75,1.0,1.1]
  python scripts/evaluate_anomaly.py outputs/rba/model data=fs_static data.root=/data/anomaly --export rba --method OurRbA"""
DEFAULTS = {"scores": ["msp", "max_logit", "max_entropy", "rba"], "temperatures": [1.0]}


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an adapter/ or model/ folder, a run's folder, or a checkpoint")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="data, data.root, scores, temperatures; see the examples"
    )
    parser.add_argument("--precision", help="default: that of the run")
    parser.add_argument("--ckpt_path", help="the base weights of an adapter, if they have moved")
    parser.add_argument("--device", default="auto", help="cuda, cpu; default: a GPU if there is one")
    parser.add_argument("--cache", type=Path, help="folder of the logits; default: anomaly/logits in the run's folder")
    parser.add_argument("--no_components", action="store_true", help="pixel metrics alone, in half the time")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="images to draw (default 4; 0: none)")
    parser.add_argument(
        "--export", metavar="SCORE", help="also write this score's maps as the SMIYC benchmark reads them"
    )
    parser.add_argument("--method", default="EoMT-LoRA", help="the method's name in that export")
    parser.add_argument("--output", type=Path, help="folder for the results; default: anomaly/ in the run's folder")
    args = parser.parse_intermixed_args()

    from eomt.command_line import quiet_libraries

    quiet_libraries()
    try:
        run_evaluation(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_evaluation(args: argparse.Namespace) -> None:
    """Every data set in turn: logits, metrics, table, pictures, export."""
    import torch

    from eomt.anomaly.evaluation import LogitCache, evaluate
    from eomt.anomaly.scores import variants
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    settings = parse(args.settings)
    asked = variants(settings["scores"], settings["temperatures"])
    if args.export and args.export not in {name for name, _ in asked}:
        raise ValueError(f"--export {args.export}: choose one of scores={settings['scores']}")
    datasets = open_datasets(settings)
    module = MaskClassificationSemantic.from_pretrained(args.model, args.ckpt_path)
    precision = args.precision or module.trained_precision or "bf16-mixed"
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    output = args.output or run_of(args.model) / "anomaly"
    for dataset in datasets:
        cache = LogitCache((args.cache or output / "logits") / identity(module, dataset, precision))
        cache.fill(module.network, dataset, device, precision, progress)
        results = evaluate(cache, dataset, asked, progress, not args.no_components, device)
        show(dataset, results)
        write(output, dataset, results, precision, module)
        if args.pictures:
            draw(output, dataset, cache, asked, args.pictures, len(module.class_names))
        if args.export:
            export_maps(output, dataset, cache, next(v for v in asked if v[0] == args.export), args.method)


def parse(words: list[str]) -> dict[str, Any]:
    """`data`, `data.root`, `data.KEY`, `scores` and `temperatures` of the command line."""
    import yaml

    from eomt.command_line import did_you_mean

    settings: dict[str, Any] = dict(DEFAULTS) | {"data": None, "data.root": None}
    of_toys = ("data.number", "data.size", "data.seed")
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in (*settings, *of_toys):
            raise ValueError(f"{word} is no setting{did_you_mean(key, [*settings, *of_toys])}")
        settings[key] = yaml.safe_load(value)
    for key in DEFAULTS:
        if not isinstance(settings[key], list):
            settings[key] = [settings[key]]
    return settings


def open_datasets(settings: dict[str, Any]) -> "list[AnomalyDataset]":
    """The data set that was named, or all that lie under the root."""
    from eomt.anomaly.datasets import BENCHMARKS, AnomalyDataset
    from eomt.anomaly.toy_anomalies import write_toy_anomalies

    name, root = settings["data"], settings["data.root"]
    toys = {key.removeprefix("data."): value for key, value in settings.items() if key in ("data.number", "data.size")}
    if name == "toy_anomalies":
        folder = write_toy_anomalies(root, **toys, seed=settings.get("data.seed", 0))
        return [AnomalyDataset(folder, name)]
    if root is None:
        raise ValueError(
            f"give data.root=FOLDER of the benchmarks, or data=toy_anomalies; data={', data='.join(BENCHMARKS)}"
        )
    if name is not None:
        return [AnomalyDataset(root, name)]
    found = [
        AnomalyDataset(root, each)
        for each, benchmark in BENCHMARKS.items()
        if any((Path(root).expanduser() / folder / "labels_masks").is_dir() for folder in benchmark.folders)
    ]
    if not found:
        folders = ", ".join(benchmark.folders[0] for benchmark in BENCHMARKS.values())
        raise FileNotFoundError(f"{root} holds none of {folders}, each with images/ and labels_masks/")
    return found


def identity(module: "MaskClassificationSemantic", dataset: "AnomalyDataset", precision: str) -> str:
    """A folder's name for the logits of these weights on this data."""
    import hashlib

    from lora_config import fingerprint

    facts = [fingerprint(module.network), module.hparams.img_size, str(dataset.folder.resolve()), precision]
    return f"{dataset.name}_{hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]}"


def progress(items: Iterable[int], what: str) -> Iterable[int]:
    """A bar on a terminal."""
    from rich.progress import track

    return track(list(items), what, transient=True, disable=not sys.stderr.isatty())


def show(dataset: "AnomalyDataset", results: "list[Result]") -> None:
    """A line for each score and temperature."""
    from rich.console import Console
    from rich.table import Table

    table = Table("score", "T", "AuPRC", "FPR95", "sIoU", "PPV", "F1", box=None, padding=(0, 2, 0, 0))
    for result in results:
        parts = result.components
        of_parts = ("", "", "") if parts is None else map(percent, (parts.mean_siou, parts.mean_ppv, parts.f1))
        table.add_row(
            result.score,
            f"{result.temperature:g}",
            percent(result.pixels.auprc),
            percent(result.pixels.fpr95),
            *of_parts,
        )
    pixels = results[0].pixels
    share = 100 * pixels.chance
    print(f"{dataset.benchmark.title}: {len(dataset)} images, {pixels.valid:,} pixels, {share:.2f} % of them anomalous")
    Console().print(table)
    if error := max(result.pixels.error for result in results):
        print(f"counted in bins: AuPRC and FPR95 are within {100 * error:.3f} points")


def percent(value: float) -> str:
    return "none" if value != value else f"{100 * value:.2f}"


def write(
    output: Path,
    dataset: "AnomalyDataset",
    results: "list[Result]",
    precision: str,
    module: "MaskClassificationSemantic",
) -> None:
    """All figures as JSON."""
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "schema_version": 1,
        "benchmark": dataset.name,
        "title": dataset.benchmark.title,
        "images": len(dataset),
        "precision": precision,
        "img_size": list(module.hparams.img_size),
        "results": [result.as_dict() for result in results],
    }
    (output / f"{dataset.name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{output}/{dataset.name}.json")


if __name__ == "__main__":
    sys.exit(main())
