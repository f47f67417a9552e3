"""What the weights that training starts from decide of a network, before it is built; torch is not needed for that.

Of files other than `.safetensors`, only torch can say.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from eomt.settings.eomt_files import read_eomt_file
from eomt.settings.eomt_names import TRANSFORMERS
from eomt.settings.hub import local_path

logger = logging.getLogger(__name__)
USUAL_EPS = 1e-6  # of transformers' EoMT


def taken_over(
    ckpt_path: str | None, load_class_head: bool, num_q: int, backbone_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the settings that a checkpoint decides, where they are not so yet; the log says which.

    With a fresh class head, training starts from a network for other classes, or for another task, panoptic or
    instance segmentation: its queries are taken, however many they are. The norms of transformers' EoMT have the
    `layer_norm_eps` of its config.json.

    Args:
        ckpt_path, load_class_head, num_q, backbone_kwargs: as in `ModelSettings`.

    Raises:
        ValueError: it is transformers' EoMT without the config.json that says which norms it has.
    """
    place = local_path(ckpt_path) if ckpt_path else None
    if place is None or not place.exists():
        return {}
    changes: dict[str, Any] = {}
    try:
        file = read_eomt_file(place)
    except (ValueError, OSError):  # which loading it says, in full
        return {}
    queries = file.sizes.get("num_q", num_q)
    if not load_class_head and queries != num_q:
        logger.info("ckpt_path %s has %d queries, which are taken over: num_q is %d now", ckpt_path, queries, queries)
        changes["num_q"] = queries
    eps, kwargs = file.said.norm_eps, backbone_kwargs or {}
    timms = 1e-5 if file.program == TRANSFORMERS and file.backbone.rotary else 1e-6
    if file.program == TRANSFORMERS and eps is None and "norm_eps" not in kwargs:
        _miss_config(ckpt_path, timms)
    if eps is not None and "norm_eps" not in kwargs and eps != timms:
        logger.info(
            "ckpt_path %s has norms with layer_norm_eps %g, as its config.json says: taken over", ckpt_path, eps
        )
        changes["backbone_kwargs"] = {**kwargs, "norm_eps": eps}
    return changes


def _miss_config(ckpt_path: str, timms: float) -> None:
    """Says that no config.json tells the norms and heads of transformers' EoMT; ValueError where timm's are others.

    Args:
        timms: what timm's norms add to the variance.
    """
    what = f"ckpt_path {ckpt_path} is {TRANSFORMERS} without its config.json, which alone says layer_norm_eps and heads"
    if timms != USUAL_EPS:
        raise ValueError(
            f"{what}: put it beside the weights, or set model.backbone_kwargs={{norm_eps: {USUAL_EPS:g}}}, which "
            f"transformers takes unless told otherwise; timm's are {timms:g}"
        )
    logger.warning("%s: timm's are taken, %g and those of backbone_name; put it beside the weights", what, timms)
