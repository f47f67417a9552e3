"""Converts a saved network into the files of another program, and says what it recognised."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.exchange.opening import need_transformers, recognised
from eomt.files import check_place

if TYPE_CHECKING:  # mistakes are told before torch is there
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

EXAMPLES = """examples:
  python scripts/convert.py outputs/lora/adapter eomt_hf --to hf
  python scripts/convert.py eomt_hf outputs/model --to eomt
  python scripts/convert.py peft_on_transformers outputs/adapter --to adapter --ckpt_path eomt_hf

IN is a model/ or adapter/ folder, a run's folder or checkpoint of this project, a published EoMT (.bin, .ckpt,
.safetensors), a folder of transformers' EoMT, or an exported EoMT of LightlyTrain. An adapter is merged into its base
first, in float32, except for --to adapter. docs/exchange.md says who reads whose files."""


def to_eomt(args: argparse.Namespace) -> None:
    """A model/ folder of this project."""
    open_network(args).save_pretrained(args.out)


def to_adapter(args: argparse.Namespace) -> None:
    """An adapter/ folder of this project."""
    from eomt.exchange.adapters import write_adapter

    write_adapter(args.source, args.out, args.ckpt_path, args.backbone_weights)


def to_hf(args: argparse.Namespace) -> None:
    """A folder that transformers opens."""
    need_transformers()  # before the network is opened
    from eomt.exchange.hf import write_hf

    difference = write_hf(open_network(args), args.out)
    print(f"The logits of transformers' network differ by {difference:.1e} of the largest, on random pixels")


TARGETS: dict[str, Callable[[argparse.Namespace], None]] = {
    "adapter": to_adapter,
    "eomt": to_eomt,
    "hf": to_hf,
}
ONE_FILE: tuple[str, ...] = ()  # targets that are a file, not a folder


def open_network(args: argparse.Namespace) -> "MaskClassificationSemantic":
    """Returns the network that is meant, an adapter merged, in evaluation mode; see `open_merged`."""
    from eomt.exchange.opening import open_merged

    return open_merged(args.source, args.ckpt_path, args.backbone_weights, args.img_size)


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    check_place(args.out, of_file=args.to in ONE_FILE)
    if args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not empty: choose a new place")
    print(f"{args.source}: {recognised(args.source)}")
    TARGETS[args.to](args)
    print(f"Wrote {args.out}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="IN", type=Path, help="an adapter/ or model/ folder, a checkpoint, or another program's file")
    add("out", metavar="OUT", type=Path, help="what to write; it must not hold anything yet")
    add("--to", required=True, choices=sorted(TARGETS), help="whose files to write")
    add("--ckpt_path", metavar="BASE", help="the base weights of an adapter, if they have moved")
    add("--backbone_weights", metavar="BASE", help="the same for an adapter on a plain backbone from a file")
    add("--img_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of a file that does not say it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
