"""AuPRC and FPR at 95 % TPR over all valid pixels of a data set, in bounded memory.

Pixels are counted by their score. As long as the distinct scores fit, that is exact: the results are scikit-learn's.
Beyond that, neighbouring float32 numbers share a bin, and the results carry the largest error that this can have made.
"""

from dataclasses import dataclass

import numpy as np

ANOMALY, NORMAL, IGNORED = 1, 0, 255  # values of a label map
MAX_BINS = 2**23  # 160 MiB a score; 0.4 GiB more while they are joined
PENDING = 2**22  # pixels that wait to be counted: joining costs a pass over the bins


@dataclass(frozen=True)
class PixelScores:
    """The metrics of a score on a data set, by pixels.

    auprc: average precision, in [0, 1]. fpr95: the share of normal pixels called anomalous where 95 % of the anomalous
    ones are found. error: both are at most this far from those of unbinned scores; 0 for exact ones.
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
    """Counts the pixels of a data set by their score, each float32 number for itself as long as there is room.

    Args:
        max_bins: distinct scores that are kept. Where there are more, the numbers lose their last bit, and then the
            one before, until they fit: 2^23 leave any data set an error far below 0.1 point.
    """

    def __init__(self, max_bins: int = MAX_BINS) -> None:
        self.max_bins = max_bins
        self.dropped_bits = 0
        self.keys = np.zeros(0, np.uint32)  # ascending
        self.counts = np.zeros((2, 0), np.int64)  # pixels of each key: normal, anomalous
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []

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
        self.pending.append((key_of(values[~truth]), key_of(values[truth])))
        if sum(len(part) for parts in self.pending for part in parts) >= PENDING:
            self.count_pending()

    def count_pending(self) -> None:
        """Moves the pixels that wait into the bins."""
        kinds = [np.concatenate(part) >> self.dropped_bits for part in zip(*self.pending, strict=True)]
        self.pending = []
        keys, counts = [self.keys], [self.counts]
        for row, of_kind in enumerate(kinds):
            distinct, number = np.unique(of_kind, return_counts=True)
            keys.append(distinct)
            counts.append(np.zeros((2, len(distinct)), np.int64))
            counts[-1][row] = number
        self.join(np.concatenate(keys), np.concatenate(counts, axis=1))
        while len(self.keys) > self.max_bins:
            self.dropped_bits += 1
            self.join(self.keys >> 1, self.counts)

    def join(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Adds up the counts of equal keys."""
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
        self.keys = keys[starts]
        self.counts = np.add.reduceat(counts[:, order], starts, axis=1) if len(starts) else counts

    def compute(self) -> PixelScores:
        """The metrics of what was added.

        Raises:
            ValueError: no pixel that is anomalous, or none that is normal: nothing can be ranked.
        """
        if self.pending:
            self.count_pending()
        normal, anomalous = self.counts[:, ::-1]
        if not (normal.any() and anomalous.any()):
            raise ValueError(
                f"{normal.sum():,} normal and {anomalous.sum():,} anomalous pixels are valid: both kinds are needed to "
                "rank them"
            )
        thresholds = score_of(self.keys[::-1] << self.dropped_bits)
        return pixel_scores(thresholds, normal, anomalous, binned=self.dropped_bits > 0)


def check_labels(labels: np.ndarray) -> None:
    """Raises ValueError unless the label map holds 0 (normal), 1 (anomalous) and 255 (ignored) alone."""
    strange = set(np.unique(labels).tolist()) - {NORMAL, ANOMALY, IGNORED}
    if strange:
        raise ValueError(f"labels hold {min(strange)}, they may hold 0, 1 and 255 (ignored) only")


def pixel_scores(thresholds: np.ndarray, normal: np.ndarray, anomalous: np.ndarray, binned: bool) -> PixelScores:
    """From counts of pixels at each threshold, high to low: the sums of scikit-learn's average precision and ROC.

    Within a bin the order of the pixels is unknown. At best all of its anomalous pixels come first, at worst all of its
    normal ones do: that bounds the precision at each of them, and by the mean over them the AuPRC. The FPR of a recall
    that is reached within a bin is off by the bin's normal pixels at most.
    """
    false, true = np.cumsum(normal), np.cumsum(anomalous)
    share = anomalous / true[-1]
    auprc = float((share * (true / (false + true))).sum())
    place = int(np.searchsorted(20 * true, 19 * true[-1]))  # the first recall of 95 %, in whole numbers
    f1 = 2 * true / (true + false + true[-1])
    best = int(f1.argmax())
    error = 0.0
    if binned:
        found = anomalous > 0
        share, true_here, false_here = share[found], true[found], false[found]
        false_before, first = false_here - normal[found], true_here - anomalous[found] + 1
        most = (share * (true_here / (true_here + false_before))).sum()
        least = (share * (first / (first + false_here))).sum()
        error = float(max(most - auprc, auprc - least, normal[place] / false[-1]))
    return PixelScores(
        auprc=auprc,
        fpr95=float(false[place] / false[-1]),
        error=error,
        threshold=float(thresholds[best]),
        f1=float(f1[best]),
        anomalous=int(true[-1]),
        valid=int(true[-1] + false[-1]),
    )


def key_of(values: np.ndarray) -> np.ndarray:
    """float32 scores as uint32 in the same order: the sign bit decides which way the other bits count."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def score_of(keys: np.ndarray) -> np.ndarray:
    """The inverse of `key_of`."""
    return np.where(keys >> 31, keys & np.uint32(2**31 - 1), ~keys).view(np.float32)
