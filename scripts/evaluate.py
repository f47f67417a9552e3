"""The mIoU of a saved network on a data set: at the images' own resolution, by the windows that training uses."""

import argparse
import json
import logging
import sys
from pathlib import Path

from _data import datasets_known, open_data

EXAMPLES = """examples:
  python scripts/evaluate.py outputs/lora/adapter data=cityscapes data.root=/data/cityscapes
  python scripts/evaluate.py outputs/camvid_day/model data=camvid data.root=/data/camvid \\
      data.sequences=[0001TP] data.val_share=0.4"""


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an adapter/ or model/ folder of a run")
    parser.add_argument("overrides", nargs="+", metavar="data=NAME data.key=value", help="as for train_with_lora.py")
    parser.add_argument("--precision", default="bf16-mixed", help="that of the run (default: %(default)s)")
    parser.add_argument("--ckpt_path", help="the base weights of an adapter, if they have moved")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    args = parser.parse_intermixed_args()
    if not any(override.startswith("data=") for override in args.overrides):
        parser.error("name a dataset: data=" + ", data=".join(datasets_known()))

    from eomt.training.evaluation import evaluate
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        module = MaskClassificationSemantic.from_pretrained(args.model, args.ckpt_path)
        name, datamodule = open_data(args.overrides, module.hparams.img_size, batch_size=1)
        scores = evaluate(module, datamodule, args.precision, progress=sys.stderr.isatty())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(f"{args.model} on {name}, {len(datamodule.val_set)} images: mIoU {100 * scores['miou']:.2f}", scores)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(scores, indent=2) + "\n")
    return 0


def show(title: str, scores: dict) -> None:
    """A table with the IoU of each class."""
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "IoU")
    for name, iou in scores["class_iou"].items():
        table.add_row(name, "absent" if iou != iou else f"{100 * iou:.2f}")
    print(title)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
