"""Run folders, read back: what a run was meant to be, what it reported, and how it was evaluated."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eomt.anomaly.benchmarks import BENCHMARKS
from eomt.comparison.counts import hits_and_unions, mean_iou
from eomt.comparison.result_files import read_confusion, read_scores, read_sequences, read_summary
from eomt.comparison.tuning import FOLDER
from eomt.files import read_yaml
from eomt.fingerprints import Identity
from eomt.settings.formats import CELL, EVALUATION, MATRIX, read_format

SUBSET = re.compile(r"data\.train_images=\d+")


@dataclass(frozen=True)
class Evaluation:
    """Scores of one network on one set of images.

    `counts` are float64 [N, 2, K], per image and class the pixels in intersection and union, or None where only the
    scores are known.
    """

    miou: float
    class_iou: dict[str, float | None]
    data: str | None
    img_size: tuple[int, ...]
    precision: str | None
    description: str = ""
    colors: tuple[tuple[int, int, int], ...] = ()
    images: tuple[str, ...] = ()
    sequences: tuple[str | None, ...] = ()  # of each image, or nothing where they are not known
    counts: np.ndarray | None = field(default=None, compare=False)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.class_iou)


@dataclass(frozen=True)
class AnomalyEvaluation:
    """The metrics of one network's anomaly scores on one benchmark.

    `auprc` and `fpr95` are in [0, 1], by score (`rba`, or `msp@0.5` at another temperature than 1), None where they are
    undefined; `error` is what counting pixels in bins may have made in them.
    """

    title: str
    data: str | None  # a hash of the images
    images: int
    anomalous: int
    valid: int  # pixels that count
    img_size: tuple[int, ...]
    precision: str | None
    auprc: dict[str, float | None]
    fpr95: dict[str, float | None]
    error: dict[str, float]


@dataclass
class Run:
    """A run folder: what it was meant to be, what it reported, and its evaluations by domain and anomaly benchmark."""

    path: Path
    variant: str
    seed: int | None
    config: dict[str, Any]
    summary: dict[str, Any]
    cell: dict[str, Any]
    evaluations: dict[str, Evaluation]
    anomalies: dict[str, AnomalyEvaluation]  # by benchmark, in the order of tables
    curve: list[tuple[int, float]]  # (step, mIoU) of every validation
    parts: int  # more than one means resumed

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed}" + ("" if self.subset is None else f" on {self.subset} images")

    @property
    def target(self) -> Evaluation | None:
        return self.evaluations.get("target")

    @property
    def error(self) -> str | None:
        """The reason why this run has no place in a mean, or None."""
        status = self.summary.get("status", "it has not finished (no summary.json)")
        if self.cell.get("status") == "failed":
            return self.cell.get("error") or status
        if status != "finished":
            return status.removeprefix("failed: ")
        return None if self.target else "it finished without a score (no validation, no evaluation/target.json)"

    @property
    def anomaly_errors(self) -> dict[str, str]:
        """The reasons why benchmarks have no scores, by benchmark."""
        return self.cell.get("anomaly_errors") or {}

    @property
    def steps(self) -> int | None:
        return self.summary.get("steps")

    @property
    def subset(self) -> int | None:
        """How many of the training images it was given; None: all. Of a refused run only its command tells."""
        words = [word for word in self.cell.get("command") or () if SUBSET.fullmatch(word)]
        told = int(words[-1].partition("=")[2]) if words else None
        return (self.config.get("data") or {}).get("train_images", told)

    @property
    def kept(self) -> str:
        """The validation whose network was evaluated: "best" or "last"."""
        return ((self.config.get("callbacks") or {}).get("save_best") or {}).get("keep", "best")

    @property
    def start(self) -> Identity:
        """The weights before the first step."""
        return Identity.from_dict(self.summary.get("start_fingerprint"), self.summary.get("start_weights"))

    @property
    def batches(self) -> Identity:
        """The first training batches."""
        return Identity.from_dict(self.summary.get("batches"), self.summary.get("batch_contents"))

    @property
    def images_per_step(self) -> str:
        """Batch size x accumulated batches x devices."""
        data, trainer = self.config.get("data") or {}, self.config.get("trainer") or {}
        return f"{data.get('batch_size')} x {trainer.get('accumulate_grad_batches', 1)} x {trainer.get('devices', 1)}"

    @property
    def trainable(self) -> int | None:
        """Parameters that were trained: none in a run of 0 steps."""
        return 0 if self.steps == 0 else self.summary.get("trainable_parameters")

    @property
    def class_head(self) -> str:
        """The head of its class logits: linear or arcface."""
        return (self.config.get("model") or {}).get("head") or "linear"

    @property
    def pasted(self) -> dict[str, Any] | None:
        """The settings for pasting objects on its training scenes; None: nothing is pasted."""
        return (self.config.get("data") or {}).get("cut_paste")

    @property
    def method(self) -> tuple[Any, ...]:
        """The parts of it that concern anomalies: class head, outlier loss, pasted objects."""
        return self.class_head, (self.config.get("model") or {}).get("outlier_loss"), self.pasted

    @property
    def uses_lora(self) -> bool:
        return bool(self.config.get("model", {}).get("use_lora"))

    def seconds(self, part: str) -> float | None:
        """Median seconds per step: "total", "data" or "compute"."""
        return (self.summary.get("seconds_per_step") or {}).get(part) if self.steps else None

    @property
    def training_seconds(self) -> float | None:
        """Steps times seconds per step, which a resumed run knows, too."""
        return None if self.seconds("total") is None else self.steps * self.seconds("total")

    @property
    def artefact_bytes(self) -> int | None:
        """Bytes of the folder to ship."""
        folder = f"{self.summary.get('artefact')}/"
        sizes = [size for name, size in self.summary.get("files", {}).items() if name.startswith(folder)]
        return sum(sizes) if sizes else None

    @property
    def checkpoint_bytes(self) -> int | None:
        return self.summary.get("files", {}).get("checkpoints/last.ckpt")


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders and below them, by variant and seed.

    Variants come in the order of `matrix.json`, the others after them by trainable parameters.

    Raises:
        FileNotFoundError: a folder is not there, or holds no run.
        ValueError: a file that cannot be read, or whose parts contradict each other.
    """
    order: list[str] = []
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; give run folders or folders that hold them")
        found = list(_find_runs(path, order))
        if not found:
            raise FileNotFoundError(f"{path} holds no run: one has config.yaml, summary.json or cell.json")
        folders |= {folder.resolve(): folder for folder in found}
    runs = [_load_run(folder) for folder in folders.values()]
    ranks = {variant: rank for rank, variant in reversed(list(enumerate(order)))}
    size: dict[str, int] = {}
    for run in runs:
        size[run.variant] = max(size.get(run.variant, 0), run.trainable or 0)
    return sorted(
        runs,
        key=lambda run: (ranks.get(run.variant, len(order)), size[run.variant], run.variant, str(run.seed).zfill(9)),
    )


