"""Hungarian matching and the mask classification loss, computed on label maps.

Follows Mask2Former (Cheng et al., CVPR 2022, sections 3.2 and 3.3) as the published EoMT uses it. A target is the label
map itself: the mask of class c at a point is the bilinear weight of the neighbouring pixels labelled c, so dense masks
are never built.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from eomt.indices import IGNORE, OUTLIER
from eomt.models.eomt import Prediction
from eomt.settings.model import LossSettings


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps [N, C, h, w] at points [N, P, 2], (x, y) in [0, 1] -> [N, C, P]; zero outside."""
    return F.grid_sample(maps, points[:, :, None].mul(2).sub_(1), align_corners=False).squeeze(3)


def neighbours(position: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The two pixels beside positions along an axis of `length` pixels, int64, and their linear weights, 0 outside."""
    low = position.floor()
    share = position - low
    for place, weight in ((low, 1 - share), (low + 1, share)):
        inside = (place >= 0) & (place < length)
        yield place.clamp_(0, length - 1).long(), weight.mul_(inside)


def corners(points: Tensor, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The four pixels around each point in maps of `size` (h, w), and their bilinear weights.

    Args:
        points: (x, y) in [0, 1], float [N, P, 2].

    Returns:
        Four times: places in the flattened maps, int64 [N, P], and weights [N, P]; a pixel outside weighs nothing.
    """
    height, width = size
    columns = list(neighbours(points[..., 0] * width - 0.5, width))  # pixel centres at whole numbers
    for row, row_weight in neighbours(points[..., 1] * height - 0.5, height):
        row.mul_(width)
        for column, weight in columns:
            yield row + column, row_weight * weight


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of features [B, C, h, w], channels last in memory, at points [B, P, 2] -> [B, P, C]."""
    places, weights = (torch.stack(parts, -1) for parts in zip(*corners(points, features.shape[-2:]), strict=True))
    rows = features.permute(0, 2, 3, 1).flatten(1, 2)  # [B, h * w, C]
    places += rows.shape[1] * torch.arange(len(rows), device=rows.device)[:, None, None]
    values = F.embedding_bag(  # sums four weighted rows a point, without a copy of them
        places.flatten(0, 1), rows.flatten(0, 1), per_sample_weights=weights.flatten(0, 1).to(rows.dtype), mode="sum"
    )
    return values.unflatten(0, points.shape[:2])


def values_at(prediction: Prediction, points: Tensor) -> Tensor:
    """Mask logits [B, Q, P] at points [B, P, 2], without the masks."""
    return prediction.embeddings @ sample_features(prediction.features, points).mT


def sample_all_classes(labels: Tensor, points: Tensor, num_classes: int) -> Tensor:
    """The mask of every class at each point: labels [B, H, W], points [B, P, 2] -> [B, K, P] in [0, 1]."""
    values = points.new_zeros(len(labels), num_classes + 1, points.shape[1])
    for places, weights in corners(points, labels.shape[-2:]):
        found = labels.flatten(1).gather(1, places).clamp_(max=num_classes)
        values.scatter_add_(1, found.long()[:, None], weights[:, None])  # ignored pixels into the last, dropped place
    return values[:, :num_classes]


def matching_cost(
    mask_values: Tensor,
    target_values: Tensor,
    class_logits: Tensor,
    mask_coefficient: float = LossSettings.mask_coefficient,
    dice_coefficient: float = LossSettings.dice_coefficient,
    class_coefficient: float = LossSettings.class_coefficient,
) -> Tensor:
    """Cost of giving query q the mask of class k, [B, Q, K].

    Args:
        mask_values: mask logits at P points, [B, Q, P].
        target_values: class masks at the same points, [B, K, P] in [0, 1].
        class_logits: [B, Q, K + 1].
    """
    # softplus(-x) is the cost of calling a point inside, softplus(x) of calling it outside: less by x
    bce = (F.softplus(mask_values).sum(-1)[..., None] - mask_values @ target_values.mT) / mask_values.shape[2]
    probability = mask_values.sigmoid()
    intersection = probability @ target_values.mT
    dice = 1 - (2 * intersection + 1) / (probability.sum(-1)[..., None] + target_values.sum(-1)[:, None] + 1)
    class_cost = -class_logits.softmax(-1)[..., :-1]
    return mask_coefficient * bce + dice_coefficient * dice + class_coefficient * class_cost


def classes_seen(labels: Tensor) -> Tensor:
    """Marks the values that each label map [B, H, W] holds: bool [B, 256]."""
    seen = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
    return seen.scatter_(1, labels.flatten(1).long(), True)


def classes_present(seen: Tensor, num_classes: int, outliers: bool = False) -> Tensor:
    """Marks the classes [B, K] among all values seen [B, 256]; 254 may be among them if there are outliers.

    Raises:
        ValueError: a label that is neither a class nor 255. It would collide with "no object" (index K) or beyond.
    """
    strange = seen[:, num_classes : OUTLIER if outliers else IGNORE].any(0).nonzero().flatten() + num_classes
    if OUTLIER in strange.tolist():
        raise ValueError(
            f"label {OUTLIER} in a target marks outliers, which only an outlier loss can train on: set "
            "model.outlier_loss=rba, or leave data.cut_paste out"
        )
    if len(strange):
        raise ValueError(
            f"label {strange[0].item()} in a target, but the classes are 0..{num_classes - 1} and {IGNORE} is ignored: "
            "map it to a class or to 255, or raise num_classes"
        )
    return seen[:, :num_classes]


class Matches(NamedTuple):
    """Pairs of a query and the class that it learns: up to M for each of L predictions of B images.

    queries, classes: int64 [L, B, M]; in unused places the class is -1.
    finite: whether all costs were numbers; otherwise the pairs mean little.
    """

    queries: Tensor
    classes: Tensor
    finite: bool = True

    def class_targets(self, num_q: int, no_object: int) -> Tensor:
        """Returns the class for each query to predict, int64 [L, B, Q]; without a match the index of "no object"."""
        place = torch.where(self.classes < 0, num_q, self.queries)  # unused ones into a further, dropped place
        target = place.new_full((*place.shape[:2], num_q + 1), no_object)
        return target.scatter_(2, place, self.classes)[..., :num_q]


def match(cost: Tensor, present: Tensor) -> Matches:
    """Assigns each class present to one query at least total cost.

    Args:
        cost: [L, B, Q, K], on the CPU. present: bool [B, K].
    """
    finite = bool(cost.isfinite().all())
    if not finite:  # other processes wait for this one: it goes on, and the loss will say it
        cost = cost.nan_to_num(posinf=0, neginf=0)
    shape = (*cost.shape[:2], min(cost.shape[2], int(present.sum(1).max())))
    matches = Matches(torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1), finite)
    for i, b in product(*map(range, cost.shape[:2])):
        classes = present[b].nonzero().flatten()
        query, column = linear_sum_assignment(cost[i, b][:, classes])
        matches.queries[i, b, : len(query)] = torch.as_tensor(query)
        matches.classes[i, b, : len(query)] = classes[column]
    return matches


def mask_losses(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice loss of masks at P points: logits [..., P] and targets [..., P] in [0, 1] -> [...]."""
    bce = F.binary_cross_entropy_with_logits(values, targets, reduction="none").mean(-1)
    probability = values.sigmoid()
    overlap = (2 * (probability * targets).sum(-1) + 1) / (probability.sum(-1) + targets.sum(-1) + 1)
    return bce, 1 - overlap


def add_margin(class_logits: Tensor, target: Tensor, scale: float, margin: float) -> Tensor:
    """s cos(theta + m) in place of the target's s cos(theta), where the target is a known class.

    Deng et al., CVPR 2019. Beyond theta = pi - m the cosine would rise again: there it goes on falling,
    as s (cos(theta) - m sin(m)), like the published code.

    Args:
        class_logits: [..., K + 1], scaled cosines. target: [...], K is "no object", which has no margin.
    """
    cosine = class_logits.gather(-1, target[..., None]) / scale
    sine = (1 - cosine.square()).clamp(min=1e-7).sqrt()  # whose slope is infinite at 0
    wider = cosine * math.cos(margin) - sine * math.sin(margin)
    wider = wider.where(cosine > -math.cos(margin), cosine - margin * math.sin(margin))
    known = target[..., None] < class_logits.shape[-1] - 1
    return class_logits.scatter(-1, target[..., None], scale * wider.where(known, cosine))


def class_loss(class_logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean cross-entropy [L] over K + 1 classes: logits [L, B, Q, K + 1], targets [L, B, Q]."""
    loss = F.cross_entropy(class_logits.flatten(0, 2), target.flatten(), weight, reduction="none")
    return loss.view(len(target), -1).sum(1) / weight[target].flatten(1).sum(1)


@torch.no_grad()
def choose_points(masks: Tensor, drawn: Tensor, num_candidates: int, num_uncertain: int) -> Tensor:
    """Draws the points at which each mask is judged: mostly where its logit is near zero, the rest uniformly.

    PointRend (Kirillov et al., CVPR 2020, section 3.1): of the candidates the most uncertain are kept. All masks of an
    image choose from the same points: for each of them they are as random as points of its own.

    Args:
        masks: [B, M, h, w]. drawn: uniform points [B, D, 2]: first the candidates, then those that all masks take.

    Returns:
        Indices of drawn points, int64 [B, M, num_uncertain + D - num_candidates].
    """
    certainty = sample_maps(masks, drawn[:, :num_candidates]).abs_()
    uncertain = certainty.topk(num_uncertain, largest=False, sorted=False).indices
    uniform = torch.arange(num_candidates, drawn.shape[1], device=masks.device)
    return torch.cat((uncertain, uniform.expand(*masks.shape[:2], -1)), 2)


@runtime_checkable
class Loss(Protocol):
    """A training loss: `model.loss={_target_: mine.FocalLoss}` puts another one in place of the published one."""

    def __call__(self, predictions: Sequence[Prediction], labels: Tensor) -> dict[str, Tensor]:
        """Weighted terms by name, each [L], of L predictions of the same B images; the last prediction is deployed.

        Args:
            labels: uint8 [B, H, W]: classes 0..K-1, 255 where nothing is to be learned.
        """
        ...


class MaskClassificationLoss(nn.Module):
    """The training loss of one or several predictions against label maps.

    Args:
        num_classes: K.
        num_points: points per mask at which matching and mask losses are computed.
        oversample_ratio: candidates per point, of which the most uncertain are chosen (see `choose_points`).
        importance_sample_ratio: share of the points that are chosen so.
        mask_coefficient, dice_coefficient, class_coefficient: weights of the terms, in matching and loss alike.
        no_object_coefficient: weight of "no object" in the class loss.
        class_weights: weight of each class in the class loss, K numbers; None: all 1.
        scale, margin: of a cosine head, whose logits get the angular margin after matching, see `add_margin`.
        outliers: labels may be 254: such pixels are judged by no mask, in matching and loss alike.
    """

    def __init__(
        self,
        num_classes: int,
        num_points: int = LossSettings.num_points,
        oversample_ratio: float = LossSettings.oversample_ratio,
        importance_sample_ratio: float = LossSettings.importance_sample_ratio,
        mask_coefficient: float = LossSettings.mask_coefficient,
        dice_coefficient: float = LossSettings.dice_coefficient,
        class_coefficient: float = LossSettings.class_coefficient,
        no_object_coefficient: float = LossSettings.no_object_coefficient,
        class_weights: Sequence[float] | None = None,
        scale: float = 1.0,
        margin: float = 0.0,
        outliers: bool = False,
    ) -> None:
        super().__init__()
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(f"class_weights has {len(class_weights)} numbers, there are {num_classes} classes")
        self.num_classes = num_classes
        self.num_points = num_points
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(num_points * importance_sample_ratio)
        self.coefficients = (mask_coefficient, dice_coefficient, class_coefficient)
        self.scale, self.margin, self.outliers = scale, margin, outliers
        self.finite_logits = True  # of the last batch
        weight = torch.tensor([*(class_weights or [1.0] * num_classes), no_object_coefficient])
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(self, predictions: Sequence[Prediction], labels: Tensor) -> dict[str, Tensor]:
        """The weighted terms of L predictions: `mask`, `dice` and `class`, each [L]; NaN where logits are not finite.

        Args:
            predictions: of the same B images.
            labels: uint8 [B, H, W], 0..K-1 or 255, with `outliers` also 254; the sizes of masks and labels may differ.
        """
        matches = self.match(predictions, labels)
        target = matches.class_targets(predictions[0].class_logits.shape[1], self.num_classes).to(labels.device)
        queries, classes = (index.to(labels.device) for index in matches[:2])
        masks = torch.stack([p.masks_of(chosen) for p, chosen in zip(predictions, queries, strict=True)], 1)
        class_logits = torch.stack([p.class_logits for p in predictions])
        with torch.autocast(labels.device.type, enabled=False):
            if self.margin:
                class_logits = add_margin(class_logits.float(), target, self.scale, self.margin)
            bce, dice = self.mask_terms(masks.float(), classes.transpose(0, 1), labels)
            entropy = class_loss(class_logits.float(), target, self.class_weight)
        self.finite_logits = matches.finite
        if not matches.finite:  # of a query without a class, too, whose mask no term looks at
            entropy = entropy * torch.nan
        num_masks = mean_over_processes(int((matches.classes[0] >= 0).sum()), labels.device)
        for_mask, for_dice, for_class = self.coefficients
        return {"mask": for_mask * bce / num_masks, "dice": for_dice * dice / num_masks, "class": for_class * entropy}

    def mask_terms(self, masks: Tensor, classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and dice loss [L], summed over masks: logits [B, L, M, h, w], classes [B, L, M], -1 for no mask."""
        shape, masks, classes = classes.shape, masks.flatten(1, 2), classes.flatten(1)
        num_drawn = self.num_candidates + self.num_points - self.num_uncertain
        drawn = self.draw(labels, num_drawn)
        index = choose_points(masks, drawn, self.num_candidates, self.num_uncertain)  # [B, L * M, P]

        image = torch.arange(len(masks), device=masks.device)[:, None, None]
        points = drawn[image, index]
        targets = sample_all_classes(labels, drawn, self.num_classes)[image, classes.clamp(min=0)[..., None], index]
        values = sample_maps(masks.flatten(0, 1)[:, None], points.flatten(0, 1)).view_as(targets)
        bce, dice = mask_losses(values, targets)
        return tuple(term.where(classes >= 0, 0).view(shape).sum((0, 2)) for term in (bce, dice))

    @torch.no_grad()
    def match(self, predictions: Sequence[Prediction], labels: Tensor, points: Tensor | None = None) -> Matches:
        """The assignment of classes to queries, at random points [B, P, 2] unless some are given.

        All predictions are judged at the same points, and reach the CPU in one transfer.
        """
        if points is None:
            points = self.draw(labels, self.num_points)
        targets = sample_all_classes(labels, points, self.num_classes)
        costs = []
        for prediction in predictions:
            values = values_at(prediction, points)
            with torch.autocast(labels.device.type, enabled=False):
                logits = prediction.class_logits.float()
                costs.append(matching_cost(values.float(), targets, logits, *self.coefficients))
        cost = torch.stack(costs)
        both = torch.cat((cost.flatten(), classes_seen(labels).flatten().to(cost.dtype))).cpu()
        cost, seen = both[: cost.numel()].view(cost.shape), both[cost.numel() :].view(len(labels), -1).bool()
        return self.assign(cost, seen)

    def assign(self, cost: Tensor, seen: Tensor) -> Matches:
        """The part that reads values: costs [L, B, Q, K] and values seen [B, 256], both on the CPU."""
        return match(cost, classes_present(seen, self.num_classes, self.outliers))

    def draw(self, labels: Tensor, number: int) -> Tensor:
        """Uniform points [B, number, 2] of each image, none of them on an outlier."""
        points = torch.rand(len(labels), number, 2, device=labels.device)
        return off_outliers(points, labels) if self.outliers else points


def off_outliers(points: Tensor, labels: Tensor) -> Tensor:
    """Points [B, P, 2] in label maps [B, H, W], those with an outlier pixel beside them replaced by others, in turns.

    Where no point is left they lie outside the image, where all maps are zero and nothing is learned.
    """
    touched = sum(labels.flatten(1).gather(1, places) == OUTLIER for places, _ in corners(points, labels.shape[1:])) > 0
    order = touched.byte().argsort(dim=1, stable=True)  # the free ones first
    free = (~touched).sum(1, keepdim=True)
    turns = torch.arange(points.shape[1], device=points.device) % free.clamp(min=1)
    chosen = points.gather(1, order.gather(1, turns)[..., None].expand(-1, -1, 2))
    return chosen.masked_fill(free[..., None] == 0, -1.0)


def mean_over_processes(num_masks: int, device: torch.device) -> float:
    """Masks per process, averaged over processes, so that DDP's mean of gradients weighs every mask the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return max(num_masks, 1)
    total = torch.tensor(float(num_masks), device=device)
    dist.all_reduce(total)
    return max(total.item() / dist.get_world_size(), 1.0)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum of all terms over all predictions."""
    return sum(term.sum() for term in terms.values())
