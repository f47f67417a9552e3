"""Reads every file of a dataset once and reports what is in it: counts, sizes, class shares, broken files, pictures."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.files import check_place
from eomt.settings.compose import datasets_known, open_data

EXAMPLES = """examples:
  python scripts/dataset_report.py data=toy_streets
  python scripts/dataset_report.py data=toy_streets data.domain=night_fog --split val
  python scripts/dataset_report.py data=cityscapes data.root=/data/cityscapes data.num_workers=8
  python scripts/dataset_report.py data=camvid data.root=/data/camvid data.sequences=[0001TP] data.val_share=0.4

Writes report.md, counts.json and grid.png. Exit code 1 if a file is broken, 2 if the dataset cannot be read at all."""


@reports_errors(2)
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a file is broken, or 2 with one sentence."""
    args = parse(argv)
    if args.out:
        check_place(args.out)
    # nothing is trained here: any crop size will do, and small datasets need no full batch
    name, datamodule = open_data(args.overrides, img_size=[64, 64], batch_size=1)

    from eomt.reporting.dataset_report import report_dataset

    out = args.out or Path("outputs", "dataset_report", name)
    whole = report_dataset(name, datamodule, out, ("train", "val") if args.split == "all" else (args.split,))
    print(f"Wrote report.md, counts.json and grid.png to {out}")
    return 0 if whole else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, which names a data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="+", metavar="data=NAME data.key=value", help="as for train_with_lora.py")
    add("--out", type=Path, help="folder to write to (default: outputs/dataset_report/NAME)")
    add("--split", choices=("train", "val", "all"), default="all")
    args = parser.parse_intermixed_args(argv)
    if not any(override.startswith("data=") for override in args.overrides):
        parser.error("name a dataset: data=" + ", data=".join(datasets_known()))
    return args


if __name__ == "__main__":
    sys.exit(main())
