"""How well a network tells what it has never seen: AuPRC, FPR95 and component metrics on anomaly benchmarks.

The network runs once over every image; all scores and temperatures come from its logits, which stay on disk.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _data import run_of

if TYPE_CHECKING:  # torch and what needs it is imported late: --help answers at once
    from eomt.anomaly.datasets import AnomalyDataset
    from eomt.anomaly.evaluation import LogitCache, Result, Variant
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

EXAMPLES = """examples:
  python scripts/evaluate_anomaly.py outputs/rba/adapter data=toy_anomalies       # draws its images
  python scripts/evaluate_anomaly.py outputs/rba/adapter data.root=/data/anomaly  # every benchmark that lies there
  python scripts/evaluate_anomaly.py outputs/rba/model data=road_anomaly_21 data.root=/data/anomaly \\
      scores=[msp,max_logit,max_entropy,rba] temperatures=[0.5,0.75,1.0,1.1]
  python scripts/evaluate_anomaly.py outputs/rba/model data=fs_static data.root=/data/anomaly --export rba --method Ours

settings:
  data          road_anomaly_21, road_obstacle_21, fs_lost_and_found, fs_static, road_anomaly, toy_anomalies; or a list
  data.root     folder of the benchmarks' folders
  data.number, data.size, data.seed   of toy anomalies (60, [128,256], 0)
  scores        msp, max_logit, max_entropy, rba, msp_class_t (default: the first four)
  temperatures  of the scores that have one (default: [1.0])"""
TOYS, OF_TOYS = "toy_anomalies", ("data.number", "data.size", "data.seed")
SETTINGS: dict[str, Any] = {
    "data": [],
    "data.root": None,
    "data.number": 60,
    "data.size": [128, 256],
    "data.seed": 0,
    "scores": ["msp", "max_logit", "max_entropy", "rba"],
    "temperatures": [1.0],
}


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL [KEY=VALUE ...] [options]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="an adapter/ or model/ folder, a run's folder, or a checkpoint")
    add("settings", nargs="*", metavar="KEY=VALUE", help="see below")
    add("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), help="default: that of the run")
    add("--ckpt_path", help="the base weights of an adapter, if they have moved")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)")
    add("--cache", type=Path, help="folder of the logits; default: anomaly/logits in the run's folder")
    add("--no_components", action="store_true", help="pixel metrics alone, in half the time")
    add("--pictures", type=int, default=4, metavar="N", help="images to draw (default: %(default)s; 0: none)")
    add("--export", metavar="SCORE", help="also write this score's maps as the SegmentMeIfYouCan benchmark reads them")
    add("--method", default="EoMT-LoRA", help="the method's name in that export (default: %(default)s)")
    add("--output", type=Path, help="folder for the results; default: anomaly/ in the run's folder")
    args = parser.parse_intermixed_args()

    from eomt.command_line import quiet_libraries

    try:
        settings = parse(args.settings)
        quiet_libraries()
        run_evaluation(args, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(words: list[str]) -> dict[str, Any]:
    """All `SETTINGS`, those of the command line with the values that it gives.

    Raises:
        ValueError: an unknown setting, or one that cannot be read.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    from eomt.command_line import did_you_mean

    settings = dict(SETTINGS)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in SETTINGS:
            raise ValueError(f"{word} is no setting{did_you_mean(key, SETTINGS)}")
        try:
            read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]
        except YAMLError as error:
            raise ValueError(f"{word} cannot be read: a list looks like {key}=[a,b]") from error
        settings[key] = value if key == "data.root" else read
    for key in ("data", "scores", "temperatures"):
        if not isinstance(settings[key], list):
            settings[key] = [] if settings[key] is None else [settings[key]]
        if any(isinstance(each, list | dict) for each in settings[key]):
            raise ValueError(f"{key}={settings[key]} must be a value or a list of values")
    return settings


