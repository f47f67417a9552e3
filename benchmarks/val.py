"""Validation of one image: the published recipe, which scores every block's prediction in whole maps, and ours.

Both run the same network with the same weights; its attention masks have faded out, as at the end of a training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from benchmarks.bench import Case, Work
from benchmarks.infer import unscale_layers
from benchmarks.peer import SIZES
from benchmarks.step import autocast
from eomt.indices import IGNORE
from eomt.inference.windows import to_windows
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

CLASSES, WINDOW = 19, 1024


def prepared(
    device: str, size: str | None = None, side: int = WINDOW, **settings: Any
) -> tuple[MaskClassificationSemantic, Tensor, Tensor]:
    """The network, an image uint8 [3, side, 2 side] and its label map uint8 [side, 2 side]."""
    torch.manual_seed(0)
    name = SIZES[size or ("small" if device == "cpu" else "large")][3]
    module = MaskClassificationSemantic((side, side), CLASSES, backbone_name=name, pretrained=False, **settings)
    unscale_layers(module)
    module.network.attn_mask_probs.zero_()
    module.network.class_head.weight.data *= 20  # untrained, it would like all classes alike
    image = torch.randint(256, (3, side, 2 * side), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (side, 2 * side), dtype=torch.uint8)
    labels[-side // 10 :] = IGNORE
    return module.eval().to(device), image.to(device), labels.to(device)


def straight(device: str, size: str | None = None, side: int = WINDOW) -> Work:
    """Predictions of all blocks, each with its metric: mask logits, masks and scores of all windows at full size."""
    module, image, labels = prepared(device, size, side)
    metrics = [MulticlassConfusionMatrix(CLASSES, ignore_index=IGNORE, validate_args=False) for _ in range(5)]
    metrics = [metric.to(device) for metric in metrics]

    @torch.no_grad()
    def validate() -> Tensor:
        windows, origins = to_windows(image, (side, side))
        with autocast(device):
            predictions = zip(*module.network(windows / 255), strict=True)
        for metric, (mask_logits, class_logits) in zip(metrics, predictions, strict=True):
            mask_logits = F.interpolate(mask_logits.float(), (side, side), mode="bilinear")
            votes = class_logits.float().softmax(-1)[..., :-1]
            scores = merged(torch.einsum("nqhw,nqk->nkhw", mask_logits.sigmoid(), votes), origins)
            metric.reset()
            metric.update(scores[None], labels[None])
        return metrics[-1].confmat

    return validate


def merged(scores: Tensor, origins: list[tuple[int, int]]) -> Tensor:
    """Scores of the windows [n, K, side, side] -> [K, side, 2 side]."""
    side = scores.shape[-1]
    total = scores.new_zeros(CLASSES, side, 2 * side)
    count = torch.zeros_like(total)
    for of_window, (y, x) in zip(scores, origins, strict=True):
        total[:, y : y + side, x : x + side] += of_window
        count[:, y : y + side, x : x + side] += 1
    return F.interpolate((total / count)[None], total.shape[1:], mode="bilinear")[0]


def ours(device: str, size: str | None = None, side: int = WINDOW, **settings: Any) -> Work:
    """What the LightningModule does with a batch of one image."""
    module, image, labels = prepared(device, size, side, **settings)

    @torch.no_grad()
    def validate() -> Tensor:
        module.confusion.reset()
        with autocast(device):
            module.validation_step(([image], [labels]), 0)
        return module.confusion.confmat

    return validate


def same_counts(theirs: Tensor, ours: Tensor) -> str:
    """Both predict with the last block; floating-point ties may fall otherwise."""
    apart, pixels = (theirs - ours).abs().sum().item() // 2, int(theirs.sum())
    if apart > 1e-5 * pixels or ours.sum() != pixels:
        raise AssertionError(f"confusion counts of {apart} in {pixels} pixels differ")
    return (
        f"confusion counts of the last prediction: {apart} of {pixels} pixels differ, {len(ours.sum(0).nonzero())} "
        "classes predicted"
    )


def cases(device: str) -> list[Case]:
    return [
        Case(
            name="val",
            what="validation of a 2048x1024 image, windows of 1024",
            peer="every block, whole maps",
            build_peer=straight,
            build_ours=ours,
            check=same_counts,
            time_target=0.70,
            memory_target=0.50,
        )
    ]
