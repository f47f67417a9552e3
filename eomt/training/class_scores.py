"""IoU of each class from confusion counts, and which classes a mean is taken over."""

import logging
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

logger = logging.getLogger(__name__)

WORST = 3  # classes that a validation names


def scores_of(confusion: Tensor, names: Sequence[str]) -> tuple[float, dict[str, float], dict[str, int]]:
    """mIoU over the classes that have an IoU, and IoU and labelled pixels by class; see `iou_per_class`.

    Raises:
        ValueError: confusion counts of nothing.
    """
    check_labelled(confusion)
    iou = iou_per_class(confusion)
    by_class = (dict(zip(names, values.tolist(), strict=True)) for values in (iou, confusion.sum(1)))
    return iou.nanmean().item(), *by_class


def check_labelled(confusion: Tensor) -> None:
    """Raises ValueError for confusion counts of nothing."""
    if not confusion.any():
        raise ValueError(
            "the validation images have no labelled pixel, so nothing can be scored: take others, or list the values "
            "of their masks as classes"
        )


def iou_per_class(confusion: Tensor) -> Tensor:
    """Confusion counts [K, K] (target, prediction) -> IoU [K] in [0, 1], NaN for a class in neither."""
    hit = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return torch.where(union > 0, hit / union.clamp(min=1), torch.nan)


def tell_counted(class_iou: Mapping[str, float], before: set[str] | None) -> set[str]:
    """Logs once that an mIoU leaves classes out, and warns where it is taken over others than the one before.

    Args:
        class_iou: IoU of each class, NaN where it is not defined.
        before: the classes of the mean before; None: this is the first.

    Returns:
        The classes that this mean is taken over.
    """
    counted = {name for name, iou in class_iou.items() if iou == iou}
    if rank_zero_only.rank:
        return counted
    if before is None and len(counted) < len(class_iou):
        left_out = ", ".join(name for name in class_iou if name not in counted)
        logger.info("mIoU%s: no validation pixel is labelled or predicted as %s", over(class_iou), left_out)
    elif before is not None and counted != before:
        logger.warning(
            "mIoU%s, before it was over %d (%s): a class without a validation pixel counts, with IoU 0, as soon as it "
            "is predicted; do not compare the two, validate on images that show it or leave it out of the classes",
            *(over(class_iou, always=True), len(before), ", ".join(sorted(counted ^ before))),
        )
    return counted


def score_words(miou: float, class_iou: Mapping[str, float], before: float | None) -> str:
    """Words a validation: `mIoU 61.02 (+3.11), least: pole 4.10, sign 9.78, fence 15.42`, in percent.

    Args:
        miou, class_iou: from `scores_of`.
        before: the mIoU of the validation before, if there was one.
    """
    known = sorted((iou, name) for name, iou in class_iou.items() if iou == iou)[:WORST]
    change = "" if before is None else f" ({100 * (miou - before):+.2f})"
    least = ", ".join(f"{name} {100 * iou:.2f}" for iou, name in known)
    return f"mIoU {100 * miou:.2f}{change}" + (f", least: {least}" if len(class_iou) > 1 else "")


def over(class_iou: Mapping[str, float | None], always: bool = False) -> str:
    """` over N of K classes`, where N < K; an IoU that is not defined is NaN or None."""
    counted = sum(iou is not None and iou == iou for iou in class_iou.values())
    return f" over {counted} of {len(class_iou)} classes" if always or counted < len(class_iou) else ""
