"""Seeds and images drawn again: how far the choice of either could have moved a difference."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eomt.comparison.counts import iou

RESAMPLES = 2000
FEW_UNITS = 10  # fewer make an interval that means little


@dataclass(frozen=True)
class Units:
    """What is drawn at once: single images, the whole sequences of a video, or blocks of neighbouring frames.

    `members` are int [N], the unit of each image.
    """

    members: np.ndarray
    kind: str = "images"  # or "sequences", "blocks"

    @property
    def count(self) -> int:
        return int(self.members.max()) + 1 if len(self.members) else 0

    @property
    def words(self) -> str:
        """`12 images`, `30 sequences` or `11 blocks of up to 10 neighbouring frames`"""
        if self.kind != "blocks":
            return f"{self.count} {self.kind}"
        return f"{self.count} blocks of up to {np.bincount(self.members).max()} neighbouring frames"


def units(images: int, sequences: Sequence[str | None] = ()) -> Units:
    """Groups images that are not independent, by the sequences that they are frames of.

    Sequences are drawn whole if there are enough of them: N^2 / sum(n^2), which is their number where all are of one
    length, is at least `FEW_UNITS`. Fewer are cut into equal blocks of at most sqrt(N) neighbouring frames. Images of
    no sequence are units of their own.
    """
    names = [(name,) if name is not None else k for k, name in enumerate(sequences)] or list(range(images))
    frames: dict = {}
    for k, name in enumerate(names):
        frames.setdefault(name, []).append(k)
    sizes = Counter(names).values()
    if max(sizes, default=1) == 1:
        return Units(np.arange(images))
    whole = images**2 / sum(size**2 for size in sizes) >= FEW_UNITS
    longest = images if whole else math.ceil(math.sqrt(images))
    parts = [part for own in frames.values() for part in np.array_split(own, math.ceil(len(own) / longest))]
    members = np.empty(images, int)
    for unit, part in enumerate(parts):
        members[part] = unit
    return Units(members, "sequences" if whole else "blocks")


def resample(count: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Indices [resamples, count] drawn with replacement."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def times_drawn(indices: np.ndarray) -> np.ndarray:
    """Indices [B, N] -> how often each of N things was drawn, float64 [B, N]."""
    return np.stack([np.bincount(row, minlength=indices.shape[1]) for row in indices]).astype(np.float64)


def image_weights(of: Units) -> np.ndarray:
    """How often each image is in each resample, float64 [B, N]."""
    return times_drawn(resample(of.count))[:, of.members]


def bootstrap_iou(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """IoU [B, K] of every resample, from counts [N, 2, K] and weights [B, N]."""
    sums = weights @ counts.reshape(len(counts), -1)
    return iou(sums.reshape(len(weights), *counts.shape[1:]))


def over_drawn_seeds(values: np.ndarray) -> np.ndarray:
    """The mean over seeds drawn with replacement, [S, B, ...] -> [B, ...]; NaN does not count.

    Images and seeds are drawn independently of each other: it is the two-way bootstrap of a crossed design.
    """
    seeds, resamples = values.shape[:2]
    drawn = times_drawn(resample(seeds, resamples, seed=1)).T.reshape(seeds, resamples, *[1] * (values.ndim - 2))
    weights = drawn * ~np.isnan(values)
    total = weights.sum(0)
    return np.where(total > 0, (weights * np.nan_to_num(values)).sum(0) / np.maximum(total, 1), np.nan)
