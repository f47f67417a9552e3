"""Frequencies of classes, and the class weights that follow from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eomt.data.dataset import SegmentationDataset

Weighting = Literal["inverse", "effective_number"]


@dataclass(frozen=True)
class ClassCounts:
    """Occurrences in a dataset of `num_images` images.

    Attributes:
        pixels: Pixels of each class, int64 [K].
        images: Images that show each class, int64 [K].
        num_images: Images counted.
    """

    pixels: Tensor
    images: Tensor
    num_images: int


class _Histograms(Dataset):
    """Item i counts the values of label map i: int64 [256]. Small enough to send between processes."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return torch.bincount(self.dataset.labels(index).flatten(), minlength=256)


def count_classes(dataset: SegmentationDataset, num_workers: int = 0) -> ClassCounts:
    """Reads every label map once, in `num_workers` processes, behind a progress bar."""
    loader = DataLoader(_Histograms(dataset), batch_size=None, num_workers=num_workers)
    histograms = list(track(loader, description="Counting label pixels", total=len(dataset), transient=True))
    return counts_from_histograms(histograms, len(dataset.classes))


def counts_from_histograms(histograms: list[Tensor], num_classes: int) -> ClassCounts:
    """Sums one histogram of label values, int64 [256], per image."""
    table = torch.stack(histograms)[:, :num_classes]  # [N, K]
    return ClassCounts(table.sum(0), (table > 0).sum(0), len(histograms))


def class_weights(counts: ClassCounts, weighting: Weighting) -> list[float]:
    """One weight per class, with mean 1 over the classes that occur; a class that never occurs keeps 1.

    `inverse` weighs by 1 / pixels. `effective_number` weighs by (1 - b) / (1 - b^n), where n is the number of images
    that show the class, since the class loss sees one segment per class and image, and b = (N - 1) / N for N images
    (Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019).
    """
    scheme: dict[str, Callable[[ClassCounts], Tensor]] = {
        "inverse": lambda c: 1 / c.pixels.double(),
        "effective_number": _inverse_effective_number,
    }
    if weighting not in scheme:
        raise ValueError(f"class_weights must be null, 'inverse' or 'effective_number', got {weighting!r}.")
    present = counts.pixels > 0
    weights = torch.ones(len(present), dtype=torch.float64)
    weights[present] = scheme[weighting](counts)[present]
    weights[present] /= weights[present].mean()
    return weights.tolist()


def _inverse_effective_number(counts: ClassCounts) -> Tensor:
    beta = (counts.num_images - 1) / counts.num_images
    return (1 - beta) / (1 - beta ** counts.images.double())
