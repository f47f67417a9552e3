"""Hungarian matching and the mask classification loss, computed on label maps.

Follows Mask2Former (Cheng et al., CVPR 2022, sections 3.2 and 3.3) as the published EoMT uses it. A target is the label
map itself: the mask of class c at a point is the bilinear weight of the neighbouring pixels labelled c, so dense masks
are never built.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from eomt.data.labels import IGNORE


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps [N, C, h, w] at points [N, P, 2], (x, y) in [0, 1] -> [N, C, P]; zero outside."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False).squeeze(3)


def corner_labels(labels: Tensor, image: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of the four pixels around each point, and their bilinear weights.

    Args:
        labels: label maps, uint8 [B, H, W].
        image: which map the points lie in, int64 [N].
        points: (x, y) in [0, 1], float [N, P, 2].

    Returns:
        labels int64 [N, P, 4] and weights [N, P, 4]; a corner outside the image weighs nothing.
    """
    height, width = labels.shape[-2:]
    x, y = (points * points.new_tensor([width, height]) - 0.5).unbind(-1)  # pixel centres at whole numbers
    left, top = x.floor(), y.floor()
    found, weights = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = left + dx, top + dy
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            column, row = column.clamp(0, width - 1).long(), row.clamp(0, height - 1).long()
            found.append(labels[image[:, None], row, column].long())
            weights.append(weight * inside)
    return torch.stack(found, -1), torch.stack(weights, -1)


def sample_all_classes(labels: Tensor, points: Tensor, num_classes: int) -> Tensor:
    """The mask of every class at each point: labels [B, H, W], points [B, P, 2] -> [B, K, P] in [0, 1]."""
    corners, weights = corner_labels(labels, torch.arange(len(labels), device=labels.device), points)
    values = weights.new_zeros(*points.shape[:2], num_classes + 1)
    values.scatter_add_(2, corners.clamp(max=num_classes), weights)  # ignored pixels fall into the last, dropped place
    return values[..., :num_classes].transpose(1, 2)


def sample_one_class(labels: Tensor, image: Tensor, classes: Tensor, points: Tensor) -> Tensor:
    """The mask of class `classes[n]` in map `image[n]` at points [N, P, 2] -> [N, P] in [0, 1]."""
    corners, weights = corner_labels(labels, image, points)
    return (weights * (corners == classes[:, None, None])).sum(-1)


def matching_cost(
    mask_values: Tensor,
    target_values: Tensor,
    class_logits: Tensor,
    mask_coefficient: float = 5.0,
    dice_coefficient: float = 5.0,
    class_coefficient: float = 2.0,
) -> Tensor:
    """Cost of giving query q the mask of class k, [B, Q, K].

    Args:
        mask_values: mask logits at P points, [B, Q, P].
        target_values: class masks at the same points, [B, K, P] in [0, 1].
        class_logits: [B, Q, K + 1].
    """
    probability = mask_values.sigmoid()
    bce = (  # softplus(-x) is the cost of calling a point inside, softplus(x) of calling it outside
        F.softplus(-mask_values) @ target_values.mT + F.softplus(mask_values) @ (1 - target_values).mT
    ) / mask_values.shape[2]
    intersection = probability @ target_values.mT
    dice = 1 - (2 * intersection + 1) / (probability.sum(-1)[..., None] + target_values.sum(-1)[:, None] + 1)
    class_cost = -class_logits.softmax(-1)[..., :-1]
    return mask_coefficient * bce + dice_coefficient * dice + class_coefficient * class_cost


def classes_present(labels: Tensor, num_classes: int) -> Tensor:
    """Which classes each label map [B, H, W] holds: bool [B, K] on the CPU.

    Raises:
        ValueError: a label that is neither a class nor 255. It would collide with "no object" (index K) or beyond.
    """
    seen = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
    seen = seen.scatter_(1, labels.flatten(1).long(), True).cpu()
    strange = seen[:, num_classes:IGNORE].any(0).nonzero().flatten() + num_classes
    if len(strange):
        raise ValueError(
            f"label {strange[0].item()} in a target, but the classes are 0..{num_classes - 1} and {IGNORE} is ignored: "
            "map it to a class or to 255, or raise num_classes"
        )
    return seen[:, :num_classes]


