"""The mIoU of a saved network on a data set: at the images' own resolution, by the windows that training uses.

Without data=, on the data that it was trained on. Everything else comes with the model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.flags import add_output_dir, script_parser, script_words
from eomt.reporting.evaluation_report import evaluate_artefact

EXAMPLES = """examples:
  python scripts/evaluate.py outputs/lora/adapter                       # on the run's own data
  python scripts/evaluate.py outputs/lora/adapter data.root=/new/place  # which have moved
  python scripts/evaluate.py outputs/lora/checkpoints/last.ckpt data=cityscapes data.root=/data/cityscapes
  python scripts/evaluate.py outputs/camvid_dusk/adapter experiment=camvid_day data.root=/data/camvid"""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    places = {"ckpt_path": args.ckpt_path, "backbone_weights": args.backbone_weights}
    file = evaluate_artefact(args.model, args.overrides, args.output_dir, args.precision, **places)
    print(f"{file}, {file.stem}_confusion.csv, {file.stem}_confusion.png")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("model", type=Path, help="an adapter/ or model/ folder, a run's folder, or a checkpoint")
    add(
        "overrides", nargs="*", default=[], metavar="data=NAME data.key=value", help="or experiment=NAME data.key=value"
    )
    add("--precision", help="default: that of the run")
    add("--ckpt_path", help="the base weights of an adapter, if they have moved")
    add("--backbone_weights", help="the same for an adapter on a plain backbone from a file")
    add_output_dir(parser, "folder for the results; default: evaluation/ in the run's folder, or one in there")
    return parser.parse_intermixed_args(script_words(argv))


if __name__ == "__main__":
    sys.exit(main())
