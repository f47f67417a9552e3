"""Intersections and unions of classes, which add up over images, and the scores that follow from them."""

import warnings

import numpy as np


def hits_and_unions(confusion: np.ndarray) -> np.ndarray:
    """Counts [N, K, K] (target, prediction) -> pixels in intersection and in union, float64 [N, 2, K].

    Both are sums over pixels: those of a set of images are the sums of theirs.
    """
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    return np.stack([hits, confusion.sum(1) + confusion.sum(2) - hits], 1).astype(np.float64)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersections and unions [..., 2, K] -> IoU [..., K] in [0, 1], NaN for a class in neither map."""
    hits, unions = counts[..., 0, :], counts[..., 1, :]
    return np.where(unions > 0, hits / np.maximum(unions, 1), np.nan)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Intersections and unions [..., 2, K] -> mIoU [...] over the classes that occur, NaN where none does."""
    return nanmean(iou(counts), -1)


def nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        return np.nanmean(values, axis)