def match(cost: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns each class present to one query at least total cost.

    Args:
        cost: [B, Q, K]. present: bool [B, K].

    Returns:
        Image, query and class index of each of the M matches, int64 [M] on the CPU, ordered by image, then query.
    """
    cost = cost.detach().float().cpu()
    if not cost.isfinite().all():
        raise ValueError("the matching cost is not finite: training has diverged; lower lr or use precision=32-true")
    matches = []
    for b, image_cost in enumerate(cost):
        classes = present[b].nonzero().flatten()
        query, column = linear_sum_assignment(image_cost[:, classes])
        matches.append(torch.stack((torch.full((len(query),), b), torch.as_tensor(query), classes[column])))
    image, query, classes = torch.cat(matches, 1)
    return image, query, classes


def mask_losses(values: Tensor, targets: Tensor, num_masks: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice loss of M masks at P points (logits [M, P], targets [M, P]), divided by `num_masks`."""
    bce = F.binary_cross_entropy_with_logits(values, targets, reduction="none").mean(1).sum()
    probability = values.sigmoid()
    overlap = (2 * (probability * targets).sum(1) + 1) / (probability.sum(1) + targets.sum(1) + 1)
    return bce / num_masks, (1 - overlap).sum() / num_masks


def class_loss(class_logits: Tensor, match: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> Tensor:
    """Cross-entropy over K + 1 classes [B, Q, K + 1]; queries without a match should say "no object" (index K)."""
    image, query, classes = match
    target = torch.full(class_logits.shape[:2], class_logits.shape[2] - 1)
    target[image, query] = classes
    return F.cross_entropy(class_logits.flatten(0, 1), target.flatten().to(class_logits.device), weight)


@torch.no_grad()
def uncertain_points(masks: Tensor, num_points: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Points [M, P, 2] for masks [M, 1, h, w]: mostly where the logit is near zero, the rest uniform.

    PointRend (Kirillov et al., CVPR 2020, section 3.1): of `oversample_ratio * P` uniform candidates the most uncertain
    `importance_ratio * P` are kept.
    """
    candidates = torch.rand(len(masks), int(num_points * oversample_ratio), 2, device=masks.device)
    num_uncertain = int(importance_ratio * num_points)
    uncertainty = -sample_maps(masks, candidates).squeeze(1).abs()
    chosen = uncertainty.topk(num_uncertain, dim=1).indices
    uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    uniform = torch.rand(len(masks), num_points - num_uncertain, 2, device=masks.device)
    return torch.cat((uncertain, uniform), 1)


class MaskClassificationLoss(nn.Module):
    """The training loss of one or several predictions against label maps.

    Args:
        num_classes: K.
        num_points: points per mask at which matching and mask losses are computed.
        oversample_ratio, importance_sample_ratio: see `uncertain_points`.
        mask_coefficient, dice_coefficient, class_coefficient: weights of the terms, in matching and loss alike.
        no_object_coefficient: weight of "no object" in the class loss.
        class_weights: weight of each class in the class loss, K numbers; None: all 1.
    """

    def __init__(
        self,
        num_classes: int,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        mask_coefficient: float = 5.0,
        dice_coefficient: float = 5.0,
        class_coefficient: float = 2.0,
        no_object_coefficient: float = 0.1,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(f"class_weights has {len(class_weights)} numbers, there are {num_classes} classes")
        self.num_classes = num_classes
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.coefficients = (mask_coefficient, dice_coefficient, class_coefficient)
        weight = torch.tensor([*(class_weights or [1.0] * num_classes), no_object_coefficient])
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(self, mask_logits: Tensor, class_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted terms of one prediction.

        Args:
            mask_logits: [B, Q, h, w]. class_logits: [B, Q, K + 1].
            labels: uint8 [B, H, W], 0..K-1 or 255; the sizes of masks and labels may differ.
        """
        with torch.autocast(mask_logits.device.type, enabled=False):
            return self.terms(mask_logits.float(), class_logits.float(), labels)

    def terms(self, mask_logits: Tensor, class_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`forward` in float32."""
        image, query, classes = matched = self.match(mask_logits, class_logits, labels)
        image, query, classes = (index.to(labels.device) for index in matched)
        masks = mask_logits[image, query][:, None]  # [M, 1, h, w]
        points = uncertain_points(masks, self.num_points, self.oversample_ratio, self.importance_sample_ratio)
        bce, dice = mask_losses(
            sample_maps(masks, points).squeeze(1),
            sample_one_class(labels, image, classes, points),
            mean_over_processes(len(masks), labels.device),
        )
        for_mask, for_dice, for_class = self.coefficients
        return {
            "mask": for_mask * bce,
            "dice": for_dice * dice,
            "class": for_class * class_loss(class_logits, matched, self.class_weight),
        }

    @torch.no_grad()
    def match(
        self, mask_logits: Tensor, class_logits: Tensor, labels: Tensor, points: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The assignment of classes to queries, at random points [B, P, 2] unless some are given; see `match`."""
        if points is None:
            points = torch.rand(len(labels), self.num_points, 2, device=labels.device)
        target_values = sample_all_classes(labels, points, self.num_classes)
        cost = matching_cost(sample_maps(mask_logits, points), target_values, class_logits, *self.coefficients)
        return match(cost, classes_present(labels, self.num_classes))


def mean_over_processes(num_masks: int, device: torch.device) -> float:
    """Masks per process, averaged over processes, so that DDP's mean of gradients weighs every mask the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return max(num_masks, 1)
    total = torch.tensor(float(num_masks), device=device)
    dist.all_reduce(total)
    return max(total.item() / dist.get_world_size(), 1.0)
