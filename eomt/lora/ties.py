"""Tensors that a network holds under several names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn


def once_each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the first of their names: tied ones have several."""
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


def unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each parameter once, in order."""
    return list({id(p): p for p in parameters}.values())


def tied_outside(part: nn.Module, network: nn.Module) -> dict[str, list[str]]:
    """The parameters of a part that modules outside share, by name; their names outside."""
    own = {id(p): name for name, p in part.named_parameters()}
    inside = {id(module) for module in part.modules()}
    tied: dict[str, list[str]] = {}
    for place, module in network.named_modules():
        for name, p in module.named_parameters(recurse=False) if id(module) not in inside else ():
            if id(p) in own:
                tied.setdefault(own[id(p)], []).append(f"{place}.{name}" if place else name)
    return tied
