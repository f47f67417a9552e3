"""Checks that no index means two things: a class, "no object", an outlier, or an ignored pixel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from eomt.indices import IGNORE, OUTLIER
from eomt.training.mask_classification_loss import Loss, classes_present, classes_seen

if TYPE_CHECKING:
    from lightning import LightningDataModule
    from torch.utils.data import Dataset
    from torchmetrics import Metric

    from eomt.models.eomt import EoMT

LOOKED_AT = 12  # items of each split
CLASS, NO_OBJECT, OUTLYING, IGNORED = "a class", "no object", "an outlier", "ignored"

logger = logging.getLogger(__name__)


class Indexed(Protocol):
    """The parts of a training module that take an index for something."""

    network: EoMT
    criterion: Loss
    outlier_loss: Callable | None
    confusion: Metric
    hparams: Any


Meanings = Mapping[str, Collection[int]]  # what indices are taken for


def check_start(module: Indexed, datamodule: LightningDataModule | None) -> None:
    """Data, loss, head and metrics of a run agree on what each index means, and labels are among these indices.

    Reads some of the label maps. Warns of an outlier loss that would see no outlier.

    Args:
        datamodule: somebody else's, which has no `cut_paste`, is left out.

    Raises:
        ValueError: an index has two meanings, or a label has none.
    """
    if not hasattr(datamodule, "cut_paste"):
        check_indices(indices_of(module, None))
        return
    check_indices(indices_of(module, datamodule))
    trained, validated = values_in(label_maps(datamodule.train_set)), values_in(label_maps(datamodule.val_set))
    pasting = datamodule.cut_paste
    if pasting and not any(replace(pasting, probability=1).draw(labels) for labels in label_maps(datamodule.train_set)):
        logger.warning(
            "data.cut_paste found no place for an object on the training images that were looked at; set "
            "data.cut_paste.where=anywhere if they show no road"
        )
    trained[:, OUTLIER] |= pasting is not None
    outliers = module.outlier_loss is not None
    classes_present(trained, module.network.num_classes, outliers)
    classes_present(validated, module.network.num_classes, outliers=True)
    if outliers and not trained[:, OUTLIER].any():
        logger.warning(
            "outlier_loss %s, but data.cut_paste is not set and no training image that was looked at holds outliers "
            "(label %d): without them the loss has inliers alone",
            *(module.hparams.outlier_loss, OUTLIER),
        )


def indices_of(module: Indexed, datamodule: LightningDataModule | None) -> dict[str, Meanings]:
    """Collects the meaning that each part of a run gives to indices."""
    head, metrics = module.network.num_classes, module.confusion
    loss = getattr(module.criterion, "num_classes", head)  # a loss of somebody else's may not say
    parts = {
        "head": {CLASS: range(head), NO_OBJECT: [head]},
        "loss": {CLASS: range(loss), NO_OBJECT: [loss], IGNORED: [IGNORE]},
        "metrics": {CLASS: range(metrics.num_classes), IGNORED: [metrics.ignore_index]},
    }
    if datamodule is not None:
        parts["data"] = {CLASS: range(datamodule.num_classes), IGNORED: [IGNORE]}
        if datamodule.cut_paste:
            parts["data"][OUTLYING] = [OUTLIER]
    if module.outlier_loss is not None:
        parts["loss"][OUTLYING] = parts["metrics"][OUTLYING] = [OUTLIER]
    return parts


def check_indices(parts: Mapping[str, Meanings]) -> None:
    """Each index means one thing, and each thing has the same indices, in all parts that know it.

    Raises:
        ValueError: naming the index and the parts.
    """
    taken: dict[int, tuple[str, str]] = {}
    known: dict[str, tuple[Collection[int], str]] = {}
    for part, meanings in parts.items():
        for meaning, indices in meanings.items():
            for index in indices:
                other, where = taken.setdefault(index, (meaning, part))
                if other != meaning:
                    raise ValueError(
                        f"index {index} is {other} in the {where} and {meaning} in the {part}: one would be taken for "
                        f"the other; classes are 0..K-1, no object K, outliers {OUTLIER}, ignored pixels {IGNORE}"
                    )
    for part, meanings in parts.items():
        for meaning, indices in meanings.items():
            others, where = known.setdefault(meaning, (indices, part))
            if set(others) != set(indices):
                raise ValueError(
                    f"{meaning} is {span(others)} in the {where}, but {span(indices)} in the {part}: they must agree"
                )


def span(indices: Collection[int]) -> str:
    """`index 255`, or `index 0..18`."""
    return f"index {min(indices)}" + (f"..{max(indices)}" if len(indices) > 1 else "")


def label_maps(dataset: Dataset) -> Iterator[Tensor]:
    """Yields the label maps of some items, uint8 [H, W], as they are stored; no image is read."""
    for i in torch.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).round().int().tolist():
        yield dataset.labels(i)


def values_in(labels: Iterable[Tensor]) -> Tensor:
    """Marks the values that label maps hold, bool [1, 256]."""
    return torch.cat([classes_seen(each[None]) for each in labels]).any(0, keepdim=True)
