"""The mIoU of a saved network on a data set: at the images' own resolution, by the windows that training uses.

Without data=, on the data that it was trained on. Everything else comes with the model.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _data import data_of_run, open_data, run_of

if TYPE_CHECKING:
    from eomt.training.evaluation import Evaluation

EXAMPLES = """examples:
  python scripts/evaluate.py outputs/lora/adapter                       # on the run's own data
  python scripts/evaluate.py outputs/lora/adapter data.root=/new/place  # which have moved
  python scripts/evaluate.py outputs/lora/checkpoints/last.ckpt data=cityscapes data.root=/data/cityscapes
  python scripts/evaluate.py outputs/camvid_dusk/adapter experiment=camvid_day data.root=/data/camvid"""


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an adapter/ or model/ folder, a run's folder, or a checkpoint")
    parser.add_argument(
        "overrides", nargs="*", metavar="data=NAME data.key=value", help="or experiment=NAME data.key=value"
    )
    parser.add_argument("--precision", help="default: that of the run")
    parser.add_argument("--ckpt_path", help="the base weights of an adapter, if they have moved")
    parser.add_argument("--output", type=Path, help="folder for the results; default: evaluation/ in the run's folder")
    args = parser.parse_intermixed_args()

    from eomt.command_line import quiet_libraries
    from eomt.training.evaluation import evaluate
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    quiet_libraries()
    run = run_of(args.model)
    try:
        module = MaskClassificationSemantic.from_pretrained(args.model, args.ckpt_path)
        refuse_contradictions(dict(module.hparams), args.overrides)
        words = [word for word in args.overrides if not word.startswith("model.")]
        if any(word.startswith(("data=", "experiment=")) for word in words):
            name, datamodule = open_data(words, module.hparams.img_size, batch_size=1)
        else:
            name, datamodule = data_of_run(run, words)
        folder = args.output or run / "evaluation"
        keep_other_scores(folder / f"{name}.json", datamodule.val_set.fingerprint())
        precision = args.precision or module.trained_precision or "bf16-mixed"
        evaluation = evaluate(module, datamodule, precision, progress=sys.stderr.isatty(), description=name)
        show(f"{args.model} on {name}, {len(evaluation.confusion)} images, {precision}", evaluation)
        write(evaluation, folder, name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def keep_other_scores(path: Path, images: str) -> None:
    """Raises ValueError where the file holds scores on other images, or that cannot be written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and json.loads(path.read_text()).get("data") != images:
        raise ValueError(f"{path} holds scores on other images: give another folder with --output")


def refuse_contradictions(hparams: dict, overrides: Sequence[str]) -> None:
    """Raises ValueError where an override says something else than the model, or nothing that matters here."""
    import yaml

    for override in overrides:
        key, _, value = override.partition("=")
        group, _, name = key.lstrip("+").partition(".")
        if group not in ("data", "experiment", "model"):
            raise ValueError(f"{override}: only the data can be chosen here, with data=NAME data.key=value")
        carried = "img_size" if key == "data.img_size" else name if group == "model" else None
        if carried is not None and hparams.get(carried) != yaml.safe_load(value):
            raise ValueError(
                f"{override} contradicts the model, which carries {carried}={hparams.get(carried)}; leave it out"
            )


def show(title: str, evaluation: "Evaluation") -> None:
    """The score, and a table with the IoU of each class."""
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "IoU")
    for name, iou in evaluation.class_iou.items():
        table.add_row(name, "absent" if iou != iou else f"{100 * iou:.2f}")
    print(f"{title}: mIoU {100 * evaluation.miou:.2f}")
    Console().print(table)


def write(evaluation: "Evaluation", folder: Path, name: str) -> None:
    """Scores as JSON, the confusion matrix as CSV and picture, and the counts of every image."""
    from eomt.reporting.pictures import confusion_picture

    evaluation.save(folder, name)
    classes, counts = evaluation.facts["classes"], evaluation.confusion.sum(0)
    with (folder / f"{name}_confusion.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["target \\ prediction", *classes])
        rows.writerows([label, *row] for label, row in zip(classes, counts.tolist(), strict=True))
    confusion_picture(counts, classes, folder / f"{name}_confusion.png")
    print(f"{folder}/{name}.json, {name}_confusion.csv, {name}_confusion.png")


if __name__ == "__main__":
    sys.exit(main())
