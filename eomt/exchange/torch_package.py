"""Writing a network as a package of torch.export, which torch alone loads, and compared with the network before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eomt.exchange.deployed import ANY_BATCH, Agreement, Signature, check_agreement, compare, describe, exported
from eomt.files import replacing

if TYPE_CHECKING:
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

DESCRIPTION = "eomt.json"  # of the package's extra files
TOLERANCE = Agreement(1e-3, 0.999)


def export_package(
    module: MaskClassificationSemantic, path: str | Path, crops: Tensor, signature: Signature = ANY_BATCH
) -> Agreement:
    """Writes a `.pt2` file: `torch.export.load(path).module()(images)` returns a tuple, as the signature says.

    Its operations are torch's own, so that it runs in a process without this project and without timm, on any device
    that torch knows. The extra file `DESCRIPTION` has what `describe` returns.

    Args:
        module: a whole network in float32, on the CPU, without adapters.
        crops: uint8 [n, 3, H, W] of the network's img_size, to compare on.

    Returns:
        How far the package is from the network.

    Raises:
        ValueError: the package disagrees with the network.
    """
    program = exported(module.network, signature)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has folders of this machine
    described = json.dumps(describe(module, signature, "fp32"))
    with replacing(path, alone=True) as draft:
        torch.export.save(program, draft, extra_files={DESCRIPTION: described})
        found = compare(module, torch.export.load(draft).module(), signature, crops)
        check_agreement(found, TOLERANCE, "the package of torch.export")
    return found
