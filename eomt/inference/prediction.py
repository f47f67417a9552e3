"""From an image, wherever it comes from, to the class of each of its pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eomt.data.labels import LabelSet
from eomt.data.pictures import decode_picture, to_rgb, upright
from eomt.inference.windows import score_images, winners
from eomt.lora.probing import evaluating
from eomt.models.eomt import EoMT

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def predict(network: EoMT, image: ImageLike) -> Tensor:
    """Class map uint8 [H, W] of one image, on the CPU, at the image's own resolution.

    Args:
        image: a file, a Pillow image, an array uint8 [H, W, 3] or a tensor uint8 [3, H, W]; see `to_image`.
    """
    return predict_images(network, [to_image(image)])[0]


def predict_images(network: EoMT, images: Sequence[Tensor]) -> list[Tensor]:
    """Class maps uint8 [H, W], on the CPU, of images uint8 [3, H, W] that may differ in size, in one forward."""
    return [labels for labels, _ in TorchScorer(network)(images)]


class Scorer(Protocol):
    """What gives pixels their classes: a network in torch, or an ONNX file."""

    @property
    def need_less(self) -> str:
        """What to change where one image takes too much memory."""
        ...

    def __call__(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each image, uint8 [3, H, W], its class map uint8 [H, W] and the winning scores, float32 [H, W]."""
        ...


@dataclass(frozen=True)
class TorchScorer:
    """A network on the device that computes; `autocast`: in bfloat16."""

    network: EoMT
    autocast: bool = False

    @property
    def need_less(self) -> str:
        return need_less(self.network.encoder.img_size, "bf16-mixed" if self.autocast else "32-true")

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See `Scorer`; all images go through the network in one forward."""
        device = self.network.q.weight.device.type
        with evaluating(self.network), torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return [tuple(each.cpu() for each in winners(strips)) for strips in score_images(self.network, images)]


def need_less(window: Sequence[int], precision: str) -> str:
    """What to change where an image takes too much memory; windows are of (height, width)."""
    change = "" if precision == "bf16-mixed" else f"take --precision bf16-mixed (now {precision}), or "
    return f"all windows of an image, {window[0]}x{window[1]} each, are in it at once: {change}smaller images"


def to_image(image: ImageLike) -> Tensor:
    """Image uint8 [3, H, W], RGB, 0..255: the network normalises by itself.

    Args:
        image: a file, a Pillow image, an array uint8 [H, W, 3] or a tensor uint8 [3, H, W].

    Raises:
        ValueError: other shapes or numbers (floats may have been normalised already), or a broken file.
        TypeError: something else.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return _to_tensor(upright(image), "the image")
    if isinstance(image, np.ndarray):
        _check(image.dtype, image.shape, channels=-1, wanted="an array uint8 [H, W, 3]")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: views may be read-only or run backwards
    if isinstance(image, Tensor):
        _check(image.dtype, image.shape, channels=0, wanted="a tensor uint8 [3, H, W]")
        return image
    raise TypeError(f"{type(image).__name__} is no image: give a path, a Pillow image, a numpy array or a tensor")


def read_image(path: str | Path) -> Tensor:
    """Image uint8 [3, H, W], RGB, upright as its EXIF tag says, transparency ignored.

    Raises:
        ValueError: the file is broken, no picture, too large, or has pixels of no known range.
        FileNotFoundError: there is none.
    """
    picture = decode_picture(Path(path).read_bytes(), str(path))
    return _to_tensor(upright(picture), str(path))


def overlay(image: Tensor, labels: Tensor, classes: LabelSet, opacity: float = 0.5) -> Image.Image:
    """Image uint8 [3, H, W] under the colours of its class map uint8 [H, W], which cover it by `opacity`, 0 to 1."""
    photo = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    return Image.blend(photo, Image.fromarray(classes.colorize(labels).numpy()), opacity)


def _to_tensor(picture: Image.Image, name: str) -> Tensor:
    return torch.from_numpy(np.array(to_rgb(picture, name))).permute(2, 0, 1)


def _check(dtype: object, shape: Sequence[int], channels: int, wanted: str) -> None:
    """Raises ValueError unless these are the bytes of a colour image that is not empty."""
    if dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"the image is {dtype}: give {wanted} with values 0..255, not normalised")
    if len(shape) != 3 or shape[channels] != 3 or 0 in shape:
        raise ValueError(f"the image has shape {list(shape)}: give {wanted}, RGB")
