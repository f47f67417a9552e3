"""Augmentation of uint8 images and label maps, as in the published EoMT recipe.

Source: Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025, and its code.
Every draw comes from torch's random generator, so that a seed fixes a run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from eomt.data.labels import IGNORE

BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 18 / 360  # largest deviations; hue in turns
MAX_TRIES = 10  # crops drawn in search of a labelled pixel


class TrainTransform:
    """Colour jitter, flip, scale jitter, padding and a random crop that shows at least one class.

    Takes image uint8 [3, H, W] and labels uint8 [H, W]; returns uint8 [3, h, w] and [h, w], contiguous.

    Args:
        img_size: (height, width) of the crop.
        scale_range: Factors on the scale at which the image just fits into the crop size, aspect ratio kept.
        color_jitter: Whether colours are changed at random.
        flip: Whether half of the images are mirrored.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        scale_range: Sequence[float] = (0.5, 2.0),
        color_jitter: bool = True,
        flip: bool = True,
    ) -> None:
        if len(img_size) != 2 or min(img_size) < 1:
            raise ValueError(f"img_size must be (height, width), both positive, got {tuple(img_size)}.")
        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range must be (low, high) with 0 < low <= high, got {tuple(scale_range)}.")
        self.img_size = (int(img_size[0]), int(img_size[1]))
        self.scale_range = (float(scale_range[0]), float(scale_range[1]))
        self.color_jitter = color_jitter
        self.flip = flip

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.flip and _coin():
            image, labels = F.horizontal_flip(image), F.horizontal_flip(labels)
        image, labels = self.resize(image, labels)
        if self.color_jitter:  # after resizing: the same colours from fewer pixels
            image = jitter_colors(image)
        image, labels = self.pad(image, labels)
        top, left = choose_crop(labels, self.img_size)
        window = (..., slice(top, top + self.img_size[0]), slice(left, left + self.img_size[1]))
        return image[window].contiguous(), labels[window].contiguous()

    def resize(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both at a random scale in `scale_range`, relative to fitting the image into the crop."""
        height, width = labels.shape
        fit = min(self.img_size[0] / height, self.img_size[1] / width)
        scale = fit * _uniform(*self.scale_range)
        size = [max(1, int(height * scale)), max(1, int(width * scale))]
        image = F.resize(image, size, InterpolationMode.BILINEAR, antialias=True)
        labels = F.resize(labels[None], size, InterpolationMode.NEAREST)[0]
        return image, labels

    def pad(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pads at the bottom and on the right up to the crop size: image 0, labels IGNORE."""
        bottom, right = (max(0, side - have) for side, have in zip(self.img_size, labels.shape, strict=True))
        return F.pad(image, [0, 0, right, bottom]), F.pad(labels[None], [0, 0, right, bottom], fill=IGNORE)[0]


def choose_crop(labels: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Top and left of a random crop with a labelled pixel in it, if the labels [H, W] have one at all."""
    (height, width), (h, w) = labels.shape, size
    for _ in range(MAX_TRIES):
        top, left = _randint(0, height - h), _randint(0, width - w)
        if (labels[top : top + h, left : left + w] != IGNORE).any():
            return top, left
    labelled = (labels != IGNORE).nonzero()
    if len(labelled):  # few labelled pixels: a crop around one of them
        y, x = labelled[_randint(0, len(labelled) - 1)].tolist()
        top = _randint(max(0, y - h + 1), min(y, height - h))
        left = _randint(max(0, x - w + 1), min(x, width - w))
    return top, left


def jitter_colors(image: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, each with probability 0.5, on uint8 [3, H, W]."""
    image = _maybe(F.adjust_brightness, image, 1 - BRIGHTNESS, 1 + BRIGHTNESS)
    contrast_first = _coin()
    if contrast_first:
        image = _maybe(F.adjust_contrast, image, 1 - CONTRAST, 1 + CONTRAST)
    image = _maybe(F.adjust_saturation, image, 1 - SATURATION, 1 + SATURATION)
    image = _maybe(F.adjust_hue, image, -HUE, HUE)
    if not contrast_first:
        image = _maybe(F.adjust_contrast, image, 1 - CONTRAST, 1 + CONTRAST)
    return image


def _maybe(adjust, image: Tensor, low: float, high: float) -> Tensor:  # noqa: ANN001
    return adjust(image, _uniform(low, high)) if _coin() else image


def _coin() -> bool:
    return bool(torch.rand(()) < 0.5)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _randint(low: int, high: int) -> int:
    """An integer between low and high, both included."""
    return int(torch.randint(low, high + 1, ()))
