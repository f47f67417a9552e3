"""Segments images or a video with a trained network and draws the classes that it sees."""

import argparse
import glob
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _data  # noqa: F401  finds a checkout that is not installed

if TYPE_CHECKING:  # torch and what needs it is imported late: --help answers at once
    from _video import Video
    from PIL import Image
    from rich.console import Console
    from torch import Tensor

    from eomt.data.labels import LabelSet
    from eomt.models.eomt import EoMT
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

EXAMPLES = """examples:
  python scripts/predict.py outputs/full/model street.jpg predictions
  python scripts/predict.py outputs/lora/adapter photos/ predictions --write overlay --device cuda
  python scripts/predict.py outputs/lora/adapter "photos/**/*_front.jpg" predictions --precision bf16-mixed
  python scripts/predict.py outputs/full/model drive.mp4 predictions
  python scripts/predict.py outputs/lora/adapter leftImg8bit/test submission --cityscapes-submission

OUTPUT/overlay/NAME.png is the image under its class colours, color/NAME.png the colours alone, index/NAME.png the
class of each pixel, 0 to K - 1 (8 bits); NAME keeps the sub-folders of INPUT. legend.png names the colours. A video
becomes overlay.mp4, and pictures of its frames if --write names any. Exit code 1 after an error or where files were
skipped, 2 for a mistyped command."""

KINDS = ("overlay", "index", "color")
SUBMISSION = "label ids"
OVERLAY_VIDEO = "overlay.mp4"


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    args = parse()
    try:
        tally = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if tally.skipped:
        total = tally.skipped + tally.written
        print(f"error: {tally.skipped} of {total} inputs were skipped, see the warnings above", file=sys.stderr)
    return 1 if tally.skipped else 0


