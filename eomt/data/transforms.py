"""Augmentation of uint8 images and label maps, as in the published EoMT recipe.

Source: Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025, and its code.
Every draw comes from torch's random generator, so that a seed fixes a run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from eomt.indices import IGNORE, OUTLIER

BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 18 / 360  # largest deviations; hue in turns
MAX_TRIES = 10  # crops drawn in search of a labelled pixel

Adjustment = tuple[Callable[..., Tensor], float]  # a change of colours, and how strong


class TrainTransform:
    """Flip, scale jitter, a random crop that shows at least one class, colour jitter and padding.

    Takes image uint8 [3, H, W] and labels uint8 [H, W]; returns uint8 [3, h, w] and [h, w], contiguous. Quickest for
    images that lie in memory pixel by pixel, as they are decoded: torch resizes those in integers.

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

    def __repr__(self) -> str:
        return f"TrainTransform({vars(self)})"

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        flip = self.flip and _coin()
        height, width = self.draw_size(*labels.shape)
        adjustments = draw_adjustments() if self.color_jitter else []

        rows, columns = nearest(labels.shape[0], height), nearest(labels.shape[1], width)
        if flip:
            columns = labels.shape[1] - 1 - columns
        top, left, labels = draw_crop(labels, rows, columns, self.img_size)

        image = F.resize(image, [height, width], InterpolationMode.BILINEAR, antialias=True)
        crop = (image.flip(-1) if flip else image)[:, top : top + labels.shape[0], left : left + labels.shape[1]]
        crop = adjust_colors(crop.contiguous(), adjustments, whole=image)
        return self.pad(crop, 0), self.pad(labels, IGNORE)

    def draw_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at a random scale in `scale_range`, relative to fitting the image into the crop."""
        return self.scaled_size(height, width, _uniform(*self.scale_range))

    def scaled_size(self, height: int, width: int, factor: float) -> tuple[int, int]:
        """The size at `factor` times the scale at which the image just fits into the crop."""
        scale = min(self.img_size[0] / height, self.img_size[1] / width) * factor
        return max(1, int(height * scale)), max(1, int(width * scale))

    def largest(self, labels: Tensor) -> Tensor:
        """A label map [H, W] at the largest scale, of which training crops are cut."""
        height, width = self.scaled_size(*labels.shape, self.scale_range[1])
        rows, columns = nearest(labels.shape[0], height), nearest(labels.shape[1], width)
        return labels.index_select(0, rows).index_select(1, columns)

    def pad(self, crop: Tensor, value: int) -> Tensor:
        """Pads [..., h, w] at the bottom and on the right up to the crop size."""
        bottom, right = (side - have for side, have in zip(self.img_size, crop.shape[-2:], strict=True))
        return torch.nn.functional.pad(crop, (0, right, 0, bottom), value=value)


def nearest(old: int, new: int) -> Tensor:
    """Returns the positions in `old` that each in `new` shows, int64 [new]: nearest neighbours, as in torch."""
    positions = torch.arange(old, dtype=torch.float32)  # as precise as torch places pixels
    return torch.nn.functional.interpolate(positions[None, None], size=new, mode="nearest")[0, 0].long()


def draw_crop(labels: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> tuple[int, int, Tensor]:
    """Top, left and labels of a random crop of the resized map `labels[rows][:, columns]`, which is not built.

    It shows a class if the map has one at all. The crop [h, w] is smaller than `size` where the map is.
    """
    (h, w), height, width = size, max(size[0], len(rows)), max(size[1], len(columns))

    def resized(rows: Tensor, columns: Tensor) -> Tensor:
        return labels.index_select(0, rows).index_select(1, columns)

    for _ in range(MAX_TRIES):
        top, left = _randint(0, height - h), _randint(0, width - w)
        crop = resized(rows[top : top + h], columns[left : left + w])
        if (crop < OUTLIER).any():
            return top, left, crop
    labelled = (resized(rows, columns) < OUTLIER).nonzero()
    if len(labelled):  # few labelled pixels: a crop around one of them
        y, x = labelled[_randint(0, len(labelled) - 1)].tolist()
        top = _randint(max(0, y - h + 1), min(y, height - h))
        left = _randint(max(0, x - w + 1), min(x, width - w))
    return top, left, resized(rows[top : top + h], columns[left : left + w])


def draw_adjustments() -> list[Adjustment]:
    """Brightness, contrast, saturation and hue, each with probability 0.5; contrast comes second or last."""
    adjustments = _maybe(F.adjust_brightness, 1 - BRIGHTNESS, 1 + BRIGHTNESS)
    contrast_second = _coin()
    if contrast_second:
        adjustments += _maybe(F.adjust_contrast, 1 - CONTRAST, 1 + CONTRAST)
    adjustments += _maybe(F.adjust_saturation, 1 - SATURATION, 1 + SATURATION)
    adjustments += _maybe(adjust_hue, -HUE, HUE)
    if not contrast_second:
        adjustments += _maybe(F.adjust_contrast, 1 - CONTRAST, 1 + CONTRAST)
    return adjustments


def adjust_colors(crop: Tensor, adjustments: Sequence[Adjustment], whole: Tensor) -> Tensor:
    """The crop, uint8 [3, h, w], with the colours that it has in the adjusted whole image, uint8 [3, H, W].

    Contrast is a distance from the whole image's mean gray. A grid of its pixels that goes through the same steps
    stands for it, at least 128 x 128 where there are as many.
    """
    spacing = max(1, min(whole.shape[1:]) // 128)
    grid = whole[:, ::spacing, ::spacing]
    steps = []
    for adjust, factor in adjustments:
        step = (_spread, factor, _mean_gray(grid)) if adjust is F.adjust_contrast else (adjust, factor)
        grid = _apply([step], grid)
        steps.append(step)
    return _apply(steps, crop)


def adjust_hue(image: Tensor, turns: float) -> Tensor:
    """Turns the hue of uint8 [3, H, W] by -0.5..0.5 turns, saturation and value kept.

    torchvision's `adjust_hue` to within 1 level, in integers: the colour circle is measured in units that make it 6
    times as long as the pixel's chroma, and each channel rises with the distance from its complementary colour.
    """
    red, green, blue = image.to(torch.int16)
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    green_or_blue = torch.where(high == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    hue = torch.where(high == red, green - blue, green_or_blue)  # red at 0, green at 2, blue at 4 times chroma
    hue += (chroma * (6 * turns)).round_().to(torch.int16)
    turned = torch.empty_like(image)
    for channel, complement in zip(turned, (3, 5, 1), strict=True):  # cyan, magenta, yellow
        distance = (hue - complement * chroma).abs_()
        distance = torch.minimum(distance, (6 * chroma - distance).abs_())  # the shorter way round
        channel.copy_(low + torch.minimum((distance - chroma).clamp_(min=0), chroma))
    return turned


def _apply(steps: Sequence[tuple[Any, ...]], image: Tensor) -> Tensor:
    for adjust, *arguments in steps:
        image = adjust(image, *arguments)
    return image


def _mean_gray(image: Tensor) -> float:
    return F.rgb_to_grayscale(image).float().mean().item()


def _spread(image: Tensor, factor: float, center: float) -> Tensor:
    """Distances from `center` times `factor`."""
    return (image * factor).add_((1 - factor) * center).clamp_(0, 255).to(torch.uint8)


def _maybe(adjust: Callable[..., Tensor], low: float, high: float) -> list[Adjustment]:
    return [(adjust, _uniform(low, high))] if _coin() else []


def _coin() -> bool:
    return bool(torch.rand(()) < 0.5)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _randint(low: int, high: int) -> int:
    """An integer between low and high, both included."""
    return int(torch.randint(low, high + 1, ()))
