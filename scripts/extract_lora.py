"""Makes a LoRA adapter out of a finished full fine-tune, and says what each rank would have kept of it.

The change of every linear layer is cut to a rank by its singular values; queries and heads are copied. What is left
out, such as changed norms and biases, is named and measured. mIoU is told of every rank, without training again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.diagnosis.extraction import PLOT, RANKS, extract, print_facts
from eomt.flags import add_output_dir, output_dir, script_parser, script_words
from eomt.inference.saved import EXTRACTION_FILE

EXAMPLES = """examples:
  python scripts/extract_lora.py outputs/full outputs/source/model outputs/extracted --rank 16
  python scripts/extract_lora.py outputs/full/model timm extracted --targets attn.qkv attn.proj --no-scores

"targets" is the whole change of the adapted layers, whatever its rank, on the base's other weights; "full" is the
fine-tune itself; rank 0 is the base with the fine-tune's heads."""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    facts = extract(
        args.full,
        args.base,
        args.out,
        args.rank,
        targets=args.targets or (),
        ranks=args.ranks,
        overrides=args.overrides,
        scores=not args.no_scores,
    )
    print_facts(facts)
    print(f"{args.out}: an adapter of rank {args.rank}; {EXTRACTION_FILE} and {PLOT} say what each rank keeps")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("full", metavar="FULL", type=Path, help="a model/ folder of a full fine-tune, its run's folder or checkpoint")
    add("base", metavar="BASE", help="what it was trained from: an EoMT, a plain backbone, or timm")
    add_output_dir(parser, "folder to write; it must not hold anything yet", instead_of="OUT")
    add("overrides", nargs="*", default=[], metavar="data=NAME data.key=value", help="default: the data of the run")
    add("--rank", type=int, default=16, help="of the adapter (%(default)s)")
    add("--targets", nargs="+", metavar="LAYER", help="endings of names (default: every linear layer of the blocks)")
    add("--ranks", nargs="+", type=int, default=list(RANKS), help="to tell of (%(default)s)")
    add("--no-scores", action="store_true", help="tell of the weights alone: no data are needed")
    args = parser.parse_intermixed_args(script_words(argv))
    if args.output_dir and "=" in str(args.out):  # the first word about the data
        args.overrides, args.out = [str(args.out), *args.overrides], None
    args.out = output_dir(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
