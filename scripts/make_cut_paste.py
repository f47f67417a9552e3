"""Writes a training set with objects of no class pasted on it, in the layout of Cityscapes, and a list of them."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.files import check_place
from eomt.flags import add_output_dir, script_parser, script_words
from eomt.settings.compose import open_data

EXAMPLES = """examples:
  python scripts/make_cut_paste.py output_dir=pasted data=toy_streets data/cut_paste=toy
  python scripts/make_cut_paste.py output_dir=pasted data=cityscapes data.root=/data/cs data/cut_paste=folder \\
      data.cut_paste.cutouts.root=/data/objects data.cut_paste.probability=1 data.cut_paste.match_color=true
  python scripts/make_cut_paste.py output_dir=pasted --seed 1 data=cityscapes data.root=/data/cs data/cut_paste=coco \\
      data.cut_paste.cutouts.annotations=/data/coco/instances_train2017.json \\
      data.cut_paste.cutouts.images=/data/coco/train2017

Writes leftImg8bit/ and gtFine/ (label 254: outlier; validation images as they were), manifest.json and preview.png.
Train on it with data=cityscapes data.root=pasted. Exit code 1 if something is wrong."""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    if args.output_dir.exists():
        raise FileExistsError(
            f"{args.output_dir} is there already, and nothing is written over: give another --output_dir"
        )
    check_place(args.output_dir)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or more")
    # nothing is trained here: any crop size will do, and small data sets need no full batch
    name, data = open_data(args.overrides, img_size=[64, 64], batch_size=1)

    from eomt.anomaly.pasted_dataset import write_pasted_dataset
    from eomt.reporting.pictures import prediction_picture

    draw = partial(prediction_picture, columns=("image", "labels"))
    print(write_pasted_dataset(name, data, args.output_dir, args.seed, draw))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("overrides", nargs="+", metavar="data=NAME data.key=value", help="as for train_with_lora.py")
    add_output_dir(parser, "folder to write; it must not be there", required=True)
    add("--seed", type=int, default=0, help="what a run with this seed meets in its first epoch (default 0)")
    return parser.parse_intermixed_args(script_words(argv))


if __name__ == "__main__":
    sys.exit(main())
