"""Merges a LoRA adapter into its base, after a comparison of the network's logits before and after."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eomt.files import check_place
from eomt.inference.crops import check_images, read_crops
from eomt.inference.saved import check_artefact, read_config, run_of

if TYPE_CHECKING:  # mistakes are told before torch is there
    from torch import Tensor

    from eomt.training.mask_classification_semantic import MaskClassificationSemantic


def merge_and_check(
    adapter: Path,
    out: Path,
    images: Sequence[str] | None,
    tolerance: float,
    ckpt_path: str | None = None,
    backbone_weights: str | None = None,
) -> None:
    """Merges an adapter, compares the logits with those of the unmerged network, and writes a model/ folder.

    Args:
        adapter: an adapter/ folder, a LoRA run's folder, or its checkpoint.
        out: the folder to write; nothing may be in it.
        images: folders or patterns of images to compare on; None: the run's validation data.
        tolerance: the largest difference of a logit, relative to the largest logit.
        ckpt_path, backbone_weights: the base weights, if they have moved.

    Raises:
        ValueError, OSError: the adapter, the images or `out` are not what they should be, or the networks disagree.
    """
    check_place(out, empty=True)
    adapter = check_artefact(adapter)
    pictures = check_images(images, run_of(adapter))
    nothing = f"{adapter} is a whole network, not an adapter: there is nothing to merge"
    if adapter.is_dir() and not read_config(adapter)["init"].get("use_lora"):
        raise ValueError(nothing)

    from eomt.inference.artefacts import merge_adapter
    from eomt.lora.methods import update_norms
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    module = MaskClassificationSemantic.from_pretrained(adapter, ckpt_path, backbone_weights).float()
    if module.lora is None:
        raise ValueError(nothing)
    crops = read_crops(pictures, run_of(adapter), module.hparams.img_size)
    norms = update_norms(module.backbone)
    before = logits(module, crops, "Unmerged")
    merge_adapter(module)
    after = logits(module, crops, "Merged")
    print(f"Merged {len(norms)} layers, norms of their updates {min(norms.values()):.3g} to {max(norms.values()):.3g}")
    compare_logits(before, after, len(crops), tolerance)
    module.save_pretrained(out)
    print(
        f"Before: {megabytes(adapter):.1f} MB in {adapter}, beside its base\nAfter:  {megabytes(out):.1f} MB in {out}"
    )


def logits(module: "MaskClassificationSemantic", crops: "Sequence[Tensor]", title: str) -> "dict[str, Tensor]":
    """Computes logits as deployed, in float32: `mask` [N, Q, h/4, w/4] and `class` [N, Q, K + 1] of N crops."""
    import torch
    from rich.console import Console
    from rich.progress import track

    found = []
    with torch.no_grad(), module.network.deployed():
        for crop in track(crops, title, console=Console(stderr=True), disable=not sys.stderr.isatty()):
            (mask_logits,), (class_logits,) = module.network(crop[None] / 255)
            found.append((mask_logits, class_logits))
    return {kind: torch.cat(parts) for kind, parts in zip(("mask", "class"), zip(*found, strict=True), strict=True)}


def compare_logits(before: "Mapping[str, Tensor]", after: "Mapping[str, Tensor]", crops: int, tolerance: float) -> None:
    """Prints the largest difference of each kind of logits, relative to the largest logit; raises ValueError above
    the tolerance.
    """
    for kind, values in before.items():
        difference = ((values - after[kind]).abs().max() / values.abs().max()).item()
        print(f"  {kind + ' logits':<13} differ by {difference:.1e} of the largest, on {crops} crops")
        if not difference <= tolerance:
            raise ValueError(
                f"the {kind} logits differ by {difference:.1e} of the largest, more than --tolerance {tolerance:g}: "
                "nothing was written"
            )


def megabytes(path: Path) -> float:
    """Returns the size of a file, or of a folder's files, in MB."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())) / 1e6