def matrix_of(run: Path) -> Path | None:
    """The folder of the matrix that a run belongs to: VARIANT/seed_N, or VARIANT/images_N/seed_N, lies in it."""
    return next((folder for folder in run.resolve().parents[1:3] if (folder / "matrix.json").is_file()), None)


def _find_runs(folder: Path, order: list[str]) -> Iterator[Path]:
    """Run folders at or below a folder; adds the variants that matrix files name to `order`."""
    matrix = folder / "matrix.json"
    if matrix.is_file():
        order += read_format(matrix, MATRIX, {}).get("variants", [])
    elif any((folder / name).is_file() for name in ("config.yaml", "summary.json", "cell.json")):
        yield folder
        return
    for child in sorted(folder.iterdir()):
        trials = matrix.is_file() and child.name == FOLDER
        if child.is_dir() and not child.name.startswith(".") and not trials:
            yield from _find_runs(child, order)


def _load_run(folder: Path) -> Run:
    config = read_yaml(folder / "config.yaml", {})
    summary, cell = read_summary(folder), read_format(folder / "cell.json", CELL, {})
    evaluations = {domain: _load_evaluation(folder / "evaluation" / domain) for domain in ("target", "source")}
    evaluations["target"] = evaluations["target"] or _own_validation(config, summary)
    seeds = (config.get("seed"), summary.get("seed"), cell.get("seed"))
    curve, parts = read_curve(folder)
    return Run(
        path=folder,
        variant=config.get("variant") or cell.get("variant") or _derived_variant(config, summary),
        seed=next((seed for seed in seeds if seed is not None), None),
        config=config,
        summary=summary,
        cell=cell,
        evaluations={domain: scores for domain, scores in evaluations.items() if scores},
        anomalies=_load_anomalies(folder / "anomaly"),
        curve=curve,
        parts=max(parts, summary.get("parts", 1)),
    )


