"""Running a network once to look at it: outputs in whatever nesting, with and without adapters, no trace left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_config import listed


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


def bypass_hint(parent: nn.Module) -> str:
    """What is known of a module that goes around its layers."""
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f" (torch's nn.{type(parent).__name__} does so)"
    return " (for timm's Eva set `attn.qkv_bias_separate = True`)" if hasattr(parent, "qkv_bias_separate") else ""


def bypass_detail(gradients: Mapping[str, Tensor | None]) -> str:
    """What gradients of the outputs, by adapter, say of a network that uses them all."""
    silent = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
    if silent:  # a head or layer scale that starts at zero: the gradients during training will tell
        return f"all layers are in use; behind {listed(silent)} the network still multiplies by zero"
    return f"the outputs have a gradient in all {len(gradients)} layers"


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, and each of its modules as it was before afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def probing(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's mode and the random state afterwards as before."""
    devices = sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), evaluating(network):
        yield


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
