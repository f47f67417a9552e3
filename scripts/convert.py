"""Converts a saved network into the files of another program, and says what it recognised."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import _checkout  # noqa: F401

from eomt.command_line import printable, reports_errors
from eomt.exchange.extras import require
from eomt.exchange.opening import recognised, refuse_size
from eomt.files import check_place
from eomt.flags import add_output_dir, output_dir, positive, script_parser, script_words
from eomt.settings.hub import here, named_on_hub, pinned

if TYPE_CHECKING:  # mistakes are told before torch is there
    from torch import Tensor

    from eomt.exchange.deployed import Signature
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

EXAMPLES = """examples:
  python scripts/convert.py outputs/lora/adapter eomt_hf --to hf
  python scripts/convert.py eomt_hf outputs/model --to eomt
  python scripts/convert.py peft_on_transformers outputs/adapter --to adapter --ckpt_path eomt_hf
  python scripts/convert.py outputs/lora/adapter network.onnx --to onnx
  python scripts/convert.py outputs/lora/adapter network.onnx --to onnx --batch 1   # for TensorRT
  python scripts/convert.py outputs/full/model network.pt2 --to pt2 --outputs queries --input float

IN is a model/ or adapter/ folder, a run's folder or checkpoint of this project, a published EoMT (.bin, .ckpt,
.safetensors), a folder of transformers' EoMT, or an exported EoMT of LightlyTrain. An adapter is merged into its base
first, in float32, except for --to adapter. docs/exchange.md says who reads whose files, docs/exported.md what those of
onnx and pt2 hold."""
TOOLS = ("onnx", "onnxscript", "onnxruntime")  # that write and check ONNX files
PRECISIONS = ("fp32", "fp16", "fp16-arithmetic", "int8-weights", "int8-dynamic")
EXPORT_OPTIONS = ("outputs", "input", "batch", "images")


def to_eomt(args: argparse.Namespace) -> None:
    """A model/ folder of this project."""
    open_network(args).save_pretrained(args.out)


def to_adapter(args: argparse.Namespace) -> None:
    """An adapter/ folder of this project."""
    refuse_size(args.source, args.img_size)

    from eomt.exchange.adapters import write_adapter

    write_adapter(args.source, args.out, args.ckpt_path, args.backbone_weights)


def to_hf(args: argparse.Namespace) -> None:
    """A folder that transformers opens."""
    require("hf", "--to hf", "transformers")  # before the network is opened
    from eomt.exchange.hf import write_hf

    difference = write_hf(open_network(args), args.out)
    print(f"The logits of transformers' network differ by {difference:.1e} of the largest, on random pixels")


def to_onnx(args: argparse.Namespace) -> None:
    """One ONNX file."""
    require("onnx", "--to onnx", *TOOLS)
    network, crops = open_with_crops(args)
    from eomt.exchange.onnx_export import export_onnx

    print(f"  {export_onnx(network, args.out, crops, signature(args), args.precision or 'fp32')}")


def to_pt2(args: argparse.Namespace) -> None:
    """A package of torch.export."""
    network, crops = open_with_crops(args)
    from eomt.exchange.torch_package import export_package

    print(f"  {export_package(network, args.out, crops, signature(args))}")


def open_with_crops(args: argparse.Namespace) -> "tuple[MaskClassificationSemantic, Tensor]":
    """Returns the network and the crops uint8 [n, 3, H, W] that its file is compared with it on."""
    from eomt.inference.crops import crops_or_drawings, find_images
    from eomt.inference.saved import run_of

    pictures = find_images(args.images) if args.images else []
    network = open_network(args)

    import torch

    crops, source = crops_or_drawings(pictures, run_of(args.source), network.hparams.img_size)
    print(f"Comparing on {len(crops)} crops of {source}")
    return network, torch.stack(crops)


def signature(args: argparse.Namespace) -> "Signature":
    """What the file is to take and to return."""
    from eomt.exchange.deployed import Signature

    return Signature(args.outputs or "classes", args.input or "uint8", args.batch, args.size or "fixed")


TARGETS: dict[str, Callable[[argparse.Namespace], None]] = {
    "adapter": to_adapter,
    "eomt": to_eomt,
    "hf": to_hf,
    "onnx": to_onnx,
    "pt2": to_pt2,
}
ONE_FILE = ("onnx", "pt2")  # targets that are a file, not a folder
OPTIONS = {"onnx": (*EXPORT_OPTIONS, "precision", "size"), "pt2": EXPORT_OPTIONS}  # of a target alone


def open_network(args: argparse.Namespace) -> "MaskClassificationSemantic":
    """Returns the network that is meant, an adapter merged, in evaluation mode; see `open_merged`."""
    from eomt.exchange.opening import open_merged

    return open_merged(args.source, args.ckpt_path, args.backbone_weights, args.img_size)


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    check_place(args.out, of_file=args.to in ONE_FILE, empty=True)
    place = named_on_hub(args.source)
    args.source = here(args.source)
    print(printable(f"{pinned(str(place)) if place else args.source}: {recognised(args.source)}"))
    TARGETS[args.to](args)
    print(f"Wrote {args.out}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("source", metavar="IN", help="an adapter/ or model/ folder, a checkpoint, another program's file, or user/name")
    add_output_dir(parser, "what to write; it must not hold anything yet", instead_of="OUT")
    add("--to", required=True, choices=sorted(TARGETS), help="whose files to write")
    add(
        "--outputs", choices=("classes", "queries"), help="of onnx, pt2: scores of each pixel (default), or the queries"
    )
    add("--input", choices=("uint8", "float"), help="of onnx, pt2: images 0 to 255 (default), or in [0, 1]")
    add("--batch", type=positive, metavar="N", help="of onnx, pt2: images at a time (default: any number)")
    add("--size", choices=("fixed", "free"), help="of images in onnx; free: any, of DINOv3 (default: fixed)")
    add("--precision", choices=PRECISIONS, metavar="KIND", help=f"of onnx: {', '.join(PRECISIONS)} (default: fp32)")
    add("--images", nargs="+", help="of onnx, pt2: what to compare on (default: the run's data)")
    add("--ckpt_path", metavar="BASE", help="the base weights of an adapter, if they have moved")
    add("--backbone_weights", metavar="BASE", help="the same for an adapter on a plain backbone from a file")
    add(
        "--img_size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of another program's file (default: as it says)",
    )
    args = parser.parse_args(script_words(argv))
    args.out = output_dir(parser, args)
    for name in sorted({name for names in OPTIONS.values() for name in names}):
        if getattr(args, name) is not None and name not in OPTIONS.get(args.to, ()):
            parser.error(f"--{name} is not for --to {args.to}: leave it out")
    if args.to in ONE_FILE and args.out.suffix != f".{args.to}":
        parser.error(f"OUT {args.out}: the file is known by its ending; name it {args.out.with_suffix('.' + args.to)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
