"""AuPRC and FPR at 95 % TPR over all valid pixels of a data set, in bounded memory.

As long as the pixels fit, they are kept and sorted: the results are scikit-learn's. Beyond that they are counted in
bins of the scores' own floating-point numbers, and the results carry the largest error that this can have made.
"""

from dataclasses import dataclass

import numpy as np

ANOMALY, NORMAL, IGNORED = 1, 0, 255  # values of a label map
KEPT_PIXELS = 2**26  # 67 million: 320 MiB while they are collected, 1.5 GiB while they are sorted
BIN_BITS = 24  # 256 MiB of counts


@dataclass(frozen=True)
class PixelScores:
    """What a score is worth on a data set.

    auprc: average precision, in [0, 1]. fpr95: the share of normal pixels called anomalous where 95 % of the anomalous
    ones are found. error: both are at most this far from those of unbinned scores; 0 for the exact ones.
    threshold, f1: the score from which on a pixel is called anomalous for the best pixel F1, and that F1.
    anomalous, valid: pixels.
    """

    auprc: float
    fpr95: float
    error: float
    threshold: float
    f1: float
    anomalous: int
    valid: int

    @property
    def chance(self) -> float:
        """The AuPRC of a score that knows nothing."""
        return self.anomalous / self.valid


class PixelMetrics:
    """Collects the pixels of a data set.

    Args:
        kept_pixels: how many are kept and sorted; beyond that they are counted in bins.
    """

    def __init__(self, kept_pixels: int = KEPT_PIXELS) -> None:
        self.kept_pixels = kept_pixels
        self.kept: list[tuple[np.ndarray, np.ndarray]] = []
        self.number = 0
        self.bins: np.ndarray | None = None  # pixels [2, bins]: normal, anomalous

    def update(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Adds an image: scores float [H, W], higher is more anomalous; labels uint8 [H, W], 0, 1 or 255 (ignored).

        Raises:
            ValueError: other shapes or labels, or scores that are not finite.
        """
        check_labels(labels)
        if scores.shape != labels.shape:
            raise ValueError(f"scores are {scores.shape}, labels {labels.shape}: they must have one size")
        valid = labels != IGNORED
        values, truth = scores[valid].astype(np.float32), labels[valid] == ANOMALY
        if not np.isfinite(values).all():
            raise ValueError("a score is not finite: look at the network that it comes from")
        self.number += len(values)
        if self.bins is None:
            self.kept.append((values, truth))
            if self.number <= self.kept_pixels:
                return
            self.bins = np.zeros((2, 2**BIN_BITS), np.int64)
        else:
            self.kept = [(values, truth)]
        for values, truth in self.kept:
            for row, of_kind in enumerate((values[~truth], values[truth])):
                self.bins[row] += np.bincount(bin_of(of_kind), minlength=2**BIN_BITS)
        self.kept = []

    def compute(self) -> PixelScores:
        """The metrics of what was added.

        Raises:
            ValueError: no valid pixel, or none that is anomalous, or none that is normal: nothing can be ranked.
        """
        if self.bins is None:
            values, truth = (np.concatenate(part) for part in zip(*self.kept, strict=True)) if self.kept else ([], [])
            thresholds, normal, anomalous = by_threshold(np.asarray(values), np.asarray(truth, bool))
        else:
            filled = np.flatnonzero(self.bins.sum(0))[::-1]
            thresholds, (normal, anomalous) = lowest_of_bin(filled), self.bins[:, filled]
        totals = int(normal.sum()), int(anomalous.sum())
        if not all(totals):
            raise ValueError(
                f"{totals[0]:,} normal and {totals[1]:,} anomalous pixels are valid: both kinds are needed to rank them"
            )
        return scores_of(thresholds, normal, anomalous, binned=self.bins is not None)


def check_labels(labels: np.ndarray) -> None:
    """Raises ValueError unless the label map holds 0 (normal), 1 (anomalous) and 255 (ignored) alone."""
    found = set(np.unique(labels).tolist())
    if found - {NORMAL, ANOMALY, IGNORED}:
        raise ValueError(f"labels hold {sorted(found - {0, 1, 255})[0]}, they may hold 0, 1 and 255 (ignored) only")


def by_threshold(values: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores from high to low, and how many normal and anomalous pixels have each of them."""
    order = np.argsort(-values, kind="stable")
    values, truth = values[order], truth[order]
    ends = np.flatnonzero(np.append(values[1:] != values[:-1], len(values) > 0))
    found = np.diff(np.cumsum(truth)[ends], prepend=0)
    return values[ends], np.diff(ends, prepend=-1) - found, found


def scores_of(thresholds: np.ndarray, normal: np.ndarray, anomalous: np.ndarray, binned: bool) -> PixelScores:
    """From counts of pixels at each threshold, high to low: the sums of scikit-learn's average precision and ROC."""
    false, true = np.cumsum(normal), np.cumsum(anomalous)
    precision = true / (false + true)
    share = anomalous / true[-1]
    auprc = float((share * precision).sum())
    place = int(np.searchsorted(true, 0.95 * true[-1] * (1 - 1e-12)))
    fpr95 = false[place] / false[-1]
    f1 = 2 * true / (true + false + true[-1])
    best = int(f1.argmax())
    error = 0.0
    if binned:
        # Within a bin the order is unknown. Best: anomalous pixels first; worst: last.
        before_true, before_false = true - anomalous, false - normal
        most = share * true / np.maximum(true + before_false, 1)
        least = share * (before_true + 1) / (before_true + 1 + false)
        of_auprc = max(float(most.sum()) - auprc, auprc - float(least.sum()))
        error = max(of_auprc, float(normal[place] / false[-1]))
    return PixelScores(
        auprc, float(fpr95), error, float(thresholds[best]), float(f1[best]), int(true[-1]), int(true[-1] + false[-1])
    )


def bin_of(values: np.ndarray) -> np.ndarray:
    """The bin of each float32 score: its sign, exponent and first bits, in the order of the numbers."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> (32 - BIN_BITS)).astype(np.int64)


def lowest_of_bin(bins: np.ndarray) -> np.ndarray:
    """The smallest float32 score of each bin: the inverse of `bin_of`."""
    ordered = (bins.astype(np.uint64) << (32 - BIN_BITS)).astype(np.uint32)
    bits = np.where(ordered >> 31, ordered & np.uint32(2**31 - 1), ~ordered)
    return bits.view(np.float32)
