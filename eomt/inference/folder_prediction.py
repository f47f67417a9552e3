"""Predicts the images of a folder or the frames of a video, and writes pictures of the classes.

Reading, computing and writing happen at the same time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from eomt.command_line import memory_explained
from eomt.data.cityscapes import CITYSCAPES, TRAIN_ID_OF_ID
from eomt.data.labels import LabelSet
from eomt.files import replacing
from eomt.inference.inputs import OVERLAY_VIDEO
from eomt.inference.prediction import Scorer, overlay, read_image
from eomt.inference.video import Video, frame_image, write_video

KINDS = ("overlay", "index", "color")
CONFIDENCE = "confidence"
CONFIDENCE_STEPS = 1000  # of a 16-bit picture, per 1 of a score: up to 65.535, as much as 65 queries can give together
SUBMISSION = "label ids"
Predicted = tuple[str, Tensor, Tensor, Tensor]  # name, image uint8 [3, H, W], class map uint8 and winning scores [H, W]


@dataclass
class Tally:
    """Counts pixels per class, and the images or frames that were written or could not be read."""

    pixels: Tensor
    written: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class FolderPrediction:
    """Predicts with one network and writes into one folder.

    Args:
        score: gives pixels their classes.
        classes: their names and colours.
        output: the folder to write to.
        kinds: the pictures of each image, among `KINDS` and `CONFIDENCE`, or `SUBMISSION` alone.
        batch_size: images in one forward.
        workers: threads that read, and as many that write.
    """

    score: Scorer
    classes: LabelSet
    output: Path
    kinds: Sequence[str] = KINDS
    batch_size: int = 4
    workers: int = 4
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def __call__(self, inputs: Video | dict[str, Path], source: str) -> Tally:
        """Writes the pictures of all inputs; an input that cannot be read is skipped with a warning.

        Args:
            inputs: see `find_inputs`. source: what the user called them, for the error.

        Raises:
            ValueError: nothing could be read, or a submission has other classes. RunError: memory ran out.
        """
        if SUBMISSION in self.kinds:
            _check_cityscapes(self.classes)
        tally = Tally(torch.zeros(len(self.classes), dtype=torch.long))
        if isinstance(inputs, Video):
            write_video(self.output / OVERLAY_VIDEO, inputs.rate, self._overlays(inputs, tally))
        else:
            deque(self._overlays(inputs, tally), maxlen=0)
        if not tally.written:
            raise ValueError(f"nothing in {source} could be read")
        if SUBMISSION not in self.kinds:
            _draw_legend(self.classes, self.output / "legend.png")
        return tally

    def _overlays(self, inputs: Video | dict[str, Path], tally: Tally) -> Iterator[Image.Image | None]:
        """Yields the overlays in order, where they are drawn, while everything is written and counted."""
        is_video = isinstance(inputs, Video)
        items, read = (inputs.frames(), frame_image) if is_video else (inputs.items(), read_image)
        readings = _in_background(_reader(read), items, self.workers)
        total = inputs.length if is_video else len(inputs)
        quiet = not self.console.is_terminal
        readings = track(readings, "Predicting", total, console=self.console, transient=True, disable=quiet)
        predictions = self._predict(self._readable(readings, tally))
        for picture, pixels in _in_background(self._writer(is_video), predictions, self.workers):
            tally.pixels += pixels
            tally.written += 1
            yield picture

    def _readable(
        self, readings: Iterable[tuple[str, Tensor | Exception]], tally: Tally
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the images that could be read, and prints a line about each of the others."""
        for name, image in readings:
            if isinstance(image, Exception):
                tally.skipped += 1
                line = f"warning: skipped: {image}"
                self.console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
            else:
                yield name, image

    def _predict(self, images: Iterator[tuple[str, Tensor]]) -> Iterator[Predicted]:
        """Yields what is predicted of each image; a batch goes through the network together."""
        while batch := list(islice(images, self.batch_size)):
            names, pixels = zip(*batch, strict=True)
            with memory_explained(partial(self._need_less, pixels)):
                maps = self.score(pixels)
            yield from ((name, image, *found) for name, image, found in zip(names, pixels, maps, strict=True))

    def _need_less(self, images: Sequence[Tensor]) -> str:
        """What to lower where these images take too much memory."""
        if len(images) > 1:
            return f"lower --batch-size, it is {self.batch_size}"
        return self.score.need_less

    def _writer(self, is_video: bool) -> Callable[[Predicted], tuple[Image.Image | None, Tensor]]:
        """Returns a function that writes a prediction, and returns its overlay, if drawn, and pixels per class."""
        draw = _drawings(self.classes)
        drawn = {*self.kinds, "overlay"} if is_video else self.kinds

        def write(prediction: Predicted) -> tuple[Image.Image | None, Tensor]:
            name, image, labels, scores = prediction
            pictures = {kind: draw[kind](image, labels, scores) for kind in drawn}
            for kind in self.kinds:
                path = self.output / ("" if kind == SUBMISSION else kind) / f"{name}.png"
                with replacing(path) as draft:
                    pictures[kind].save(draft)
            return pictures.get("overlay"), labels.flatten().bincount(minlength=len(self.classes))

        return write


def _drawings(classes: LabelSet) -> dict[str, Callable[[Tensor, Tensor, Tensor], Image.Image]]:
    """Returns for each kind of picture what draws it from image, class map and winning scores."""
    id_of_train_id = {train_id: label_id for label_id, train_id in TRAIN_ID_OF_ID.items()}
    label_ids = torch.tensor([id_of_train_id[k] for k in range(len(CITYSCAPES))], dtype=torch.uint8)
    return {
        "overlay": lambda image, labels, scores: overlay(image, labels, classes),
        "index": lambda image, labels, scores: Image.fromarray(labels.numpy()),
        "color": lambda image, labels, scores: Image.fromarray(classes.colorize(labels).numpy()),
        CONFIDENCE: lambda image, labels, scores: confidence_picture(scores),
        SUBMISSION: lambda image, labels, scores: Image.fromarray(label_ids[labels.long()].numpy()),
    }


def confidence_picture(scores: Tensor) -> Image.Image:
    """Winning scores, float [H, W], as gray values of 16 bits, in steps of 1 / `CONFIDENCE_STEPS`."""
    steps = (scores * CONFIDENCE_STEPS).round().clamp(0, np.iinfo(np.uint16).max)
    return Image.fromarray(steps.numpy().astype(np.uint16))


def _check_cityscapes(classes: LabelSet) -> None:
    """Raises ValueError unless these are the 19 classes of the benchmark, in its order."""
    if classes.names != CITYSCAPES.names:
        raise ValueError(
            f"--cityscapes-submission needs a network of the 19 Cityscapes classes, this one has {len(classes)} "
            f"({', '.join(classes.names[:3])}, ...)"
        )


def _in_background(function: Callable, items: Iterable, workers: int) -> Iterator:
    """Maps in threads: results come in order, and never more than a few of them wait to be taken."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _reader(read: Callable[[Any], Tensor]) -> Callable[[tuple[str, Any]], tuple[str, Tensor | Exception]]:
    """Returns a function from (name, source) to (name, image uint8 [3, H, W]), or to (name, error)."""

    def reading(item: tuple[str, Any]) -> tuple[str, Tensor | Exception]:
        name, source = item
        try:
            return name, source if isinstance(source, Exception) else read(source)
        except (ValueError, OSError) as error:
            return name, error

    return reading


def _draw_legend(classes: LabelSet, path: Path) -> None:
    """Writes a picture of every class's colour and name."""
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
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110, bbox_inches="tight")
    plt.close(figure)