def _derived_variant(config: dict[str, Any], summary: dict[str, Any]) -> str:
    """A label from the settings, for a run that was given none."""
    model = config.get("model") or {}
    frozen = model.get("freeze") or []
    if summary.get("steps") == 0:
        return "none"
    if model.get("use_lora"):
        return f"lora_r{model.get('lora_rank')}"
    if model.get("unfreeze_last_n"):
        return f"last_{model['unfreeze_last_n']}"
    if "backbone" in frozen:
        return "head"
    return "_".join(["without", *frozen]) if frozen else "full"


def _load_evaluation(path: Path) -> Evaluation | None:
    """`path`.json with `path`.npz, whose scores must agree."""
    file, arrays = path.with_suffix(".json"), path.with_suffix(".npz")
    facts = read_format(file, EVALUATION, {})
    if not facts:
        return None
    scores, counts = facts["class_iou"], None
    if arrays.is_file():
        counts = hits_and_unions(read_confusion(arrays, facts))
        found = float(mean_iou(counts.sum(0)))
        if not abs(found - facts["miou"]) < 1e-4:
            raise ValueError(f"{arrays} counts mIoU {found:.4f}, {file.name} says {facts['miou']:.4f}: evaluate again")
    return Evaluation(
        miou=facts["miou"],
        class_iou={name: scores.get(name) for name in facts["classes"]},
        data=facts.get("data"),
        img_size=tuple(facts.get("img_size") or ()),
        precision=facts.get("precision"),
        description=facts.get("description") or "",
        colors=tuple(map(tuple, facts.get("class_colors") or ())),
        images=tuple(facts["images"]),
        sequences=read_sequences(file, facts),
        counts=counts,
    )


def _load_anomalies(folder: Path) -> dict[str, AnomalyEvaluation]:
    """Reads the results of `scripts/evaluate_anomaly.py` for each benchmark, in the order of their registry."""
    files = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: _load_anomaly(path) for name, path in files.items() if path.is_file()}


def _load_anomaly(path: Path) -> AnomalyEvaluation:
    facts = read_scores(path)
    results = {
        result["score"] if result["temperature"] == 1 else f"{result['score']}@{result['temperature']:g}": result
        for result in facts["results"]
    }
    first = facts["results"][0]
    return AnomalyEvaluation(
        title=facts["title"],
        data=facts.get("data"),
        images=facts["images"],
        anomalous=first["anomalous"],
        valid=first["valid"],
        img_size=tuple(facts.get("img_size") or ()),
        precision=facts.get("precision"),
        auprc={name: result["auprc"] for name, result in results.items()},
        fpr95={name: result["fpr95"] for name, result in results.items()},
        error={name: result.get("error") or 0 for name, result in results.items()},
    )


def _own_validation(config: dict[str, Any], summary: dict[str, Any]) -> Evaluation | None:
    """The run's own validation, where it was not evaluated afterwards."""
    if summary.get("miou") is None:
        return None
    return Evaluation(
        miou=summary["miou"],
        class_iou=summary.get("class_iou") or {},
        data=(summary.get("data") or {}).get("val"),
        img_size=tuple((config.get("model") or {}).get("img_size") or ()),
        precision=(config.get("trainer") or {}).get("precision"),
        description="the run's own validation",
    )


def read_curve(folder: Path) -> tuple[list[tuple[int, float]], int]:
    """(step, val/miou) of every validation and the number of metrics files.

    Runs of earlier versions have a file for each part: what one logged beyond the checkpoint that the next began with
    is replaced by that one.
    """
    earlier = sorted(folder.glob("metrics_*.csv"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    files = [*earlier, *folder.glob("metrics.csv")]
    curve: list[tuple[int, float]] = []
    for path in files:
        steps, points = _read_metrics(path)
        if steps:
            curve = [point for point in curve if point[0] < steps[0]]
        curve += points
    return curve, len(files)


def _read_metrics(path: Path) -> tuple[list[int], list[tuple[int, float]]]:
    """The step of each row, and (step, val/miou) of those with a validation; ValueError where one is no number."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
        if "step" not in (reader.fieldnames or ["step"]):
            raise ValueError("there is no column step")
        steps = [int(float(row["step"])) for row in rows]
        validated = [(step, row["val/miou"]) for step, row in zip(steps, rows, strict=True) if row.get("val/miou")]
        return steps, [(step, float(miou)) for step, miou in validated]
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise ValueError(f"{path} holds no metrics by step ({error}): put back what the run wrote") from error
