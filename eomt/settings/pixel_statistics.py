"""Mean and deviation of the pixels that a backbone was trained on, as files beside its weights say them.

torch is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eomt.files import read_json
from eomt.settings.config_check import check_type

PROCESSOR = "preprocessor_config.json"  # transformers'
PROCESSOR_TYPES = {
    "image_mean": list[float],
    "image_std": list[float],
    "do_normalize": bool,
    "do_rescale": bool,
    "rescale_factor": float,
}
TIMM_TYPES = {"mean": list[float], "std": list[float]}
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # of images that are not normalised
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Statistics = tuple[Sequence[float], Sequence[float]]  # mean and deviation by channel, of images in [0, 1]


@dataclass(frozen=True)
class Pixels:
    """Mean and deviation by channel, and the file that says them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    file: Path

    def are(self, other: Statistics) -> bool:
        """Whether others are the same, but for rounding."""
        own = (self.mean, self.std)
        return all(
            len(here) == len(there) and all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(here, there, strict=True))
            for here, there in zip(own, other, strict=True)
        )


def transformers_pixels(folder: Path) -> Pixels | None:
    """What transformers' preprocessor_config.json in a folder says; None without.

    Raises:
        ValueError: it cannot be read, or its values are none.
    """
    file = folder / PROCESSOR
    said = _typed(read_json(file, {}), PROCESSOR_TYPES, file)
    mean, std = said.get("image_mean"), said.get("image_std")
    if said.get("do_normalize") is False:
        mean, std = NONE
    factor = None if said.get("do_rescale") is False else said.get("rescale_factor")
    white = 1.0 if factor is None else 255 * factor  # a white pixel, before it is normalised
    if not 0 < white < math.inf:
        raise ValueError(f"{file}: rescale_factor {factor:g} leaves no picture: it is 1/255, 0.00392, in most")
    mean, std = ([value / white for value in values or ()] for values in (mean, std))
    return Pixels(tuple(mean), tuple(std), file) if mean and std else None


def timm_pixels(config: Mapping[str, Any], file: Path) -> Pixels | None:
    """What timm's config.json says, as any version of timm writes it; None without. Raises ValueError as above."""
    said = _typed(timm_entries(config), TIMM_TYPES, file)
    mean, std = said.get("mean"), said.get("std")
    return Pixels(tuple(mean), tuple(std), file) if mean and std else None


def timm_entries(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of timm's config.json on its pretrained weights; empty where it is another program's."""
    if "architecture" not in config:
        return {}
    entries = config.get("pretrained_cfg", config)  # before version 0.9 they stood at the top
    return entries if isinstance(entries, Mapping) else {}


def in_words(statistics: Statistics) -> str:
    """`0.485, 0.456, 0.406, deviation 0.229, 0.224, 0.225`."""
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in statistics)
    return f"{mean}, deviation {std}"


def overlay(statistics: Statistics) -> str:
    """The value of `backbone_kwargs` that gives a backbone these statistics."""
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in statistics)
    return f"{{pretrained_cfg_overlay: {{mean: [{mean}], std: [{std}]}}}}"


def _typed(said: Mapping[str, Any], types: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    for name, kind in types.items():
        if said.get(name) is not None:
            check_type(said[name], kind, f"{file}: {name}")
    return said