def parse() -> argparse.Namespace:
    """The command line, checked as far as it can be without opening a file."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL INPUT OUTPUT [options]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="an adapter/ or model/ folder, or a checkpoint, of a run")
    add("input", metavar="INPUT", help='an image, a folder of images, a "quoted pattern" of images, or a video')
    add("output", metavar="OUTPUT", type=Path, help="folder to write to")
    add("--write", nargs="+", choices=KINDS, help="which pictures (default: all; of a video's frames: none)")
    add("--cityscapes-submission", action="store_true", help="only label ids, named as the benchmark server wants")
    add("--batch-size", type=positive, default=4, metavar="N", help="images per forward (default: %(default)s)")
    add("--workers", type=positive, default=4, metavar="N", help="threads that read and write (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)")
    add("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="(default: %(default)s)")
    add("--ckpt_path", help="the base weights of an adapter, if they have moved")
    args = parser.parse_args()
    if args.cityscapes_submission and args.write:
        parser.error("--cityscapes-submission writes label ids and nothing else: leave --write out")
    return args


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return int(text)


@dataclass
class Tally:
    """Pixels per class, and how many images or frames were written or could not be read."""

    pixels: "Tensor"
    written: int = 0
    skipped: int = 0


def run(args: argparse.Namespace) -> Tally:
    """Checks everything that can be checked, then predicts and writes.

    Raises:
        ValueError, OSError: input, output or network are not what they should be.
    """
    from _video import frame_image, write_video

    if args.output.is_file():
        raise ValueError(f"OUTPUT {args.output} is a file: name a folder")
    video = find_video(args)
    images = {} if video else find_images(args)

    import torch
    from rich.console import Console
    from rich.progress import track

    from eomt.inference.prediction import read_image
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; leave it out to compute on the CPU")
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    module = MaskClassificationSemantic.from_pretrained(args.model, args.ckpt_path).to(device)
    classes = classes_of(module)
    if args.cityscapes_submission:
        check_cityscapes(classes)

    console, tally = Console(stderr=True), Tally(torch.zeros(len(classes), dtype=torch.long))
    if video:
        readings, total = in_background(reader(frame_image), video.frames(), args.workers), video.length
    else:
        readings, total = in_background(reader(read_image), images.items(), args.workers), len(images)
    readings = track(readings, "Predicting", total, console=console, transient=True, disable=not console.is_terminal)

    def overlays() -> "Iterator[Image.Image | None]":
        """Reading, computing and writing, at the same time; the overlays in order."""
        predictions = predict_batches(module.network, whole(readings, tally, console), args)
        for picture, pixels in in_background(writer(args, classes, bool(video)), predictions, args.workers):
            tally.pixels += pixels
            tally.written += 1
            yield picture

    if video:
        write_video(args.output / OVERLAY_VIDEO, video.rate, overlays())
    else:
        deque(overlays(), maxlen=0)
    if not tally.written:
        raise ValueError(f"nothing in {args.input} could be read")
    if not args.cityscapes_submission:
        draw_legend(classes, args.output / "legend.png")
    show(classes, tally)
    print(f"{tally.written} {'frames' if video else 'images'} written to {args.output}")
    return tally


# What goes in


def find_video(args: argparse.Namespace) -> "Video | None":
    """INPUT, opened, if it is a video.

    Raises:
        ValueError: it is broken, or not what was asked for.
    """
    from _video import VIDEOS, Video

    path = Path(args.input).expanduser()
    if path.suffix.lower() not in VIDEOS or not path.is_file():
        return None
    if args.cityscapes_submission:
        raise ValueError(f"{path} is a video: a Cityscapes submission is made of the benchmark's images")
    if path.resolve() == (args.output / OVERLAY_VIDEO).resolve():
        raise ValueError(f"{path} would be overwritten: give another OUTPUT")
    return Video(path)


def find_images(args: argparse.Namespace) -> dict[str, Path]:
    """The images of INPUT by the name that their pictures get, without extension; never what lies below OUTPUT.

    Raises:
        FileNotFoundError: there are none. ValueError: two have one name, or one does not suit the benchmark.
    """
    from _video import VIDEOS

    from eomt.data.folder import PICTURES

    def is_image(path: Path) -> bool:
        return path.suffix.lower() in PICTURES and path.is_file()

    source = Path(args.input).expanduser()
    if source.is_dir():
        root, found = source, source.rglob("*")
    elif source.is_file():
        root, found = source.parent, [source]
    elif glob.has_magic(str(source)):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), source.parts))
        found = map(Path, glob.iglob(str(source), recursive=True))
    else:
        raise FileNotFoundError(f"{args.input}: no such file or folder")
    output = args.output.resolve()
    paths = sorted({path for path in found if is_image(path) and output not in path.resolve().parents})
    if not paths:
        raise FileNotFoundError(
            f"{args.input}: no image ({', '.join(PICTURES)}) outside of OUTPUT {args.output}, and no video "
            f"({', '.join(VIDEOS)})"
        )
    images: dict[str, Path] = {}
    for path in paths:
        name = submission_name(path) if args.cityscapes_submission else str(path.relative_to(root).with_suffix(""))
        if name in images:
            raise ValueError(f"{images[name]} and {path} would both be written to {name}.png: take one away")
        images[name] = path
    if args.cityscapes_submission:
        others = set(args.output.rglob("*.png")) - {args.output / f"{name}.png" for name in images}
        if others:
            raise ValueError(f"{min(others)} is in the way: the benchmark takes one PNG an image; give a fresh OUTPUT")
    return images


def submission_name(path: Path) -> str:
    """As the benchmark's evaluation finds it (cityscapesScripts, evalPixelLevelSemanticLabeling): CITY_SEQ_FRAME*."""
    match = re.match(r"[^_]+_\d{6}_\d{6}(?=[_.])", path.name)
    if not match:
        raise ValueError(f"{path}: a benchmark image is named like berlin_000000_000019_leftImg8bit.png; take it away")
    return f"{match[0]}_labelIds"


def classes_of(module: "MaskClassificationSemantic") -> "LabelSet":
    """Its names and colours; where a network was saved without colours, hues around the circle."""
    from colorsys import hsv_to_rgb

    from eomt.data.labels import LabelSet

    names = tuple(module.class_names)
    colors = module.hparams.class_colors or [
        [round(255 * channel) for channel in hsv_to_rgb(k / len(names), 0.9, 0.9)] for k in range(len(names))
    ]
    return LabelSet(names, tuple(map(tuple, colors)))


