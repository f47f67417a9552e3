"""Seeds and images drawn again: how far the choice of either could have moved a difference."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

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
    """How often each image counts, float64 [1 + B, N]: once, and then as often as it is in each resample."""
    return np.concatenate([np.ones((1, len(of.members))), times_drawn(resample(of.count))[:, of.members]])


def bootstrap_iou(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """IoU [1 + B, K] of all images and of every resample, from counts [N, 2, K] and weights [1 + B, N]."""
    sums = weights @ counts.reshape(len(counts), -1)
    return iou(sums.reshape(len(weights), *counts.shape[1:]))


def mean_over_seeds(values: np.ndarray, of: Units) -> np.ndarray:
    """The mean over seeds of [S, 1 + B, ...], of all images and of each resample -> [B, ...], both drawn again.

    Images and seeds are drawn independently of each other: it is the two-way bootstrap of a crossed design. Both
    deviations are widened as `widening` says. NaN, a class that is not there, does not count.
    """
    known = ~np.isnan(values)
    seeds, resamples = len(values), values.shape[1] - 1
    everyone = np.ones((seeds, resamples + 1))
    drawn = np.concatenate([everyone[:, :1], times_drawn(resample(seeds, resamples, seed=1)).T], 1)
    whole, again = (_weighted_mean(values, known, weights) for weights in (everyone, drawn))
    by_images, by_seeds = whole - whole[:1], again - whole
    return (whole[:1] + widening(of.count) * by_images + widening(known[:, 0].sum(0)) * by_seeds)[1:]


def _weighted_mean(values: np.ndarray, known: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of [S, B, ...] over S with weights [S, B], of what is known."""
    weights = weights.reshape(*weights.shape, *[1] * (values.ndim - 2)) * known
    total = weights.sum(0)
    return np.where(total > 0, (weights * np.nan_to_num(values)).sum(0) / np.maximum(total, 1), np.nan)


def widening(count: int | np.ndarray) -> np.ndarray:
    """How much more the mean of so few things deviates than their bootstrap: sqrt(n / (n - 1)) t / z; 1 for one thing.

    t and z are the 97.5 % quantiles of Student's t with n - 1 degrees of freedom and of the normal distribution, as in
    the expanded percentile interval (Hesterberg, arXiv:1411.5279).
    """
    count = np.asarray(count, float)
    several = np.maximum(count, 2)
    wider = np.sqrt(several / (several - 1)) * stdtrit(several - 1, 0.975) / ndtri(0.975)
    return np.where(count > 1, wider, 1.0)
