"""Opening a saved network, whoever saved it, as one plain network."""

from __future__ import annotations

from pathlib import Path

from eomt.inference.artefacts import merge_adapter
from eomt.inference.saved import check_artefact
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


def open_merged(
    path: str | Path, ckpt_path: str | None = None, backbone_weights: str | None = None
) -> MaskClassificationSemantic:
    """Returns a saved network in float32 and evaluation mode; an adapter is merged into its base.

    Args:
        path: what `from_pretrained` opens.
        ckpt_path, backbone_weights: the base weights of an adapter, if they have moved.

    Raises:
        ValueError, OSError: it is no saved network, or its base is not there.
    """
    module = MaskClassificationSemantic.from_pretrained(check_artefact(path), ckpt_path, backbone_weights).float()
    if module.lora is not None:
        merge_adapter(module)
    return module.eval()