def check_cityscapes(classes: "LabelSet") -> None:
    """Raises ValueError unless these are the 19 classes of the benchmark, in its order."""
    from eomt.data.cityscapes import CITYSCAPES

    if classes.names != CITYSCAPES.names:
        raise ValueError(
            f"--cityscapes-submission needs a network of the 19 Cityscapes classes, this one has {len(classes)} "
            f"({', '.join(classes.names[:3])}, ...)"
        )


def in_background(function: Callable, items: Iterable, workers: int) -> Iterator:
    """`map` in threads: results in order, and never more than a few of them waiting to be taken."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def reader(read: "Callable[[Any], Tensor]") -> Callable:
    """Of (name, source): (name, image uint8 [3, H, W]), or (name, error) where it cannot be read."""

    def reading(item: tuple[str, Any]) -> "tuple[str, Tensor | Exception]":
        name, source = item
        try:
            return name, source if isinstance(source, Exception) else read(source)
        except (ValueError, OSError) as error:
            return name, error

    return reading


def whole(
    readings: "Iterable[tuple[str, Tensor | Exception]]", tally: Tally, console: "Console"
) -> "Iterator[tuple[str, Tensor]]":
    """What could be read; a line about the rest."""
    for name, image in readings:
        if isinstance(image, Exception):
            tally.skipped += 1
            console.print(f"warning: skipped: {image}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        else:
            yield name, image


# What comes out


def predict_batches(
    network: "EoMT", images: "Iterable[tuple[str, Tensor]]", args: argparse.Namespace
) -> "Iterator[tuple[str, Tensor, Tensor]]":
    """Name, image and class map uint8 [H, W] of each image; several go through the network together."""
    import torch

    from eomt.inference.prediction import predict_images

    device, images = network.q.weight.device.type, iter(images)
    while batch := list(islice(images, args.batch_size)):
        names, pixels = zip(*batch, strict=True)
        try:
            with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16-mixed"):
                maps = predict_images(network, pixels)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--batch-size {args.batch_size} is too much for the GPU's memory; lower it") from error
        yield from zip(names, pixels, maps, strict=True)


def writer(args: argparse.Namespace, classes: "LabelSet", is_video: bool) -> Callable:
    """Of (name, image, class map), writes the pictures asked for; gives the overlay, if drawn, and pixels per class."""
    import torch
    from PIL import Image

    from eomt.data.cityscapes import CITYSCAPES, TRAIN_ID_OF_ID
    from eomt.inference.prediction import overlay

    id_of_train_id = {train_id: label_id for label_id, train_id in TRAIN_ID_OF_ID.items()}
    label_ids = torch.tensor([id_of_train_id[k] for k in range(len(CITYSCAPES))], dtype=torch.uint8)
    draw = {
        "overlay": lambda image, labels: overlay(image, labels, classes),
        "index": lambda image, labels: Image.fromarray(labels.numpy()),
        "color": lambda image, labels: Image.fromarray(classes.colorize(labels).numpy()),
        SUBMISSION: lambda image, labels: Image.fromarray(label_ids[labels.long()].numpy()),
    }
    written = [SUBMISSION] if args.cityscapes_submission else args.write or ([] if is_video else KINDS)
    drawn = {*written, "overlay"} if is_video else written

    def writing(prediction: "tuple[str, Tensor, Tensor]") -> "tuple[Image.Image | None, Tensor]":
        name, image, labels = prediction
        pictures = {kind: draw[kind](image, labels) for kind in drawn}
        for kind in written:
            path = args.output / ("" if kind == SUBMISSION else kind) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures[kind].save(path)
        return pictures.get("overlay"), labels.flatten().bincount(minlength=len(classes))

    return writing


def draw_legend(classes: "LabelSet", path: Path) -> None:
    """A picture of every class's colour and name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    patches = [
        Patch(color=[channel / 255 for channel in color], label=name)
        for name, color in zip(classes.names, classes.colors, strict=True)
    ]
    figure = plt.figure(figsize=(2, 0.25 * len(patches)))
    figure.legend(handles=patches, loc="center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def show(classes: "LabelSet", tally: Tally) -> None:
    """The share of each class, largest first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "pixels")
    table.columns[1].justify = "right"
    total = int(tally.pixels.sum())
    for k in tally.pixels.argsort(descending=True).tolist():
        table.add_row(classes.names[k], f"{int(tally.pixels[k]) / total:.2%}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
