"""Evaluating the runs that a report shows, as far as they have not been evaluated yet."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eomt.command_line import quiet_libraries
from eomt.comparison.cells import outdated, score_anomalies
from eomt.comparison.result_files import read_summary
from eomt.comparison.tuning import read_tuning
from eomt.files import check_place, read_yaml, write_json
from eomt.inference.saved import check_shipped, shipped
from eomt.settings.compose import data_of_run, open_data
from eomt.settings.formats import MATRIX, read_format

if TYPE_CHECKING:
    from torch import Tensor


COMPUTED_BY = ("precision", "accelerator")


def evaluate_run(run: Path, source: Sequence[str] = ()) -> None:
    """Scores the run's artefact on its own validation images and on the source domain: `evaluation/` in its folder.

    Raises:
        ValueError: the artefact does not score what the run reported.
    """
    summary = read_summary(run)
    if not summary:
        raise FileNotFoundError(f"{run} has no summary.json: give the folder of a run that ended")

    from eomt.reporting.run_summary import machine
    from eomt.training.evaluation import evaluate
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    quiet_libraries()
    artefact = shipped(run)
    check_shipped(artefact)
    module = MaskClassificationSemantic.from_pretrained(artefact)
    options = read_trainer(run) | {"progress": sys.stderr.isatty()}
    name, data = data_of_run(run)
    target = evaluate(module, data, description=name, **options)
    where = summary.get("machine")
    here = (
        isinstance(where, Mapping) and machine() | where == machine()
    )  # another one rounds otherwise, and a GPU in an order of its own
    exact = here and not where.get("gpus") and not module.hparams.compile
    if summary["miou"] is not None and abs(target.miou - summary["miou"]) > (1e-6 if exact else 1e-3):
        raise ValueError(
            f"{artefact} scores {target.miou:.7f}, but its run reported {summary['miou']:.7f}: "
            "data or device have changed since, evaluate where it was trained"
        )
    target.save(run / "evaluation", "target")
    if source:
        name, data = open_data(source, module.hparams.img_size, batch_size=1)
        evaluate(module, data, description=name, **options).save(run / "evaluation", "source")


def read_trainer(run: Path) -> dict[str, Any]:
    """Returns the arithmetic and the device that a run was trained with; ValueError where it does not say them."""
    file = run / "config.yaml"
    trainer = read_yaml(file).get("trainer")
    if not isinstance(trainer, Mapping) or (absent := [name for name in COMPUTED_BY if name not in trainer]):
        raise ValueError(
            f"{file} has no trainer.{absent[0] if isinstance(trainer, Mapping) else 'precision'}: put it back"
        )
    return {name: trainer[name] for name in COMPUTED_BY}


def report_runs(
    folders: Sequence[Path],
    output: Path,
    baseline: str | None,
    score: str | None,
    allow_different: bool,
    costs: Path | None = None,
) -> None:
    """Evaluates what has not been evaluated yet, and writes the report.

    `costs` is a folder of runs to take seconds and memory from, where each had the machine for itself.
    """
    from eomt.comparison.runs import load_runs, matrix_of
    from eomt.comparison.statistics import check_unique

    check_place(output)
    runs = load_runs(folders)
    check_unique(runs)
    for run in runs:
        folder = matrix_of(run.path)
        matrix = {"source": [], "anomaly": []} | (read_format(folder / "matrix.json", MATRIX) if folder else {})
        if run.error is None and outdated(run.path, run.path / "evaluation" / "target.json"):
            print(f"evaluating {run.path}")
            evaluate_run(run.path, matrix["source"])
        untried = [name for name in matrix["anomaly"] if name not in run.anomaly_errors]
        if run.error is None and (errors := score_anomalies(run.path, matrix | {"anomaly": untried}, dict(os.environ))):
            write_json(run.path / "cell.json", run.cell | {"anomaly_errors": run.anomaly_errors | errors})
        old = [name for name in run.anomalies if outdated(run.path, run.path / "anomaly" / f"{name}.json")]
        if run.error is None and old:
            raise ValueError(
                f"{run.path}/anomaly/{old[0]}.json is not of the network that the run ended with: score again with "
                f"scripts/evaluate_anomaly.py {run.path} data={old[0]}, or delete it"
            )
    from eomt.comparison.page import write_report

    runs = load_runs(folders)
    variants = dict.fromkeys((folder, run.variant) for run in runs if (folder := matrix_of(run.path)))
    matrices = dict.fromkeys(folder for folder, _ in variants)
    tunings = [t for matrix in matrices for t in read_tuning(matrix) if (matrix, t["variant"]) in variants]
    measured = load_runs([costs]) if costs else ()
    write_report(runs, output, baseline, allow_different, predictions, score, tunings, measured)
    print(f"{output}/report.html, report.md, report.csv, report.json, report.tex")


def predictions(run: Path, names: Sequence[str]) -> "dict[str, tuple[Tensor, Tensor, Tensor]]":
    """Image, target and what the run's artefact sees, of validation images by name."""
    import torch
    from rich.progress import track

    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    module = MaskClassificationSemantic.from_pretrained(shipped(run))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module.to(device)
    images = data_of_run(run)[1].val_set
    pictures = {}
    with torch.autocast(device, torch.bfloat16, enabled="bf16" in (module.trained_precision or "")):
        for name in track(names, f"pictures of {run}", transient=True):
            image, target = images[images.names.index(name)]
            pictures[name] = (image, target, module.predict(image))
    return pictures
