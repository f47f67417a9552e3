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
  python scripts/evaluate.py outputs/lora/adapter
  python scripts/evaluate.py outputs/lora/checkpoints/last.ckpt data=cityscapes data.root=/data/cityscapes
  python scripts/evaluate.py outputs/camvid_dusk/adapter experiment=camvid_day data.root=/data/camvid"""


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an adapter/ or model/ folder, a run's folder, or a checkpoint")
    parser.add_argument(
        "overrides", nargs="*", metavar="data=NAME data.key=value", help="or experiment=NAME, for its data"
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
        if args.overrides:
            name, datamodule = open_data(args.overrides, module.hparams.img_size, batch_size=1)
        else:
            name, datamodule = data_of_run(run)
        precision = args.precision or precision_of(args.model)
        evaluation = evaluate(
            module, datamodule, precision, sys.stderr.isatty(), " ".join(map(str, [args.model, *args.overrides]))
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(f"{args.model} on {name}, {len(evaluation.confusion)} images, {precision}", evaluation)
    write(evaluation, args.output or run / "evaluation", name)
    return 0


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


def precision_of(model: Path) -> str:
    """In which precision the model was trained, so that its score is found again."""
    import yaml

    config = run_of(model) / "config.yaml"
    if config.is_file():
        return yaml.safe_load(config.read_text())["trainer"]["precision"]
    settings = model / "eomt_config.json"
    found = json.loads(settings.read_text()).get("precision") if settings.is_file() else None
    return found or "bf16-mixed"


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
