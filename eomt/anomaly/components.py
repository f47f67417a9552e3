"""Component metrics of SegmentMeIfYouCan (Chan et al., NeurIPS 2021 Datasets and Benchmarks, section 3.2).

Pixel metrics hardly see small obstacles. These judge connected components: of the ground truth by the adjusted sIoU,
which does not blame one component for what belongs to its neighbours, and of the prediction by their precision (PPV).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from eomt.anomaly.metrics import ANOMALY, IGNORED, check_labels

THRESHOLDS = np.linspace(0.25, 0.75, 11)
NEIGHBOURS = np.ones((3, 3), int)  # 8-connectivity


@dataclass(frozen=True)
class Track:
    """The least pixels of a component that counts; smaller predictions are dropped, smaller targets ignored."""

    min_prediction: int
    min_target: int


ANOMALY_TRACK = Track(min_prediction=500, min_target=100)
OBSTACLE_TRACK = Track(min_prediction=50, min_target=10)


@dataclass(frozen=True)
class Components:
    """sIoU of each component of the ground truth and PPV of each predicted one, in [0, 1]; of one image or of many."""

    siou: np.ndarray
    ppv: np.ndarray

    @property
    def mean_siou(self) -> float:
        """NaN without a component in the ground truth."""
        return float(self.siou.mean()) if len(self.siou) else float("nan")

    @property
    def mean_ppv(self) -> float:
        """NaN without a predicted component."""
        return float(self.ppv.mean()) if len(self.ppv) else float("nan")

    @property
    def f1(self) -> float:
        """F1 of components, averaged over 11 thresholds of sIoU and PPV, 0.25 to 0.75; NaN without any component."""
        if not len(self.siou) + len(self.ppv):
            return float("nan")
        found = np.array([(self.siou >= t).sum() for t in THRESHOLDS])
        false = np.array([(self.ppv < t).sum() for t in THRESHOLDS])
        missed = len(self.siou) - found
        return float((2 * found / (2 * found + missed + false)).mean())


def components(scores: np.ndarray, labels: np.ndarray, threshold: float, track: Track) -> Components:
    """Judges one image.

    Args:
        scores: float [H, W]; pixels of at least `threshold` are predicted to be anomalous.
        labels: uint8 [H, W], 0, 1 or 255 (ignored: outside the region of interest).
    """
    check_labels(labels)
    predicted, _ = ndimage.label((scores >= threshold) & (labels != IGNORED), NEIGHBOURS)
    target, _ = ndimage.label(labels == ANOMALY, NEIGHBOURS)
    predicted[is_small(predicted, track.min_prediction)] = 0
    valid = (labels != IGNORED) & ~is_small(target, track.min_target)
    return judge(predicted[valid], target[valid])


def is_small(components: np.ndarray, least: int) -> np.ndarray:
    """Whether a pixel lies in a component (> 0) of fewer than `least` pixels: bool, like the map of components."""
    small = np.bincount(components.ravel()) < least
    small[0] = False
    return small[components]


def judge(predicted: np.ndarray, target: np.ndarray) -> Components:
    """From the components, int [N] and 0 for none, of N valid pixels."""
    shape = target.max(initial=0) + 1, predicted.max(initial=0) + 1
    overlap = np.bincount(target * shape[1] + predicted, minlength=shape[0] * shape[1]).reshape(shape)
    of_target, of_predicted = overlap.sum(1), overlap.sum(0)
    siou = []
    for k in np.flatnonzero(of_target[1:]) + 1:
        touching = np.flatnonzero(overlap[k, 1:]) + 1
        hit = overlap[k, touching].sum()
        of_others = overlap[1:, touching].sum() - hit  # what the same predictions cover of other components
        siou.append(hit / (of_target[k] + of_predicted[touching].sum() - hit - of_others))
    there = np.flatnonzero(of_predicted[1:]) + 1
    return Components(np.array(siou), overlap[1:, there].sum(0) / of_predicted[there])


def together(images: Sequence[Components]) -> Components:
    """The components of many images."""
    empty = np.zeros(0)
    return Components(
        np.concatenate([empty, *(image.siou for image in images)]),
        np.concatenate([empty, *(image.ppv for image in images)]),
    )
