"""Scores a saved network on a data set, and writes the scores with tables and a picture of the confusions."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eomt.command_line import quiet_libraries
from eomt.data.identity import same_files
from eomt.files import check_place, replacing
from eomt.inference.saved import check_artefact, check_shipped, keep_other_network, read_config, results_of, run_of
from eomt.settings.compose import check_data_for, data_for
from eomt.settings.formats import EVALUATION, read_format

if TYPE_CHECKING:  # mistakes are told before torch is there
    from eomt.training.evaluation import Evaluation


def evaluate_artefact(
    model: Path,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    precision: str | None = None,
    ckpt_path: str | None = None,
    backbone_weights: str | None = None,
) -> Path:
    """Scores a saved network at the images' own resolution, prints its IoUs, and writes them.

    Args:
        model: an adapter/ or model/ folder, a run's folder, or a checkpoint.
        overrides: `data=NAME data.key=value` or `experiment=NAME data.key=value`; without a name the data of the run.
        output: folder for the results; None: evaluation/ in the run's folder, and in there a folder of its own for
            what the run did not ship.
        precision: as Lightning takes it; None: that of the run.
        ckpt_path, backbone_weights: the base weights of an adapter, if they have moved.

    Returns:
        The file of scores, `NAME.json`; beside it are `NAME.npz`, `NAME_confusion.csv` and `NAME_confusion.png`.

    Raises:
        ValueError, OSError: model or data are not what they should be, contradict each other, or the file holds scores
            on other images, or in a given folder of another network.
    """
    found = check_artefact(model)
    place, run = output or results_of(model, "evaluation"), run_of(model)
    words = [word for word in overrides if not word.startswith("model.")]
    refuse_other_groups(overrides)
    check_place(place)
    check_data_for(run, words)
    if found.is_dir():  # a checkpoint is read with torch
        check_shipped(found)
        refuse_contradictions(read_config(found)["init"], overrides)

    from eomt.training.evaluation import evaluate
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    quiet_libraries()
    module = MaskClassificationSemantic.from_pretrained(model, ckpt_path, backbone_weights)
    refuse_contradictions(dict(module.hparams), overrides)
    name, data = data_for(run, words, module.hparams.img_size)
    file = place / f"{name}.json"
    keep_other_scores(file, data.val_set.fingerprint())
    if output:
        keep_other_network(file, module.artefact_id)
    precision = precision or module.trained_precision or "bf16-mixed"
    evaluation = evaluate(module, data, precision, progress=sys.stderr.isatty(), description=name)
    evaluation.save(file.parent, name)
    title = f"{model} on {name}, {len(evaluation.confusion)} images, {precision}: {miou_words(evaluation)}"
    write_confusion(evaluation, file.with_name(f"{name}_confusion.csv"), title)
    print_scores(title, evaluation)
    return file


def refuse_other_groups(overrides: Sequence[str]) -> None:
    """Raises ValueError where an override is about anything but the data or the model."""
    for override in overrides:
        if override.partition("=")[0].lstrip("+").partition(".")[0] not in ("data", "experiment", "model"):
            raise ValueError(f"{override}: only the data can be chosen here, with data=NAME data.key=value")


def refuse_contradictions(hparams: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raises ValueError where an override says something else than the model."""
    for override in overrides:
        key, _, value = override.partition("=")
        group, _, name = key.lstrip("+").partition(".")
        carried = "img_size" if key == "data.img_size" else name if group == "model" else None
        if carried is not None and hparams.get(carried) != yaml.safe_load(value):
            raise ValueError(
                f"{override} contradicts the model, which carries {carried}={hparams.get(carried)}; leave it out"
            )


def keep_other_scores(path: Path, images: str) -> None:
    """Raises ValueError where the file holds scores on other images; OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    same = same_files(read_format(path, EVALUATION).get("data"), images) if path.is_file() else True
    if not same:
        what = "other images" if same is False else "images that an earlier version knew by their sizes alone"
        raise ValueError(f"{path} holds scores on {what}: give another folder with --output_dir")


def print_scores(title: str, evaluation: "Evaluation") -> None:
    """Prints the title, and a table with the IoU of each class in %."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("class", "IoU")
    for name, iou in evaluation.class_iou.items():
        table.add_row(escape(name), "absent" if iou != iou else f"{100 * iou:.2f}")
    print(title)
    Console().print(table)


def miou_words(evaluation: "Evaluation") -> str:
    """`mIoU 61.02 over 10 of 11 classes`, in percent."""
    from eomt.training.class_scores import over

    return f"mIoU {100 * evaluation.miou:.2f}{over(evaluation.class_iou)}"


def write_confusion(evaluation: "Evaluation", path: Path, title: str) -> None:
    """Writes the confusion counts of all images as CSV, and as a PNG beside it."""
    from eomt.reporting.pictures import confusion_picture

    classes, counts = evaluation.facts["classes"], evaluation.confusion.sum(0)
    with replacing(path) as draft, draft.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["target \\ prediction", *classes])
        rows.writerows([label, *row] for label, row in zip(classes, counts.tolist(), strict=True))
    with replacing(path.with_suffix(".png")) as draft:
        confusion_picture(counts, classes, draft, title)
