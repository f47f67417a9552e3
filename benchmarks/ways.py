"""What each shortcut of a training step gives: the step as it is against the same step with one plain formula."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.step import Step, our_step, same_loss, task_for
from eomt.models import vit
from eomt.models.eomt import Prediction, multiply
from eomt.models.scale_block import ScaleBlock
from eomt.training import mask_classification_loss as loss


def one_call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, dropout_p: float = 0.0, **_: Any) -> Tensor:
    """Attention with the whole mask, as a float mask takes it."""
    rows = attn_mask.as_subclass(Tensor)
    whole = torch.ones(len(rows), 1, query.shape[2], key.shape[2], dtype=torch.bool, device=rows.device)
    whole[:, :, : rows.shape[2]] = rows
    return F.scaled_dot_product_attention(query, key, value, whole, dropout_p)


def whole_masks(self: Prediction, size: tuple[int, int] | None = None) -> Tensor:
    """Mask logits of all pixels, and then the patches."""
    masks = multiply(self.embeddings, self.features)
    return F.interpolate(masks, size, mode="bilinear") if size else masks


def masks_of_all(self: Prediction, queries: Tensor) -> Tensor:
    """Mask logits of all queries, and then the matched ones."""
    masks = multiply(self.embeddings, self.features)
    return masks[torch.arange(len(queries), device=queries.device)[:, None], queries]


def values_of_maps(prediction: Prediction, points: Tensor) -> Tensor:
    """Mask logits of all pixels, and then the points."""
    return loss.sample_maps(multiply(prediction.embeddings, prediction.features), points)


def transposed(self: ScaleBlock, x: Tensor) -> Tensor:
    """Through the transposed convolution, in the same shape."""
    wide = self.conv1(x).permute(0, 2, 3, 1)  # [B, 2H, 2W, C]
    return wide.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))


class PlainStep:
    """A step that runs with one function replaced."""

    def __init__(self, step: Step, replaced: Callable[[], AbstractContextManager]) -> None:
        self.step, self.replaced = step, replaced

    def __call__(self) -> Tensor:
        with self.replaced():
            return self.step()


def group_per_tensor(device: str) -> Step:
    step = our_step(task_for(device), device)
    params = [p for group in step.optimizer.param_groups for p in group["params"]]
    step.optimizer = torch.optim.AdamW([{"params": [p], "lr": 1e-5} for p in params])
    return step


WAYS: dict[str, tuple[str, Callable[[], AbstractContextManager]]] = {
    "attention in two calls": ("one call, mask [N, N]", lambda: patch.object(vit, "attention_in_two", one_call)),
    "attention mask from features at patch resolution": (
        "from whole mask logits",
        lambda: patch.object(Prediction, "mask_logits", whole_masks),
    ),
    "upscaling as a linear layer": (
        "transposed convolution",
        lambda: patch.object(ScaleBlock, "double_size", transposed),
    ),
    "upscaling that computes its maps again": (
        "all maps kept",
        lambda: patch.object(ScaleBlock, "forward", lambda self, x: self.plainly(self.double_size(x))),
    ),
    "mask logits at the matcher's points": (
        "of all pixels, then sampled",
        lambda: patch.object(loss, "values_at", values_of_maps),
    ),
    "masks of matched queries": ("of all queries", lambda: patch.object(Prediction, "masks_of", masks_of_all)),
}


def cases(device: str) -> list[Case]:
    def plain(way: str) -> Callable[[str], PlainStep]:
        return lambda device: PlainStep(our_step(task_for(device), device), WAYS[way][1])

    task = task_for(device)
    check = partial(same_loss, 1e-4, "")
    shared = {"build_ours": lambda device: our_step(task, device), "check": check, "rounds": 5}
    return [
        *(
            Case(f"ways.{i}", f"step with {way}", WAYS[way][0], build_peer=plain(way), **shared)
            for i, way in enumerate(WAYS)
        ),
        Case("ways.optimizer", "step with a fused optimiser", "a group a tensor", group_per_tensor, **shared),
    ]
