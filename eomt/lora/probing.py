"""Running a network once to look at it: outputs in whatever nesting, with and without adapters, no trace left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


def once_each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the first of their names: tied ones have several."""
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


def unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each parameter once, in order."""
    return list({id(p): p for p in parameters}.values())


def relative_change(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    if not b.numel():
        return 0.0
    a, b = a.float(), b.float()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def tensors_in(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in nested mappings (ModelOutput is one), lists and tuples; other values hold none."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    elif is_dataclass(outputs):
        outputs = vars(outputs).values()
    elif isinstance(outputs, (str, bytes)) or not isinstance(outputs, Iterable):
        return []
    return [tensor for output in outputs for tensor in tensors_in(output)]


@contextmanager
def probing(network: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's mode and the random state afterwards as before."""
    modes = [(module, module.training) for module in network.modules()]
    devices = sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        network.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def disabled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Adapters off inside. PEFT switches requires_grad along with them, so it is put back."""
    layers = list(layers)
    wanted = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, requires_grad in wanted:
            p.requires_grad_(requires_grad)
