"""Reads and writes videos, frame by frame, with PyAV; needs no torch until a frame becomes a tensor."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from eomt.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")


class Video:
    """A video file, opened.

    Attributes:
        rate: frames per second.
        length: number of frames; None where the file does not say.

    Raises:
        ValueError: PyAV is not installed, or the file is no video.
    """

    def __init__(self, path: Path) -> None:
        av = _import_av()
        self.path = path
        try:
            self.container = av.open(str(path))
            self.stream = self.container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{path} is broken or no video: replace the file") from error
        self.stream.thread_type = "AUTO"  # decodes ahead
        self.rate: Fraction = self.stream.average_rate or self.stream.guessed_rate
        self.length = self.stream.frames or None

    def frames(self) -> Iterator[tuple[str, Any]]:
        """Yields names and frames of PyAV; where the file is damaged, a ValueError stands in place of the rest."""
        from av import FFmpegError

        count = 0
        try:
            with self.container:
                for frame in self.container.decode(self.stream):
                    yield f"{count:06d}", frame
                    count += 1
        except FFmpegError:
            yield "", ValueError(f"{self.path} from frame {count} on, where it is damaged")


def frame_image(frame: Any) -> "Tensor":
    """Returns a frame as image uint8 [3, H, W], upright: telephones film sideways and say so beside the picture."""
    import torch

    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def write_video(path: Path, rate: Fraction, pictures: Iterable[Image.Image]) -> None:
    """Writes H.264 in a container that the extension names; writes nothing without pictures.

    An odd last row or column is left out, as the codec needs.
    """
    av = _import_av()
    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        return
    width, height = (side // 2 * 2 for side in first.size)
    with replacing(path, alone=True) as draft, av.open(str(draft), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"  # what every player shows
        for picture in chain([first], pictures):
            frame = av.VideoFrame.from_image(picture.crop((0, 0, width, height)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _import_av() -> Any:
    """Returns PyAV, which only videos need."""
    try:
        import av
    except ImportError as error:
        raise ValueError("videos need PyAV: pip install av") from error
    return av
