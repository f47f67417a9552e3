"""ONNX files in 16 bits: weights alone, which keeps to what the network says, or the arithmetic, too.

Arithmetic in halves cannot keep scores within 1e-3: each of a dozen blocks rounds what it adds to by 5e-4. Weights in
halves mostly can, and where a network is more sensitive, its last layers stay in float32: what they round is not
averaged by any layer behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from eomt.exchange.deployed import Agreement, Deployed, Signature, compare
from eomt.lora.probing import evaluating
from eomt.models.eomt import EoMT

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

MARGIN = 0.9  # of what may differ: the rest is for what another program rounds otherwise
SMALL = 1024  # numbers; a tensor of fewer is not worth a node in the graph


class Halved(NamedTuple):
    """A network with weights rounded to 16 bits; of its `parts`, the last `kept` are as they were."""

    network: EoMT
    kept: int
    parts: int

    def __str__(self) -> str:
        parts = f"{self.parts} parts"
        what = "(each block, and the heads)"
        if not self.kept:
            return f"the weights of all {parts} are in 16 bits {what}"
        if self.kept == self.parts:
            return f"the weights of all {parts} stay in float32 {what}, as the network needs: int8-weights is smaller"
        return f"the weights of the last {self.kept} of {parts} stay in float32 {what}, as the network needs"


@torch.no_grad()
def with_halved_weights(
    module: MaskClassificationSemantic, signature: Signature, crops: Tensor, tolerance: Agreement
) -> Halved:
    """A copy of the network whose weights are rounded to 16 bits, but for as many of its last parts as differ too much.

    The patch embedding and positions, 1 or 2 % of the weights, stay as they are: rounding them costs as much as all
    blocks.

    Args:
        crops: uint8 [n, 3, H, W], to compare on. tolerance: how far the copy may be from the network.
    """
    network = copy.deepcopy(module.network)
    pairs = list(zip(parts(network), parts(module.network), strict=True))
    for tensor in (tensor for part, _ in pairs for tensor in part.parameters()):
        tensor.copy_(tensor.half())
    kept = 0
    with evaluating(network):
        while kept < len(pairs):
            found = compare(module, Deployed(network, signature.outputs, signature.size), signature, crops)
            if found.difference <= MARGIN * tolerance.difference and 1 - found.same <= MARGIN * (1 - tolerance.same):
                break
            kept += 1
            rounded, exact = pairs[-kept]
            rounded.load_state_dict(exact.state_dict())
    return Halved(network, kept, len(pairs))


def parts(network: EoMT) -> Iterator[nn.Module]:
    """The blocks in their order, and all that is behind them as one."""
    yield from network.encoder.blocks
    yield nn.ModuleList([network.encoder.norm, network.q, network.class_head, network.mask_head, network.upscale])


def in_half_the_bytes(model: ModelProto) -> ModelProto:
    """The same graph; weights that 16 bits hold exactly are stored in them, and cast as a session opens."""
    from onnx import TensorProto, helper

    graph = model.graph
    for tensor in [each for each in graph.initializer if each.data_type == TensorProto.FLOAT]:
        half = halved(tensor)
        if half is None:
            continue
        graph.initializer.remove(tensor)
        graph.initializer.append(half)
        cast = helper.make_node("Cast", [half.name], [tensor.name], name=f"cast_{tensor.name}", to=TensorProto.FLOAT)
        graph.node.insert(0, cast)
    return model


def halved(tensor: TensorProto) -> TensorProto | None:
    """A tensor in 16 bits under another name; None where they do not hold it, or it is small."""
    from onnx import numpy_helper

    values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    half = values.half()
    if values.numel() < SMALL or not torch.equal(half.float(), values):
        return None
    return numpy_helper.from_array(half.numpy(), f"{tensor.name}_in_16_bits")


def in_half_arithmetic(model: ModelProto) -> ModelProto:
    """In 16 bits, but inputs, outputs, what sums over many values, and everything behind the masks' interpolation."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    sums = ["LayerNormalization", "Softmax", "ReduceMean", "Pow"]
    blocked = {"op_block_list": [*DEFAULT_OP_BLOCK_LIST, *sums], "node_block_list": behind(model, "Resize")}
    half = OnnxModel(convert_float_to_float16(model, keep_io_types=True, **blocked))
    del half.model.graph.value_info[:]  # types as they were before
    half.topological_sort()  # casts were appended at the end
    return half.model


def behind(model: ModelProto, kind: str) -> list[str]:
    """Names of the nodes of this kind and of all that compute with what they return; none where there is none."""
    reached, names = set(), []
    for node in model.graph.node:  # in the order of computation
        if node.op_type == kind or reached & set(node.input):
            reached |= set(node.output)
            names.append(node.name)
    return names