def run_evaluation(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Every data set in turn: logits, metrics, table, pictures, export."""
    from eomt.anomaly.evaluation import LogitCache, evaluate
    from eomt.anomaly.scores import variants
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    asked = variants(settings["scores"], settings["temperatures"])
    exported = variant_to_export(args.export, asked)
    datasets = open_datasets(settings)
    for dataset in datasets:
        dataset.check()  # before the network has run over all of them
    device = choose_device(args.device)
    module = MaskClassificationSemantic.from_pretrained(args.model, args.ckpt_path)
    precision = args.precision or known_precision(module.trained_precision)
    output = args.output or run_of(args.model) / "anomaly"
    for dataset in datasets:
        cache = LogitCache((args.cache or output / "logits") / identity(module, dataset, precision))
        wanted = [*dataset.frames, *(dataset.unlabelled if exported else [])]
        images = [(frame, lambda i=i, of=dataset: of.image(i)) for i, frame in enumerate(wanted)]
        cache.fill(module.network, progress(images, f"{dataset.benchmark.title}: network"), device, precision)
        results = evaluate(cache, dataset, asked, title_of(dataset), not args.no_components, device)
        show(dataset, results)
        write(output, dataset, results, precision, module)
        if args.pictures > 0:
            draw(output, dataset, cache, results, args.pictures, module.hparams.num_classes)
        if exported:
            export_maps(output, dataset, cache, wanted, exported, args.method)
        size = sum(file.stat().st_size for file in cache.folder.iterdir())
        print(f"{cache.folder}: the logits, {size / 2**20:,.0f} MiB, for further scores; delete them when done")


def variant_to_export(name: str | None, asked: "list[Variant]") -> "Variant | None":
    """The score and temperature that --export means.

    Raises:
        ValueError: not one of those that are computed, or several, or h5py is missing.
    """
    from importlib.util import find_spec

    if name is None:
        return None
    chosen = [variant for variant in asked if variant[0] == name]
    if not chosen:
        raise ValueError(f"--export {name}: name one of scores={[name for name, _ in asked]}")
    if len(chosen) > 1:
        raise ValueError(f"--export {name}: there are {len(chosen)} temperatures, give one with temperatures=[1.0]")
    if find_spec("h5py") is None:
        raise ValueError("--export needs h5py: pip install h5py")
    return chosen[0]


def choose_device(name: str) -> str:
    """cuda or cpu; raises ValueError for a GPU that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; leave it out to compute on the CPU")
    return "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"


def known_precision(trained: str | None) -> str:
    """That of the run; raises ValueError where the logits cannot be computed in it."""
    from eomt.anomaly.evaluation import AUTOCAST

    if trained is not None and trained not in AUTOCAST:
        raise ValueError(f"the run's precision was {trained}: choose --precision from {', '.join(AUTOCAST)}")
    return trained or "bf16-mixed"


def open_datasets(settings: dict[str, Any]) -> "list[AnomalyDataset]":
    """The data sets that were named, or all that lie under the root.

    Raises:
        ValueError, FileNotFoundError: neither is given, or there is none.
    """
    from eomt.anomaly.datasets import BENCHMARKS, AnomalyDataset
    from eomt.anomaly.toy_anomalies import write_toy_anomalies

    names, root = settings["data"], settings["data.root"]
    draws = TOYS in names
    toys = [settings[key] for key in OF_TOYS]
    if not draws and toys != [SETTINGS[key] for key in OF_TOYS]:
        raise ValueError(f"{', '.join(OF_TOYS)} are for data={TOYS} only; leave them out")
    if not (names or root):
        raise ValueError(f"give data.root=FOLDER of the benchmarks, or data={TOYS}, which are drawn")
    if not names:
        places = {
            name: [Path(root).expanduser() / folder for folder in BENCHMARKS[name].folders] for name in BENCHMARKS
        }
        names = [name for name in places if any((place / "labels_masks").is_dir() for place in places[name])]
    if not names:
        folders = ", ".join(benchmark.folders[0] for benchmark in BENCHMARKS.values())
        raise FileNotFoundError(f"{root} holds none of {folders}, each with images/ and labels_masks/")
    return [
        AnomalyDataset(write_toy_anomalies(root, *toys) if draws and name == TOYS else root or "", name)
        for name in dict.fromkeys(names)
    ]


def identity(module: "MaskClassificationSemantic", dataset: "AnomalyDataset", precision: str) -> str:
    """A folder's name for the logits of these weights, adapters among them, on these images."""
    from eomt.fingerprints import combine_hashes, hash_tensors

    weights = combine_hashes(hash_tensors(module.network.state_dict()))
    facts = [weights, dict(module.hparams), dataset.fingerprint(), precision]
    return f"{dataset.name}_{hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]}"


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """A bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(list(items), what, console=console, transient=True, disable=not console.is_terminal)


def title_of(dataset: "AnomalyDataset") -> Any:
    """`progress` with the data set's name before what is done."""
    return lambda items, what: progress(items, f"{dataset.benchmark.title}: {what}")


def show(dataset: "AnomalyDataset", results: "list[Result]") -> None:
    """A line for each score and temperature."""
    from rich.console import Console
    from rich.table import Table

    table = Table("score", "T", "AuPRC", "FPR95", "sIoU", "PPV", "F1", box=None, padding=(0, 2, 0, 0))
    for result in results:
        facts = result.as_dict()
        shares = [facts[key] for key in ("auprc", "fpr95", "siou", "ppv", "component_f1")]
        table.add_row(
            result.score, f"{result.temperature:g}", *("-" if s is None else f"{100 * s:.2f}" for s in shares)
        )
    pixels, benchmark = results[0].pixels, dataset.benchmark
    print(
        f"{benchmark.title}: {len(dataset)} images; {pixels.valid:,} pixels ({benchmark.region}), "
        f"{100 * pixels.chance:.2f} % of them anomalous"
    )
    Console(width=120).print(table)
    if error := max(result.pixels.error for result in results):
        print(f"AuPRC and FPR95 are counted in bins, which makes them wrong by {100 * error:.1g} points at most")


def write(
    output: Path,
    dataset: "AnomalyDataset",
    results: "list[Result]",
    precision: str,
    module: "MaskClassificationSemantic",
) -> None:
    """All figures as JSON."""
    from eomt.anomaly.evaluation import SCHEMA_VERSION

    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": dataset.name,
        "title": dataset.benchmark.title,
        "images": len(dataset),
        "data": dataset.fingerprint(),
        "precision": precision,
        "img_size": list(module.hparams.img_size),
        "results": [result.as_dict() for result in results],
    }
    (output / f"{dataset.name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{output}/{dataset.name}.json")


