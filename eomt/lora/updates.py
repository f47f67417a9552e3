"""The update `scaling * B A` that an adapter adds to a layer's weight: its factors and its size."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from lora_config import adapted_layers


def update_norms(module: nn.Module) -> dict[str, float]:
    """Frobenius norm of `scaling * B A` of each layer that the adapter in use adapts, by name; 0 before training."""
    return {
        name: update_norm(layer)[0]
        for name, layer in adapted_layers(module).items()
        if layer.active_adapters[0] in layer.lora_A
    }


def stored_updates(
    state: Mapping[str, Tensor],
    alpha: float,
    use_rslora: bool = False,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """What `update_norms` says of a loaded adapter, from its tensors alone: `rank`, `scaling` and `norm` by layer.

    Args:
        state: the tensors of an adapter file or of a state dict, under their names there.
        alpha, use_rslora, alpha_pattern: as the adapter was configured.
    """
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        if found := re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", key):
            factors[found[1]][found[2]] = tensor
    updates = {}
    for name, pair in factors.items():
        rank = pair["A"].shape[0]
        own = (value for pattern, value in (alpha_pattern or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
        scaling = next(own, alpha) / (rank**0.5 if use_rslora else rank)
        norm = factor_norm(pair["A"], pair["B"], scaling)[0]
        updates[name] = {"rank": rank, "scaling": scaling, "norm": norm}
    return updates


def lora_factors(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, float]:
    """A [r, in], B [out, r] as linear layers, and their scaling."""
    adapter = layer.active_adapters[0]
    return layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]


def update_norm(layer: nn.Module) -> tuple[float, float]:
    """||s B A||_F and its upper bound s ||B||_F ||A||_F, from r x r products: ||BA||^2 = sum(B'B * AA')."""
    a, b, scaling = lora_factors(layer)
    return factor_norm(a.weight, b.weight, scaling)


def factor_norm(a: Tensor, b: Tensor, scaling: float) -> tuple[float, float]:
    """`update_norm` of A [r, in] and B [out, r] themselves."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
    return scaling * square.sqrt().item(), scaling * (a.norm() * b.norm()).item()
