"""Frozen linear layers in 8 or 4 bits: weights are kept as codes and scales of bitsandbytes, and decoded for each use.

Only weights are rounded, never what flows through, so that a layer is exactly the plain one with the decoded weights,
on every device and in every precision. The layers of bitsandbytes itself round activations, too, on a GPU and not on a
CPU. Encoding is done where the weights are loaded, on the CPU, so that every machine has the same codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eomt.fingerprints import is_adapter, tensor_hashes

if TYPE_CHECKING:
    from types import ModuleType

BLOCK = 64  # neighbouring weights that share a scale


def import_bitsandbytes() -> ModuleType:
    """The functions of the package bitsandbytes; ImportError with a remedy where it is missing."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ImportError(
            "a base in 8 or 4 bits needs the package bitsandbytes, which cannot be imported here: "
            "pip install 'eomt-lora[quantised]'"
        ) from error
    return bitsandbytes.functional


class QuantisedLinear(nn.Linear):
    """A frozen linear layer of `weight` codes uint8 and a `scale` for every `BLOCK` of them.

    Args:
        layer: whose weights it rounds.
        kind: "8bit", one of 256 levels, or "4bit", one of the 16 of NF4 (https://arxiv.org/abs/2305.14314).
    """

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw weights
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        functional, weight = import_bitsandbytes(), layer.weight.detach().float().contiguous()
        if kind == "4bit":
            codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        else:
            codes, state = functional.quantize_blockwise(weight, blocksize=BLOCK)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(state.absmax, requires_grad=False)
        self.register_buffer("levels", state.code, persistent=False)  # the same in every layer
        self.bias = layer.bias

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] that the codes stand for."""
        functional, shape = import_bitsandbytes(), torch.Size((self.out_features, self.in_features))
        quant_type = "nf4" if self.kind == "4bit" else None
        state = functional.QuantState(self.scale, shape, self.levels, BLOCK, quant_type, torch.float32)
        decode = functional.dequantize_4bit if self.kind == "4bit" else functional.dequantize_blockwise
        return decode(self.weight, state).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _DecodedLinear.apply(x.to(dtype), self)

    def plain(self) -> nn.Linear:
        """The float32 layer with the decoded weights."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.decoded(), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)


class _DecodedLinear(torch.autograd.Function):
    """A linear layer that decodes its weights once more for the backward pass, where autograd would keep them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        bias = layer.bias if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.decoded(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.decoded(gradient.dtype), None


def quantise_base(module: nn.Module, kind: str | None) -> None:
    """Puts the frozen linear layers of an adapted module into 8 or 4 bits; None leaves them as they are.

    The module still belongs to the base it was loaded with; the audit expects the codes from here on.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if kind is None:
        return
    for name, layer in list(module.named_modules()):
        frozen = type(layer) is nn.Linear and not any(p.requires_grad for p in layer.parameters())
        if frozen and not is_adapter(name):
            module.set_submodule(name, QuantisedLinear(layer, kind).train(layer.training))
    module.lora_cast_hashes = tensor_hashes(module)


def dequantise_base(module: nn.Module) -> None:
    """Undoes `quantise_base` but for the rounding: from here on the base is the decoded weights, in float32."""
    quantised = {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantisedLinear)}
    for name, layer in quantised.items():
        module.set_submodule(name, layer.plain())
    if quantised:
        del module.lora_cast_hashes


def count_parameters(module: nn.Module) -> int:
    """Numbers of the network, each code of a quantised weight as one, without their scales."""
    packed = [layer for layer in module.modules() if isinstance(layer, QuantisedLinear)]
    more = sum(layer.in_features * layer.out_features - layer.weight.numel() - layer.scale.numel() for layer in packed)
    return sum(p.numel() for p in module.parameters()) + more
