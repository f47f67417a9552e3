"""Estimates the cost of training before a card is rented: parameters, operations, memory, full, with LoRA, frozen.

A training step is run on tensors without values: no weights, no data and no GPU are needed. Overrides are those of
train_with_lora.py. A * marks what they ask for.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.cost.variant_costs import print_costs, variant_costs
from eomt.files import check_place, write_json
from eomt.flags import script_parser
from eomt.settings.compose import compose_run, plain

EXAMPLES = """examples:
  python scripts/cost.py model=vit_large lora=large
  python scripts/cost.py model=vit_large data.img_size=[640,640] data.batch_size=4 --memory 16
  python scripts/cost.py model=vit_base variant=lora_last_k trainer.precision=32-true --json cost.json
  python scripts/cost.py experiment=camvid_dusk model.num_classes=11

--memory leaves 1 GiB of the card to CUDA itself. Exit code 0, or 1 with one sentence."""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    for option in ("memory", "targets"):
        if (value := getattr(args, option)) is not None and not value > 0:
            raise ValueError(f"--{option} {value:g}: must be greater than 0")
    if args.json:
        check_place(args.json, of_file=True)
    words = [word.replace("data.img_size=", "model.img_size=", 1) for word in args.overrides]  # it is the model's
    facts = variant_costs(plain(compose_run(words)), args.memory, args.targets)
    print_costs(facts)
    if args.json:
        write_json(args.json, facts)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="group=choice key=value", help="as for train_with_lora.py")
    add("--memory", type=float, metavar="GIB", help="what fits a card of this size, and the largest batch")
    add("--targets", type=int, metavar="N", help="classes in an image; default: all of them, at most 19")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file, in bytes and operations")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
