"""Losses that teach a network to reject pasted outliers.

Both are computed from the pixel scores S of the final prediction, the one that is deployed, at the masks' own
resolution, [B, K, h, w]; a pixel is an outlier where its label is 254, and counts for nothing where it is 255.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eomt.anomaly.scores import rba, semantic_scores
from eomt.data.labels import IGNORE, OUTLIER
from eomt.models.eomt import Prediction

OutlierLossName = Literal["rba", "mask2anomaly"]


def rba_loss(scores: Tensor, labels: Tensor, inlier_margin: float, outlier_margin: float) -> tuple[Tensor, Tensor]:
    """Squared hinge on s = -sum_k tanh(S) (Nayal et al., ICCV 2023, section 3.3), for inliers and for outliers.

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
    """The contrastive loss of Mask2Anomaly (Rai et al., ICCV 2023, section 3.2), on l = 1 - max_k S.

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
    """The mean of the chosen values, 0 if there are none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


class OutlierLoss:
    """The terms `inlier` and `outlier` of one of these losses, weighted.

    Args:
        name: "rba" or "mask2anomaly".
        num_classes: K.
        weight: of both terms.
        inlier_margin, outlier_margin: of "rba", see `rba_loss`; "mask2anomaly" has `outlier_margin` alone.

    Raises:
        ValueError: a margin that can never be reached or never be violated.
    """

    def __init__(
        self,
        name: OutlierLossName,
        num_classes: int,
        weight: float = 1.0,
        inlier_margin: float = -0.7,
        outlier_margin: float = -0.1,
    ) -> None:
        check_margins(name, num_classes, inlier_margin, outlier_margin)
        if not weight > 0:
            raise ValueError(f"outlier_weight {weight}: must be greater than 0; outlier_loss=null trains without")
        self.name, self.weight = name, weight
        self.inlier_margin, self.outlier_margin = inlier_margin, outlier_margin

    def __call__(self, prediction: Prediction, labels: Tensor) -> dict[str, Tensor]:
        """`inlier` and `outlier`, each [1]: of the prediction of B images with label maps uint8 [B, H, W]."""
        with torch.autocast(labels.device.type, enabled=False):
            masks = prediction.mask_logits().float()
            scores = semantic_scores(masks, prediction.class_logits.float())
            labels = at_size(labels, masks.shape[-2:])
            if self.name == "rba":
                inlier, outlier = rba_loss(scores, labels, self.inlier_margin, self.outlier_margin)
            else:
                inlier, outlier = mask2anomaly_loss(scores, labels, self.outlier_margin)
        return {"inlier": self.weight * inlier[None], "outlier": self.weight * outlier[None]}


def at_size(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Label maps [B, H, W] at the masks' resolution; 255 where a cell is partly an outlier and partly not."""
    outlier = F.adaptive_avg_pool2d((labels == OUTLIER).float(), size)
    nearest = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(labels.dtype)
    mixed = (outlier > 0) & (outlier < 1)
    return nearest.masked_fill(mixed, IGNORE)


def check_margins(name: str, num_classes: int, inlier_margin: float, outlier_margin: float) -> None:
    """Raises ValueError with the reachable range where a margin makes no sense."""
    low, high, what = (-num_classes, 0, "s = -sum tanh(S)") if name == "rba" else (0, 1, "1 - max S")
    margins = {"inlier_margin": inlier_margin, "outlier_margin": outlier_margin}
    if name == "mask2anomaly":
        del margins["inlier_margin"]
    for key, value in margins.items():
        if not low < value < high:
            raise ValueError(
                f"{key} {value}: outlier_loss {name} compares it with {what}, which lies between {low} and {high}; it "
                "would never be reached, or never violated"
            )
    if name == "rba" and inlier_margin >= outlier_margin:
        raise ValueError(
            f"inlier_margin {inlier_margin} must be below outlier_margin {outlier_margin}: s rises with doubt"
        )
