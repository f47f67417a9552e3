"""Merges a LoRA adapter into its base: a full network in a model/ folder, without LoRA, for whatever loads an EoMT.

Merging is done in float32. Before anything is written, mask and class logits of the merged network are compared with
those of the unmerged one, on crops of real images: those of the run's own validation data, or of --images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.diagnosis.merging import merge_and_check
from eomt.flags import add_output_dir, output_dir, script_parser, script_words
from eomt.inference.saved import run_of
from eomt.places import as_typed

EXAMPLES = """examples:
  python scripts/merge_lora.py outputs/lora/adapter outputs/lora/model_merged
  python scripts/merge_lora.py adapter merged --images "photos/*.jpg" --ckpt_path /weights/eomt_large_640.bin

The two never agree to the last bit: merged, a layer computes (W + s B A) x; unmerged, W x + s B (A x). That is the same
number, rounded at other places, and float32 has 7 digits. Trained networks differ by some 1e-6 of the largest logit;
more than --tolerance means that something is wrong, and nothing is written."""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    merge_and_check(args.adapter, args.out, args.images, args.tolerance, args.ckpt_path, args.backbone_weights)
    data = "" if (run_of(args.out) / "config.yaml").is_file() else " data=NAME data.key=value"
    print(as_typed(f"Next:   python scripts/evaluate.py {args.out}{data}"))
    print(as_typed(f"        python scripts/predict.py {args.out} photos/ predictions/"))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", type=Path, help="an adapter/ folder, a LoRA run's folder, or its checkpoint")
    add_output_dir(parser, "folder to write; it must not hold anything yet", instead_of="OUT")
    add("--images", nargs="+", help="images to compare on: a folder, or a pattern (default: the run's validation data)")
    add("--ckpt_path", metavar="BASE", help="the base weights, if they have moved")
    add("--backbone_weights", metavar="BASE", help="the same for an adapter on a plain backbone from a file")
    add("--tolerance", type=float, default=1e-4, help="largest difference, relative to the largest logit (%(default)s)")
    args = parser.parse_args(script_words(argv))
    args.out = output_dir(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
