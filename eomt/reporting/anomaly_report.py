"""Scores a saved network on anomaly benchmarks, and writes results, pictures and maps.

The network runs once over every image; all scores and temperatures come from its logits, which stay on disk.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eomt.anomaly.datasets import AnomalyDataset
from eomt.anomaly.evaluation import AUTOCAST, LogitCache, Result, evaluate, export, score_maps
from eomt.anomaly.metrics import ANOMALY
from eomt.anomaly.request import OF_TOYS, TOYS, choose_benchmarks
from eomt.anomaly.scores import SCORES, Variant, usual_range
from eomt.anomaly.toy_anomalies import write_toy_anomalies
from eomt.command_line import out_of_memory
from eomt.files import replacing, write_json
from eomt.fingerprints import combine_hashes, hash_tensors
from eomt.inference.saved import check_shipped, find_artefact, keep_other_network, results_of
from eomt.reporting.anomaly_pictures import HeatMap, Row, anomaly_picture
from eomt.settings import formats
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The way an evaluation is done, and the place of its results.

    Args:
        output: folder of the results.
        cache: folder of the logits; None: `logits` in `output`.
        precision: a key of `AUTOCAST`; None: that of the run.
        device: "auto", "cpu" or "cuda".
        components: judge components, too, which takes as long again.
        pictures: how many images to draw.
        export: the score and temperature whose maps are written for the SegmentMeIfYouCan benchmark.
        method: its name there.
    """

    output: Path
    cache: Path | None = None
    precision: str | None = None
    device: str = "auto"
    components: bool = True
    pictures: int = 4
    export: Variant | None = None
    method: str = "EoMT-LoRA"


def evaluate_benchmarks(
    model: Path,
    settings: Mapping[str, Any],
    asked: Sequence[Variant],
    options: Options,
    ckpt_path: str | None = None,
    backbone_weights: str | None = None,
) -> None:
    """Scores a saved network on every benchmark in turn: logits, metrics, table, pictures, export.

    Args:
        model: an adapter/ or model/ folder, a run's folder, or a checkpoint.
        settings: as `eomt.anomaly.request.parse` returns them.
        asked: scores and their temperatures.
        options: see `Options`.
        ckpt_path, backbone_weights: the base weights of an adapter, if they have moved.

    A benchmark that cannot be used is named, and ends none of the others.

    Raises:
        ValueError, OSError: network or options are not what they should be, or, after all others, benchmarks.
    """
    found = find_artefact(model)
    if found.is_dir():
        check_shipped(found)
    datasets, faults = open_datasets(settings)  # before the network has run over all of them
    device = choose_device(options.device)
    if datasets:
        module = MaskClassificationSemantic.from_pretrained(model, ckpt_path, backbone_weights)
        options = replace(options, precision=options.precision or known_precision(module.trained_precision))
    if options.output != results_of(model, "anomaly"):
        for dataset in datasets:
            keep_other_network(options.output / f"{dataset.name}.json", module.artefact_id)
    for dataset in datasets:
        with collected(faults, dataset.name, alone=len(datasets) + len(faults) == 1):
            evaluate_benchmark(module, dataset, asked, options, device)
    if faults:
        raise ValueError("; ".join(f"{name}: {fault}" for name, fault in faults.items()))


def evaluate_benchmark(
    module: MaskClassificationSemantic,
    dataset: AnomalyDataset,
    asked: Sequence[Variant],
    options: Options,
    device: str,
) -> None:
    """Scores a network on one benchmark; see `evaluate_benchmarks`."""
    folder = (options.cache or options.output / "logits") / identity(module, dataset, options.precision)
    cache, title = LogitCache(folder), dataset.benchmark.title
    wanted = [*dataset.frames, *(dataset.unlabelled if options.export else [])]
    images = [(frame, partial(dataset.image, i)) for i, frame in enumerate(wanted)]
    cache.fill(module.network, progress(images, f"{title}: network"), device, options.precision)
    results = evaluate(cache, dataset, asked, title_of(dataset), with_components=options.components, device=device)
    print_results(dataset, results)
    write_results(options.output, dataset, results, options.precision, module)
    if options.pictures > 0:
        count, num_classes = options.pictures, module.hparams.num_classes
        draw(options.output, dataset, cache, results, count=count, num_classes=num_classes)
    if options.export:
        export_maps(options, dataset, cache, wanted)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: the logits, {size / 2**20:,.0f} MiB, for further scores; delete them when done")


