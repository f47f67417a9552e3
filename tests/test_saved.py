"""What earlier versions saved opens, and says what it said then: one of each, written at commit 7d5a494."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize(
    ("artefact", "expected", "base"),
    [
        ("model", "full", None),
        ("full.ckpt", "full", None),
        ("adapter", "lora", SAVED / "model"),
        ("lora.ckpt", "lora", SAVED / "model"),
    ],
)
def test_an_artefact_of_an_earlier_version_opens_and_predicts_what_it_did(artefact, expected, base):
    then = load_file(SAVED / "expected.safetensors")
    module = MaskClassificationSemantic.from_pretrained(SAVED / artefact, base and str(base))
    with torch.no_grad(), module.network.deployed():
        masks, classes = module.network(then["image"] / 255)
    torch.testing.assert_close(masks[0], then[f"{expected}.masks"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classes[0], then[f"{expected}.classes"], rtol=1e-5, atol=1e-5)
