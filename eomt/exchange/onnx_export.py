"""Writing a network as one ONNX file, compared with the network in onnxruntime before it is there."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from eomt.exchange.deployed import (
    ANY_BATCH,
    NAMES,
    REPORT,
    Agreement,
    Signature,
    check_agreement,
    compare,
    describe,
    exported,
)
from eomt.exchange.extras import require
from eomt.exchange.halves import in_half_arithmetic, in_half_the_bytes, with_halved_weights
from eomt.exchange.onnx_scorer import METADATA, OnnxScorer
from eomt.files import check_room, replacing
from eomt.models.eomt import EoMT

if TYPE_CHECKING:
    from onnx import ModelProto

    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

Precision = Literal["fp32", "fp16", "fp16-arithmetic", "int8-weights", "int8-dynamic"]
OPSET = 18  # what TensorRT 8.6 and onnxruntime 1.14 read already
LIMIT = 2**31  # bytes of one file: protobuf holds no more
TOLERANCES = {
    "fp32": Agreement(1e-3, 0.999),
    "fp16": Agreement(1e-3, 0.999),
    "fp16-arithmetic": Agreement(1e-2, 0.995),
    # rounded weights are other weights: what they cost is told, and only a broken network is refused
    "int8-weights": Agreement(float("inf"), 0.9),
    "int8-dynamic": Agreement(float("inf"), 0.9),
}


class Written(NamedTuple):
    """How far a file is from the network, and what in it stayed in float32 where that depends on the network."""

    agreement: Agreement
    halved: str | None = None

    def __str__(self) -> str:
        return "; ".join(str(each) for each in self if each)


def export_onnx(
    module: MaskClassificationSemantic,
    path: str | Path,
    crops: Tensor,
    signature: Signature = ANY_BATCH,
    precision: Precision = "fp32",
) -> Written:
    """Writes one file, which takes and returns what the signature says, in float32 or uint8 whatever the precision.

    The file says of itself what `describe` returns. `fp16`: weights in 16 bits, as far as the network stays what it
    is; `fp16-arithmetic`: operations, too, but for normalisations, soft-maxima and scores. `int8-weights`: linear
    layers' weights in 8 bits, in blocks of 32; `int8-dynamic`: by channels, and what they are multiplied with, too, as
    it comes. Both are for onnxruntime alone.

    Args:
        module: a whole network in float32, on the CPU, without adapters.
        crops: uint8 [n, 3, H, W] of the network's img_size, to compare on.

    Returns:
        How far the file is from the network, and of `fp16` which parts stayed in float32.

    Raises:
        ImportError: a package is missing. ValueError: the network has more than a file holds, or the file disagrees.
    """
    require("onnx", "an ONNX file", "onnx", "onnxscript", "onnxruntime")
    import onnx

    path = Path(path)
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.network.state_dict().values())
    if size >= LIMIT:
        raise ValueError(
            f"the network has {size / 2**30:.1f} GiB in float32, and one ONNX file holds 2 GiB at most: write a "
            "package of torch.export (--to pt2)"
        )
    check_room(path, size)
    network, halved = module.network, None
    if precision == "fp16":
        halved = with_halved_weights(module, signature, crops, TOLERANCES[precision])
        network = halved.network
    model = to_onnx(network, signature)
    with quietly():
        model = checked(CONVERSIONS[precision](model))
    model.metadata_props.add(key=METADATA, value=json.dumps(describe(module, signature, precision)))
    with replacing(path, alone=True) as draft:
        onnx.save(model, draft)
        found = compare(module, OnnxScorer(draft, threads=torch.get_num_threads()).run, signature, crops)
        remedy = REPORT if precision in ("fp32", "fp16") else "--precision fp16 keeps closer to the network"
        check_agreement(found, TOLERANCES[precision], f"the ONNX file ({precision})", remedy)
    return Written(found, halved and str(halved))


def to_onnx(network: EoMT, signature: Signature) -> ModelProto:
    """The graph in float32."""
    with quietly():
        program = torch.onnx.export(
            exported(network, signature),
            dynamo=True,
            input_names=["images"],
            output_names=list(NAMES[signature.outputs]),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    model = program.model_proto
    graph = model.graph
    parts = (graph.node, graph.value_info, graph.input, graph.output, graph.initializer)
    for part in (model, graph, *(each for group in parts for each in group)):
        del part.metadata_props[:]  # where each operation was traced, with folders of this machine
    return model


def checked(model: ModelProto) -> ModelProto:
    """The model, after ONNX's own checker and an inference of all shapes, as TensorRT's parser needs them."""
    import onnx

    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return model


def to_int8(model: ModelProto) -> ModelProto:
    """Weights of linear layers in 8 bits, each block of 32 with a scale of its own."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True)
    quantizer.process()
    return quantizer.model.model


def to_dynamic_int8(model: ModelProto) -> ModelProto:
    """Linear layers in 8 bits: weights with a scale for each channel, activations with one for all, as they come."""
    from tempfile import TemporaryDirectory

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        out = Path(folder, "int8.onnx")
        quantize_dynamic(
            model, out, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )
        return onnx.load(out)


CONVERSIONS: dict[str, Callable[[ModelProto], ModelProto]] = {
    "fp32": lambda model: model,
    "fp16": in_half_the_bytes,
    "fp16-arithmetic": in_half_arithmetic,
    "int8-weights": to_int8,
    "int8-dynamic": to_dynamic_int8,
}


@contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters tell their developers; errors stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
