"""A network in torch with linear layers of 8 bits, by torchao, to predict with; of ONNX files, see `export_onnx`."""

from __future__ import annotations

import io
from typing import Literal

import torch
from torch import nn

from eomt.exchange.extras import require

Int8 = Literal["weights", "dynamic"]


def quantise(network: nn.Module, kind: Int8) -> None:
    """Rounds every linear layer of a network to 8 bits, in place; it predicts from then on and cannot train.

    Args:
        network: a whole one in float32, without adapters.
        kind: `weights`: each row with a scale of its own, decoded for every use, which saves bytes alone; `dynamic`:
            what they are multiplied with, too, each token with a scale as it comes, so that the products are in 8 bits.

    Raises:
        ImportError: torchao is missing.
    """
    require("int8", "int8", "torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    network.requires_grad_(False)
    quantize_(network, Int8WeightOnlyConfig() if kind == "weights" else Int8DynamicActivationInt8WeightConfig())


def saved_bytes(network: nn.Module) -> int:
    """How many bytes the network's tensors take in a file of `torch.save`."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell()