@contextmanager
def collected(faults: dict[str, str], name: str, alone: bool) -> Iterator[None]:
    """Keeps what is wrong with a benchmark, so that others are still scored; unless it is alone, says so at once."""
    try:
        yield
    except (ValueError, OSError) as error:
        if out_of_memory(error):
            raise
        faults[name] = str(error)
        if not alone:
            logger.warning("%s is left out: %s", name, error)


def open_datasets(settings: Mapping[str, Any]) -> tuple[list[AnomalyDataset], dict[str, str]]:
    """Opens and checks the benchmarks of `choose_benchmarks`, and raises as it does; draws toy anomalies.

    Returns:
        Those that can be used, and what is wrong with the others, by name.
    """
    names, root = choose_benchmarks(settings), settings["data.root"] or ""
    roots = dict.fromkeys(names, root)
    if TOYS in settings["data"]:
        roots[TOYS] = write_toy_anomalies(root or None, *(settings[key] for key in OF_TOYS))
    datasets, faults = [], {}
    for name in names:
        with collected(faults, name, alone=len(names) == 1):
            dataset = AnomalyDataset(roots[name], name)
            dataset.check()
            datasets.append(dataset)
    return datasets, faults


def choose_device(name: str) -> str:
    """Returns cuda or cpu; raises ValueError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; leave it out to compute on the CPU")
    return "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"


def known_precision(trained: str | None) -> str:
    """Returns the precision of the run; raises ValueError where the logits cannot be computed in it."""
    if trained is not None and trained not in AUTOCAST:
        raise ValueError(f"the run's precision was {trained}: choose --precision from {', '.join(AUTOCAST)}")
    return trained or "bf16-mixed"


def identity(module: MaskClassificationSemantic, dataset: AnomalyDataset, precision: str) -> str:
    """Returns a folder's name for the logits of these weights, adapters among them, on these images."""
    weights = combine_hashes(hash_tensors(module.network.state_dict()))
    facts = [weights, dict(module.hparams), dataset.fingerprint(labels=False), precision]
    return f"{dataset.name}_{hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]}"


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """Returns the items, counted by a bar on a terminal."""
    console = Console(stderr=True)
    return track(list(items), what, console=console, transient=True, disable=not console.is_terminal)


def title_of(dataset: AnomalyDataset) -> Any:
    """Returns `progress` with the data set's name before what is done."""
    return lambda items, what: progress(items, f"{dataset.benchmark.title}: {what}")


def print_results(dataset: AnomalyDataset, results: Sequence[Result]) -> None:
    """Prints a line for each score and temperature, in %."""
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


def write_results(
    output: Path,
    dataset: AnomalyDataset,
    results: Sequence[Result],
    precision: str,
    module: MaskClassificationSemantic,
) -> None:
    """Writes all figures to `BENCHMARK.json`."""
    path = output / f"{dataset.name}.json"
    facts = {
        "benchmark": dataset.name,
        "title": dataset.benchmark.title,
        "images": len(dataset),
        "data": dataset.fingerprint(),
        "precision": precision,
        "img_size": list(module.hparams.img_size),
        "artefact_id": module.artefact_id,
        "results": [result.as_dict() for result in results],
    }
    write_json(path, formats.stamped(formats.ANOMALY, facts))
    print(path)


def draw(
    output: Path, dataset: AnomalyDataset, cache: LogitCache, results: Sequence[Result], count: int, num_classes: int
) -> None:
    """Writes a PNG of images that show something unknown, spread over the data set, under each score's heat map.

    A score is drawn at temperature 1, or else at the first one.
    """
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
    with replacing(path) as draft:
        anomaly_picture(rows, columns, draft, dataset.benchmark.title)
    print(path)


def export_maps(options: Options, dataset: AnomalyDataset, cache: LogitCache, frames: Sequence[str]) -> None:
    """Writes one score's maps of all frames, those without labels too, for the SegmentMeIfYouCan benchmark."""
    variant, benchmark = options.export, dataset.benchmark
    maps = (
        (frame, score_maps(cache.read(frame), [variant])[variant])
        for frame in progress(frames, f"{benchmark.title}: export")
    )
    folder = export(maps, options.output, options.method, benchmark.export_name)
    print(f"{folder}: {len(frames)} maps of {variant[0]}")
