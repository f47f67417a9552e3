"""From images of any size to class scores per pixel, by sliding windows as in the published evaluation."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eomt.models.eomt import EoMT
from eomt.models.finite import first_not_finite

STRIP_CELLS = 2**22  # queries x pixels that are scored at a time: 16 MiB in float32


def resized_size(image_size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image scaled so that it just covers the window, its aspect ratio kept."""
    scale = max(window[0] / image_size[0], window[1] / image_size[1])
    return tuple(max(round(side * scale), least) for side, least in zip(image_size, window, strict=True))


def window_origins(size: tuple[int, int], window: tuple[int, int]) -> list[tuple[int, int]]:
    """(top, left) of the windows that cover an image of `size`, evenly overlapping along its longer direction."""
    axis = 0 if size[0] > window[0] else 1
    count = math.ceil(size[axis] / window[axis])
    overlap = (count * window[axis] - size[axis]) / (count - 1) if count > 1 else 0
    starts = [int(i * (window[axis] - overlap)) for i in range(count)]
    return [(start, 0) if axis == 0 else (0, start) for start in starts]


def to_windows(image: Tensor, window: tuple[int, int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Image uint8 [3, H, W] -> windows uint8 [n, 3, h, w] of the resized image, and their (top, left)."""
    size = resized_size(tuple(image.shape[-2:]), window)
    resized = resize(image, size)
    origins = window_origins(size, window)
    return torch.stack([resized[:, y : y + window[0], x : x + window[1]] for y, x in origins]), origins


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Image uint8 [3, H, W] at another (height, width), by Pillow's bilinear filter; others round otherwise."""
    if tuple(image.shape[-2:]) == size:
        return image
    pixels = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).to(image.device)


def interpolate_rows(
    source: Callable[[range], Tensor], source_height: int, size: tuple[int, int], rows: range
) -> Tensor:
    """Some rows of `F.interpolate(maps, size, mode="bilinear")`, from those rows of `maps` that they need.

    Args:
        source: gives rows [C, rows, w] of `maps`. source_height: how many there are.
        size: (H, W) to interpolate to. rows: which of the H rows.

    Returns:
        [C, rows, W].
    """
    y = torch.arange(rows.start, rows.stop, dtype=torch.float64)
    y = ((y + 0.5) * (source_height / size[0]) - 0.5).clamp(min=0)  # pixels' centres, as interpolate sees them
    above, below = y.long(), y.ceil().long().clamp(max=source_height - 1)
    first = above[0].item()
    maps = source(range(first, below[-1].item() + 1))
    strip = torch.lerp(maps[:, above - first], maps[:, below - first], (y - above).to(maps)[:, None])
    # Every row a row of one picture: as channels, which a GPU takes one after the other, they would be slow.
    flat = strip.flatten(0, 1)[None, None]
    return F.interpolate(flat, (flat.shape[2], size[1]), mode="bilinear")[0, 0].unflatten(0, strip.shape[:2])


def window_scores(mask_logits: Tensor, votes: Tensor, window: tuple[int, int], rows: range) -> Tensor:
    """Class scores of some rows of one window: within its mask, each query votes for its classes.

    Args:
        mask_logits: [Q, h, w]. votes: [Q, K], probabilities. window: (H, W). rows: which of the H rows.

    Returns:
        [K, rows, W], not normalised over classes.
    """
    masks = interpolate_rows(lambda r: mask_logits[:, r.start : r.stop], mask_logits.shape[1], window, rows)
    with torch.autocast(masks.device.type, enabled=False):  # scores in 16 bits tie, and ties are decided arbitrarily
        return torch.einsum("qhw,qk->khw", masks.sigmoid_(), votes)


def merged_scores(
    windows: Sequence[Callable[[range], Tensor]],
    origins: list[tuple[int, int]],
    window: tuple[int, int],
    width: int,
    rows: range,
) -> Tensor:
    """Class scores [K, rows, width] of some rows of the resized image, the mean of the windows that see a pixel.

    Args:
        windows: each gives class scores [K, rows, w] of some of its rows. origins: (top, left) of each.
    """
    seen = [range(max(rows.start - y, 0), min(rows.stop - y, window[0])) for y, _ in origins]
    total = count = None
    for of_window, (y, x), part in zip(windows, origins, seen, strict=True):
        if part:
            scores = of_window(part)
            total = scores.new_zeros(len(scores), len(rows), width) if total is None else total
            count = torch.zeros_like(total[0]) if count is None else count
            top = part.start + y - rows.start
            here = slice(top, top + len(part)), slice(x, x + window[1])
            total[(slice(None), *here)] += scores
            count[here] += 1
    return total / count


def score_strips(
    mask_logits: Tensor,
    class_logits: Tensor,
    origins: list[tuple[int, int]],
    window: tuple[int, int],
    image_size: tuple[int, int],
) -> Iterator[Tensor]:
    """Class scores of one image at its own resolution, in strips [K, rows, W] from its top to its bottom.

    A row needs few rows of the mask logits, so masks and scores of the whole image never exist at once.

    Args:
        mask_logits: [n, Q, h, w]. class_logits: [n, Q, K + 1], "no object" last, which nothing votes for.
        origins: (top, left) of the n windows. image_size: (H, W).
    """
    votes = class_logits.softmax(-1)[..., :-1]
    windows = [
        partial(window_scores, masks, of_window, window) for masks, of_window in zip(mask_logits, votes, strict=True)
    ]
    return merged_strips(windows, mask_logits.shape[1], origins, window, image_size)


def merged_strips(
    windows: Sequence[Callable[[range], Tensor]],
    channels: int,
    origins: list[tuple[int, int]],
    window: tuple[int, int],
    image_size: tuple[int, int],
) -> Iterator[Tensor]:
    """`score_strips` from what gives the class scores of each window, see `merged_scores`.

    Args:
        channels: maps that a row of a window takes at a time; the more of them, the fewer rows a strip has.
    """
    height, width = resized_size(image_size, window)
    resized_rows = max(1, STRIP_CELLS // (channels * window[1]))
    step = max(1, resized_rows * image_size[0] // height)
    for top in range(0, image_size[0], step):
        rows = range(top, min(top + step, image_size[0]))
        scores = partial(merged_scores, windows, origins, window, width)
        yield interpolate_rows(scores, height, image_size, rows)


class WindowLogits(NamedTuple):
    """The network's outputs for the n windows of an image: all that its scores are made of.

    mask_logits: [n, Q, h, w]. class_logits: [n, Q, K + 1]. origins: (top, left) of the windows.
    window: (height, width) of each. image_size: (H, W) of the image before it was resized.
    """

    mask_logits: Tensor
    class_logits: Tensor
    origins: list[tuple[int, int]]
    window: tuple[int, int]
    image_size: tuple[int, int]

    def strips(self, class_temperature: float = 1.0) -> Iterator[Tensor]:
        """Class scores, see `score_strips`; the temperature divides the class logits."""
        logits = self.class_logits / class_temperature
        return score_strips(self.mask_logits, logits, self.origins, self.window, self.image_size)


def window_logits(network: EoMT, images: Sequence[Tensor]) -> list[WindowLogits]:
    """Returns the outputs for each image, from the deployed network (masked attention off), all windows in one forward.

    Args:
        images: at least one, uint8 [3, H, W], each of its own size, on any device.

    Raises:
        ValueError: they are not finite, so that any class would do.
    """
    window, device = network.encoder.img_size, network.q.weight.device
    windows, origins = zip(*(to_windows(image, window) for image in images), strict=True)
    counts = [len(of_image) for of_image in windows]
    with network.deployed():
        (mask_logits,), (class_logits,) = network(torch.cat(windows).to(device) / 255)
    check_outputs({"masks": mask_logits, "classes": class_logits})
    parts = zip(mask_logits.float().split(counts), class_logits.float().split(counts), origins, images, strict=True)
    return [
        WindowLogits(masks, classes, of_image, window, tuple(image.shape[-2:]))
        for masks, classes, of_image, image in parts
    ]


def check_outputs(outputs: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a network returned NaN or infinity."""
    if first_not_finite(outputs):
        raise ValueError(
            "the network's outputs are not finite (NaN or infinity): its weights have grown out of range, or it needs "
            "a precision of more range; take an earlier network, or precision 32-true"
        )


def score_images(network: EoMT, images: Sequence[Tensor]) -> list[Iterator[Tensor]]:
    """For each image, its `score_strips`; see `window_logits`."""
    return [logits.strips() for logits in window_logits(network, images)]


@torch.no_grad()
def segment_images(network: EoMT, images: Sequence[Tensor]) -> list[Tensor]:
    """Class scores [K, H, W] of each image, on the network's device, not normalised over classes.

    Args:
        images: at least one, uint8 [3, H, W], each of its own size, on any device; see `score_images`.
    """
    return [torch.cat(list(strips), dim=1) for strips in score_images(network, images)]


def segment(network: EoMT, image: Tensor) -> Tensor:
    """Class scores [K, H, W] of one image, uint8 [3, H, W]; see `segment_images`."""
    return segment_images(network, [image])[0]


def winners(strips: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """From strips of class scores [K, rows, W], the best class of each pixel, uint8 [H, W], and its score, [H, W]."""
    best = [strip.max(0) for strip in strips]  # argmax is 20 times as slow on a CPU
    return torch.cat([each.indices.byte() for each in best]), torch.cat([each.values for each in best])


@torch.no_grad()
def classify_images(network: EoMT, images: Sequence[Tensor]) -> list[Tensor]:
    """The class of the highest of these scores, uint8 [H, W], for each pixel of each image, in far less memory."""
    return [winners(strips)[0] for strips in score_images(network, images)]


def classify(network: EoMT, image: Tensor) -> Tensor:
    """Class map uint8 [H, W] of one image, uint8 [3, H, W]; see `classify_images`."""
    return classify_images(network, [image])[0]