def draw(
    output: Path,
    dataset: "AnomalyDataset",
    cache: "LogitCache",
    results: "list[Result]",
    count: int,
    num_classes: int,
) -> None:
    """Some images that show something unknown, spread over the data set; each score at T = 1, or else the first."""
    import numpy as np

    from eomt.anomaly.evaluation import score_maps
    from eomt.anomaly.metrics import ANOMALY
    from eomt.anomaly.scores import SCORES, usual_range
    from eomt.reporting.anomaly_pictures import HeatMap, Row, anomaly_picture

    drawn: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: result.temperature != 1):
        drawn.setdefault(result.score, result)
    shown = list(drawn.values())
    columns = [
        HeatMap(
            result.score + (f", T = {result.temperature:g}" if SCORES[result.score].tempered else ""),
            *usual_range(result.score, result.temperature, num_classes),
        )
        for result in shown
    ]
    showing = [i for i in range(len(dataset)) if (dataset.labels(i) == ANOMALY).any()]
    chosen = np.unique(np.linspace(0, len(showing) - 1, count).round().astype(int))
    rows = []
    for index in (showing[k] for k in chosen):
        image, labels = dataset[index]
        variants = [(result.score, result.temperature) for result in shown]
        maps = score_maps(cache.read(dataset.frames[index]), variants)
        pixels = image.permute(1, 2, 0).numpy()
        rows.append(Row(dataset.frames[index], pixels, labels.numpy(), [maps[variant] for variant in variants]))
    path = output / f"{dataset.name}.png"
    anomaly_picture(rows, columns, path, dataset.benchmark.title)
    print(path)


def export_maps(
    output: Path,
    dataset: "AnomalyDataset",
    cache: "LogitCache",
    frames: list[str],
    variant: "Variant",
    method: str,
) -> None:
    """One score's maps of all frames, those without labels too, for the SegmentMeIfYouCan benchmark."""
    from eomt.anomaly.evaluation import export, score_maps

    maps = (
        (frame, score_maps(cache.read(frame), [variant])[variant])
        for frame in progress(frames, f"{dataset.benchmark.title}: export")
    )
    folder = export(maps, output, method, dataset.benchmark.export_name)
    print(f"{folder}: {len(frames)} maps of {variant[0]}")


if __name__ == "__main__":
    sys.exit(main())
