"""From images of any size to class scores per pixel, by sliding windows as in the published evaluation."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eomt.models.eomt import EoMT


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


def class_scores(mask_logits: Tensor, class_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores per pixel: each query votes for its classes, "no object" left out, within its mask.

    Args:
        mask_logits: [n, Q, h, w]. class_logits: [n, Q, K + 1]. size: (H, W) of the result.

    Returns:
        [n, K, H, W], not normalised over classes.
    """
    masks = F.interpolate(mask_logits.float(), size, mode="bilinear").sigmoid()
    return torch.einsum("nqhw,nqk->nkhw", masks, class_logits.float().softmax(-1)[..., :-1])


def merge_windows(scores: Tensor, origins: list[tuple[int, int]], image_size: tuple[int, int]) -> Tensor:
    """Window scores [n, K, h, w] -> [K, H, W] at the image's own resolution: summed, divided by the count, resized."""
    window = tuple(scores.shape[-2:])
    total = scores.new_zeros(scores.shape[1], *resized_size(image_size, window))
    count = torch.zeros_like(total[0])
    for window_scores, (y, x) in zip(scores, origins, strict=True):
        total[:, y : y + window[0], x : x + window[1]] += window_scores
        count[y : y + window[0], x : x + window[1]] += 1
    return F.interpolate((total / count)[None], image_size, mode="bilinear")[0]


@torch.no_grad()
def segment_images(network: EoMT, images: Sequence[Tensor]) -> list[Tensor]:
    """Class scores of images from the deployed network (masked attention off), all windows in one forward.

    Args:
        images: at least one, uint8 [3, H, W], each of its own size, on any device.

    Returns:
        [K, H, W] for each image, on the network's device, not normalised over classes.
    """
    window, device = network.encoder.img_size, network.q.weight.device
    windows, origins = zip(*(to_windows(image, window) for image in images), strict=True)
    counts = [len(of_image) for of_image in windows]
    with network.deployed():
        (mask_logits,), (class_logits,) = network(torch.cat(windows).to(device) / 255)
    with torch.autocast(device.type, enabled=False):  # scores in 16 bits tie, and ties are decided arbitrarily
        return [
            merge_windows(class_scores(masks, classes, window), of_image, tuple(image.shape[-2:]))
            for masks, classes, of_image, image in zip(
                mask_logits.split(counts), class_logits.split(counts), origins, images, strict=True
            )
        ]


def segment(network: EoMT, image: Tensor) -> Tensor:
    """Class scores [K, H, W] of one image, uint8 [3, H, W]; see `segment_images`."""
    return segment_images(network, [image])[0]
