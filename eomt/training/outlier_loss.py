"""Losses that teach a network to reject pasted outliers.

Both are computed from the pixel scores S of the final prediction, the one that is deployed, at the masks' own
resolution, [B, K, h, w]; a pixel is an outlier where its label is 254, and counts for nothing where it is 255. Labels
at that resolution are those of a cell's middle, except that a cell with a part of an outlier counts for nothing.
"""

import logging
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eomt.anomaly.scores import rba, semantic_scores
from eomt.indices import IGNORE, OUTLIER
from eomt.models.eomt import Prediction
from eomt.settings.model import OutlierLossName

SURE = -math.tanh(1)  # s of a pixel that one sure query claims: -0.76

logger = logging.getLogger(__name__)


def rba_loss(scores: Tensor, labels: Tensor, inlier_margin: float, outlier_margin: float) -> tuple[Tensor, Tensor]:
    """Squared hinge on s = -sum_k tanh(S) (Nayal et al., ICCV 2023), for inliers and for outliers.

    Inliers shall have s <= `inlier_margin`, outliers s >= `outlier_margin`; s lies in [-K, 0].

    Args:
        scores: S [B, K, h, w]. labels: [B, h, w].

    Returns:
        The mean over inliers, and over outliers; 0 where there are none.
    """
    s = rba(scores)
    return (
        mean_over((s - inlier_margin).relu().square(), labels < OUTLIER),
        mean_over((outlier_margin - s).relu().square(), labels == OUTLIER),
    )


def mask2anomaly_loss(scores: Tensor, labels: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The contrastive loss of Mask2Anomaly (Rai et al., ICCV 2023), on l = 1 - max_k S.

    Half of l squared for inliers, half of the squared distance up to `margin` for outliers.

    Args:
        scores: S [B, K, h, w]. labels: [B, h, w].

    Returns:
        The mean over inliers, and over outliers; 0 where there are none.
    """
    rejection = 1 - scores.amax(1)
    return (
        mean_over(0.5 * rejection.square(), labels < OUTLIER),
        mean_over(0.5 * (margin - rejection).relu().square(), labels == OUTLIER),
    )


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values, 0 if there are none.

    Counted over all processes, so that DDP's mean of gradients weighs every pixel the same.
    """
    count = chosen.sum().float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return (values * chosen).sum() / count.clamp(min=1)


class Margins(NamedTuple):
    """Up to where inliers, and outliers, are pushed; an inlier margin of None: the loss has none."""

    inlier: float | None
    outlier: float


DEFAULT_MARGINS = {"rba": Margins(-0.7, -0.1), "mask2anomaly": Margins(None, 0.75)}


class OutlierLoss:
    """The terms `inlier` and `outlier` of one of these losses, weighted.

    Args:
        name: "rba" or "mask2anomaly".
        num_classes: K.
        weight: of both terms.
        inlier_margin, outlier_margin: see `rba_loss`; "mask2anomaly" has the second alone. None: -0.7 and -0.1 for
            "rba", whose s is -0.76 where one query is sure; 0.75 for "mask2anomaly".

    Raises:
        ValueError: a margin that can never be reached or never be violated.
    """

    def __init__(
        self,
        name: OutlierLossName,
        num_classes: int,
        weight: float = 1.0,
        inlier_margin: float | None = None,
        outlier_margin: float | None = None,
    ) -> None:
        usual = DEFAULT_MARGINS[name]
        self.name, self.weight = name, weight
        self.margins = Margins(
            usual.inlier if inlier_margin is None else inlier_margin,
            usual.outlier if outlier_margin is None else outlier_margin,
        )
        check_margins(name, num_classes, self.margins)

    def __call__(self, prediction: Prediction, labels: Tensor) -> dict[str, Tensor]:
        """`inlier` and `outlier`, each [1]: of the prediction of B images with label maps uint8 [B, H, W]."""
        masks, classes = prediction.mask_logits(), prediction.class_logits
        with torch.autocast(labels.device.type, enabled=False):
            scores = semantic_scores(masks.float(), classes.float())
            labels = at_size(labels, masks.shape[-2:])
            if self.name == "rba":
                inlier, outlier = rba_loss(scores, labels, *self.margins)
            else:
                inlier, outlier = mask2anomaly_loss(scores, labels, self.margins.outlier)
        return {"inlier": self.weight * inlier[None], "outlier": self.weight * outlier[None]}


def at_size(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Label maps [B, H, W] at the masks' resolution; 255 where a cell is partly an outlier and partly not."""
    outlier = F.adaptive_avg_pool2d((labels == OUTLIER).float(), size)
    nearest = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(labels.dtype)
    mixed = (outlier > 0) & (outlier < 1)
    return nearest.masked_fill(mixed, IGNORE)


def check_margins(name: OutlierLossName, num_classes: int, margins: Margins) -> None:
    """Raises ValueError with the reachable range where a margin makes no sense; warns where it hardly does."""
    low, high, what = (-num_classes, 0, "s = -sum tanh(S)") if name == "rba" else (0, 1, "1 - max S")
    for side, value in margins._asdict().items():
        if value is None:
            continue
        if name == "mask2anomaly" and side == "inlier":
            raise ValueError(f"inlier_margin {value}: outlier_loss mask2anomaly has none; leave it out")
        if not low < value < high:
            raise ValueError(
                f"{side}_margin {value}: outlier_loss {name} compares it with {what}, which lies between {low} and "
                f"{high}: it would never be reached, or never be violated; choose one in between"
            )
    if name != "rba":
        return
    if margins.inlier >= margins.outlier:
        raise ValueError(
            f"inlier_margin {margins.inlier} must be below outlier_margin {margins.outlier}: s rises with doubt"
        )
    if margins.inlier < SURE:
        logger.warning(
            "inlier_margin %s: s is %.2f where one query is sure of a pixel; only pixels that several queries or "
            "classes claim at once reach less",
            *(margins.inlier, SURE),
        )
