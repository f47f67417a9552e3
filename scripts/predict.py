"""Segments images or a video with a trained network and draws the classes that it sees."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _checkout  # noqa: F401

from eomt.command_line import fail, printable, reports_errors
from eomt.flags import add_output_dir, output_dir, positive, script_parser, script_words

if TYPE_CHECKING:  # torch and what needs it is imported late: --help answers at once
    from eomt.data.labels import LabelSet
    from eomt.inference.folder_prediction import Tally
    from eomt.inference.prediction import Scorer

EXAMPLES = """examples:
  python scripts/predict.py outputs/full/model street.jpg predictions
  python scripts/predict.py outputs/lora/adapter photos/ predictions --write overlay --device cuda
  python scripts/predict.py outputs/lora/adapter "photos/**/*_front.jpg" predictions --precision bf16-mixed
  python scripts/predict.py outputs/full/model drive.mp4 predictions
  python scripts/predict.py outputs/lora/adapter leftImg8bit/test submission --cityscapes-submission
  python scripts/predict.py network.onnx photos/ predictions --confidence

OUTPUT/overlay/NAME.png is the image under its class colours, color/NAME.png the colours alone, index/NAME.png the
class of each pixel, 0 to K - 1 (8 bits); confidence/NAME.png the score that its class won with, in thousandths
(16 bits; scores are sums over queries, and may be above 1); NAME keeps the sub-folders of INPUT. legend.png names the
colours. A video becomes overlay.mp4, and pictures of its frames if --write names any. Exit code 1 after an error or
where files were skipped, 2 for a mistyped command."""

KINDS = ("overlay", "index", "color")


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    tally = run(args)
    if tally.skipped:
        total = tally.skipped + tally.written
        return fail(f"{tally.skipped} of {total} inputs were skipped, see the warnings above", 1)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line and checks it as far as it can be without opening a file."""
    parser = script_parser(__doc__, EXAMPLES, usage="%(prog)s MODEL INPUT OUTPUT [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="an adapter/ or model/ folder, a checkpoint, or an ONNX file")
    add("input", metavar="INPUT", help='an image, a folder of images, a "quoted pattern" of images, or a video')
    add_output_dir(parser, "folder to write to", instead_of="OUTPUT")
    add("--write", nargs="+", choices=KINDS, help="which pictures (default: all; of a video's frames: none)")
    add("--confidence", action="store_true", help="write the winning score of each pixel, too")
    add("--cityscapes-submission", action="store_true", help="only label ids, named as the benchmark server wants")
    add("--batch-size", type=positive, default=4, metavar="N", help="images per forward (default: %(default)s)")
    add("--workers", type=positive, default=4, metavar="N", help="threads that read and write (default: %(default)s)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: a GPU if there is one; for ONNX files the CPU",
    )
    add("--precision", choices=("32-true", "bf16-mixed"), help="(default: 32-true)")
    add("--int8", choices=("weights", "dynamic"), help="round linear layers to 8 bits: weights alone, or inputs, too")
    add("--ckpt_path", help="the base weights of an adapter, if they have moved")
    add("--backbone_weights", help="the same for an adapter on a plain backbone from a file")
    args = parser.parse_args(script_words(argv))
    args.output_dir = output_dir(parser, args)
    if args.cityscapes_submission and args.write:
        parser.error("--cityscapes-submission writes label ids and nothing else: leave --write out")
    if args.cityscapes_submission and args.confidence:
        parser.error("--cityscapes-submission writes label ids and nothing else: leave --confidence out")
    if is_onnx(args.model):
        for name in ("precision", "int8", "ckpt_path", "backbone_weights"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} is for networks of torch; an ONNX file has everything in it: leave it out")
    if args.int8 and args.precision == "bf16-mixed":
        parser.error("--int8 computes the rest in float32: leave --precision bf16-mixed out")
    return args


def is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx"


def run(args: argparse.Namespace) -> "Tally":
    """Checks everything that can be checked, then predicts and writes.

    Raises:
        ValueError, OSError: input, output or network are not what they should be.
    """
    from eomt.inference.inputs import find_inputs

    inputs = find_inputs(args.input, args.output_dir, args.cityscapes_submission)
    score, classes = open_onnx(args) if is_onnx(args.model) else open_network(args)
    is_video = not isinstance(inputs, dict)

    from eomt.inference.folder_prediction import CONFIDENCE, SUBMISSION, FolderPrediction

    kinds = [*(args.write or ([] if is_video else KINDS)), *([CONFIDENCE] if args.confidence else [])]
    predict = FolderPrediction(
        score,
        classes,
        args.output_dir,
        [SUBMISSION] if args.cityscapes_submission else kinds,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    tally = predict(inputs, args.input)
    show(classes, tally)
    print(f"{tally.written} {'frames' if is_video else 'images'} written to {args.output_dir}")
    return tally


def open_network(args: argparse.Namespace) -> "tuple[Scorer, LabelSet]":
    """Opens what a run saved, on the device that computes."""
    from eomt.exchange.extras import require
    from eomt.inference.saved import check_artefact

    check_artefact(args.model)
    if args.int8:
        require("int8", "--int8", "torchao")

    import torch

    from eomt.data.labels import LabelSet
    from eomt.exchange.opening import open_merged
    from eomt.exchange.quantised import quantise
    from eomt.inference.prediction import TorchScorer
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; leave it out to compute on the CPU")
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    open_ = open_merged if args.int8 else MaskClassificationSemantic.from_pretrained
    module = open_(args.model, args.ckpt_path, args.backbone_weights).to(device)
    if args.int8:
        quantise(module.network, args.int8)
    classes = LabelSet.of(module.class_names, module.hparams.class_colors)
    return TorchScorer(module.network, autocast=args.precision == "bf16-mixed"), classes


def open_onnx(args: argparse.Namespace) -> "tuple[Scorer, LabelSet]":
    """Opens an ONNX file; on the GPU only if asked to, since another one may be meant for torch."""
    from eomt.data.labels import LabelSet
    from eomt.exchange.onnx_scorer import OnnxScorer

    score = OnnxScorer(args.model, "cuda" if args.device == "cuda" else "cpu")
    return score, LabelSet.of(score.facts["class_names"], score.facts["class_colors"])


def show(classes: "LabelSet", tally: "Tally") -> None:
    """Prints the share of each class, largest first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("class", "pixels")
    table.columns[1].justify = "right"
    total = int(tally.pixels.sum())
    for k in tally.pixels.argsort(descending=True).tolist():
        table.add_row(escape(printable(classes.names[k])), f"{int(tally.pixels[k]) / total:.2%}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
