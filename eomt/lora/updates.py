"""The updates `scaling * B A` that a file of a LoRA adapter holds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from eomt.lora.methods import factor_norm


def stored_updates(
    state: Mapping[str, Tensor],
    alpha: float,
    use_rslora: bool = False,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Computes `update_norms` of an adapter from its stored tensors alone: `rank`, `scaling` and `norm` by layer.

    Args:
        state: the tensors of an adapter file or of a state dict, under their names there.
        alpha, use_rslora, alpha_pattern: as the adapter was configured.

    Raises:
        ValueError: a layer has one factor alone, or two that have no product.
    """
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        if found := re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", key):
            factors[found[1]][found[2]] = tensor
    updates = {}
    for name, pair in factors.items():
        shapes = [list(pair[half].shape) if half in pair else None for half in "AB"]
        if None in shapes or list(map(len, shapes)) != [2, 2] or shapes[0][0] != shapes[1][1]:
            raise ValueError(
                f"lora_A and lora_B of {name} are of shapes {shapes[0]} and {shapes[1]}: [r, in], [out, r]"
            )
        rank = shapes[0][0]
        own = (value for pattern, value in (alpha_pattern or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
        scaling = next(own, alpha) / (rank**0.5 if use_rslora else rank)
        norm = factor_norm(pair["A"], pair["B"], scaling)[0]
        updates[name] = {"rank": rank, "scaling": scaling, "norm": norm}
    return updates
