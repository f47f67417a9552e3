"""Looks at images and labels: what reaches the patch embedding, how much is clipped, which labels there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from eomt.data.sources import spread
from eomt.toys.scene import draw_scene

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.data.dataset import SegmentationDataset
    from eomt.models.vit import ViT

CROPS, SCENES = 8, 2  # how many are looked at


def training_images(data: SegmentationDataModule) -> tuple[Tensor, str, float]:
    """Returns training crops [N, 3, H, W], their description, and the share of values clipped before augmentation."""
    indices = spread(len(data.train_set), CROPS)
    crops = torch.stack([data.train_set[index, 0][0] for index in indices])
    clipped = [share_clipped(data.train_set.image(index)) for index in indices]  # crops are padded with 0
    return crops, f"{len(crops)} training crops", float(np.mean(clipped))


def drawn_images(size: tuple[int, int], no_data: str) -> tuple[Tensor, str, float]:
    """Draws scenes of this size in place of training crops; `no_data` says why there are none."""
    scenes = [draw_scene(np.random.default_rng(seed), size, "clear")[0] for seed in range(SCENES)]
    images = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)
    return images, f"drawn scenes (no data: {no_data})", share_clipped(images)


def share_clipped(images: Tensor) -> float:
    """Returns the share of the values of uint8 images that are the lowest or the highest possible."""
    return ((images == 0) | (images == 255)).double().mean().item()


def count_labels(dataset: SegmentationDataset, indices: Iterable[int]) -> Tensor:
    """Counts the pixels of each label value, int64 [256], in these label maps."""
    return sum(torch.bincount(dataset.labels(index).flatten(), minlength=256) for index in indices)


class _Reached(Exception):
    """Ends a forward pass that has got far enough."""


def reaching_patches(encoder: ViT, images: Tensor) -> Tensor:
    """Returns images [N, 3, H, W] in [0, 1] as they enter the patch embedding; weights need no values.

    Raises:
        ValueError: images that the encoder refuses.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _Reached

    handle = encoder.backbone.patch_embed.register_forward_pre_hook(catch)
    try:
        encoder.embed(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]
