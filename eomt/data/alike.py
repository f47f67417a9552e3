"""Validation images that nearly are training images: neighbouring frames of a video, lossy copies."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from eomt.data.listing import by_number
from eomt.data.sources import Sample, spread

SIDE = 16  # places along each side of an image at which its brightness is compared with that of the next place
ENOUGH = 256  # pixels of a side that are looked at; of more every second, third, ...
FLAT = 2  # gray values of a step that says nothing
FEWEST = 32  # steps that an image must have, so that its hash says something
NEARLY = 0.3  # share of the steps that may differ; frames of other scenes differ in half of theirs
NEIGHBOURS = 16  # validation images of which the training image before is looked at, too


def difference_hash(image: Tensor) -> np.ndarray:
    """Whether brightness rises, falls or stays at each of 16 x 16 places: int8 [256] of -1, 0, 1.

    It stays nearly the same under compression, scaling and a small shift.

    Args:
        image: uint8 [3, H, W].
    """
    apart = max(1, min(image.shape[1:]) // ENOUGH)
    gray = Image.fromarray(image.permute(1, 2, 0)[::apart, ::apart].contiguous().numpy()).convert("L")
    steps = np.diff(np.asarray(gray.resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.int16), axis=1)
    return (np.sign(steps) * (abs(steps) > FLAT)).astype(np.int8).ravel()


def nearly_same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Names of `first` with the name of an image of `second` that it nearly is; both are hashes by name."""
    names, table = list(second), np.stack(list(second.values())) if second else np.empty((0, SIDE**2), np.int8)
    found = {}
    for name, steps in first.items():
        informative = ((table != 0) | (steps != 0)).sum(1)
        share = (table != steps).sum(1) / informative.clip(min=1)
        share[(informative < FEWEST) | ((table != 0).sum(1) < FEWEST)] = 1
        if (steps != 0).sum() >= FEWEST and len(share) and share.min() <= NEARLY:
            found[name] = names[share.argmin()]
    return found


def neighbours(train: Sequence[Sample], val: Sequence[Sample]) -> list[int]:
    """Positions of the training images that stand before some of the validation images in the order of names.

    Where a video was split at random, these are neighbouring frames.
    """
    order = sorted((by_number(sample.name), index) for index, sample in enumerate(train))
    chosen = (bisect_left(order, (by_number(val[k].name), -1)) for k in spread(len(val), NEIGHBOURS))
    return sorted({order[max(0, place - 1)][1] for place in chosen})
