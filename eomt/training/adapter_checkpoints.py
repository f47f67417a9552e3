"""Checkpoints of a LoRA run: they hold what trains, and no frozen weight."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

STATES = ("state_dict", "current_model_state")  # the second one is there where a callback averages the weights


def leave_out_frozen(checkpoint: dict[str, Any], trained: Collection[str]) -> None:
    """Keeps the trained keys alone, in the state of a callback that averages weights, too."""
    for part in checkpoint.keys() & STATES:
        checkpoint[part] = {key: tensor for key, tensor in checkpoint[part].items() if key in trained}


def put_back_frozen(checkpoint: dict[str, Any], trained: Collection[str], own: Mapping[str, Tensor]) -> None:
    """Completes what `leave_out_frozen` left with the network's own weights.

    Raises:
        ValueError: other keys were trained.
    """
    for part in checkpoint.keys() & STATES:
        if wrong := trained ^ checkpoint[part].keys():
            raise ValueError(
                f"this checkpoint does not fit the LoRA configuration: {len(wrong)} weights differ "
                f"({', '.join(sorted(wrong)[:3])}); resume with the settings it was trained with"
            )
        checkpoint[part] = own | checkpoint[part]
