"""Settings of a run that cannot be meant, found before anything is built."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eomt.indices import IGNORE
from eomt.models.vit import check_img_size


def check_values(hp: Mapping[str, Any]) -> None:
    """All arguments of `MaskClassificationSemantic`, by name.

    Raises:
        ValueError: an impossible value. FileNotFoundError: `ckpt_path` is not there.
    """
    check_img_size(hp["img_size"], hp["patch_size"])
    if hp["ckpt_path"] and not Path(hp["ckpt_path"]).expanduser().exists():
        raise FileNotFoundError(f"ckpt_path {hp['ckpt_path']}: no such file or folder")
    positive = "lr lora_lr llrd poly_power num_points num_q num_blocks num_classes unfreeze_last_n".split()
    positive += ["arcface_scale", "outlier_weight"]
    for name in positive:
        if hp[name] is not None and not hp[name] > 0:
            raise ValueError(f"{name} {hp[name]}: must be greater than 0")
    if hp["num_classes"] >= IGNORE:
        raise ValueError(f"num_classes {hp['num_classes']}: label maps are uint8 and {IGNORE} is ignored; at most 254")
    for name, choices in (("head", ("linear", "arcface")), ("outlier_loss", (None, "rba", "mask2anomaly"))):
        if hp[name] not in choices:
            raise ValueError(f"{name} {hp[name]!r}: choose from {', '.join(map(str, choices))}")
    if not 0 <= hp["arcface_margin"] < math.pi / 2:
        raise ValueError(f"arcface_margin {hp['arcface_margin']}: an angle in radians, from 0 up to pi / 2 (1.57)")
    if hp["llrd"] > 1:
        raise ValueError(f"llrd {hp['llrd']}: a decay per block lies between 0 and 1; 1.0 is none")
    if hp["weight_decay"] < 0:
        raise ValueError(f"weight_decay {hp['weight_decay']}: cannot be negative")
    if not 0 <= hp["importance_sample_ratio"] <= 1:
        raise ValueError(f"importance_sample_ratio {hp['importance_sample_ratio']}: a share of the points, 0 to 1")
    if hp["oversample_ratio"] < 1:
        raise ValueError(f"oversample_ratio {hp['oversample_ratio']}: candidates per point, at least 1")
    if hp["base_dtype"] != "float32" and not hp["use_lora"]:
        raise ValueError(
            f"base_dtype {hp['base_dtype']} without use_lora: weights that train stay in float32; leave it out"
        )
    if hp["base_dtype"] != "float32" and not (hp["pretrained"] or hp["ckpt_path"]):
        raise ValueError(f"base_dtype {hp['base_dtype']} with a random base: the adapter folder would have to hold it")
    if hp["base_dtype"] != "float32" and (hp["lora_options"] or {}).get("use_dora"):
        raise ValueError("base_dtype bfloat16 with use_dora: DoRA takes norms of the base weights; use float32")
    for name, length in (
        ("class_names", "num_classes"),
        ("class_colors", "num_classes"),
        ("class_weights", "num_classes"),
        ("attn_mask_annealing_start", "num_blocks"),
        ("attn_mask_annealing_end", "num_blocks"),
    ):
        if hp[name] is not None and len(hp[name]) != hp[length]:
            raise ValueError(f"{name} has {len(hp[name])} entries, {length} is {hp[length]}")


def check_same_settings(trained_with: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError when a resumed run asks for other settings: the checkpoint's optimiser would overrule them."""
    for name in trained_with.keys() & now.keys() - {"ckpt_path", "compile", "checkpoint_predictions", "base_dtype"}:
        before, after = json.dumps(trained_with[name]), json.dumps(now[name])
        if before != after:
            raise ValueError(
                f"resume: the checkpoint was trained with {name} {before}, now it is {after}; a run goes on with its "
                "own settings, and ckpt_path starts a new one from its weights"
            )
