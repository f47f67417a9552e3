"""The network computes what the published implementation computes."""

import json

import pytest
import torch
from conftest import REFERENCE
from safetensors.torch import load_file, save_file

from eomt.models.checkpoint import load_checkpoint
from eomt.models.eomt import EoMT
from eomt.models.vit import ViT


def assert_close(ours, published):
    torch.testing.assert_close(ours, published, atol=1e-4, rtol=0)


def assert_outputs_match(network, tensors):
    images = tensors["imgs"] / 255
    with torch.no_grad():
        mask_logits, class_logits = network(images)
        assert len(mask_logits) == len(class_logits) == 4
        for i in range(4):
            assert_close(mask_logits[i], tensors[f"masked.mask_logits.{i}"])
            assert_close(class_logits[i], tensors[f"masked.class_logits.{i}"])
        network.masked_attn_enabled = False
        (mask_logits,), (class_logits,) = network(images)
    assert_close(mask_logits, tensors["plain.mask_logits"])
    assert_close(class_logits, tensors["plain.class_logits"])


def test_masked_and_plain_outputs_match_the_published_network(reference, reference_network):
    assert_outputs_match(reference_network, reference[0])


def test_dinov3_outputs_match_the_published_network_on_timms_own_backbone(tmp_path):
    tensors = load_file(REFERENCE / "eomt_dinov3_reference.safetensors")
    facts = json.loads((REFERENCE / "eomt_dinov3_reference.json").read_text())
    hf = facts["hf_config"]
    kwargs = {"embed_dim": hf["hidden_size"], "depth": hf["num_hidden_layers"], "num_heads": hf["num_attention_heads"]}
    encoder = ViT(facts["img_size"], 16, "vit_small_patch16_dinov3_qkvb", False, kwargs)
    network = EoMT(encoder, facts["num_classes"], facts["num_queries"], facts["num_blocks"]).eval()
    save_file(
        {k.replace("state.", "network."): v for k, v in tensors.items() if k.startswith("state.")},
        tmp_path / "d.safetensors",
    )
    report = load_checkpoint(network, tmp_path / "d.safetensors")
    assert not report.skipped and not report.reinitialised
    assert_outputs_match(network, tensors)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_annealed_masks_change_only_the_masked_network(reference, reference_network, prob):
    reference_network.attn_mask_probs.fill_(prob)
    with torch.no_grad():
        mask_logits, _ = reference_network(reference[0]["imgs"] / 255)
    masked, plain = reference[0]["masked.mask_logits.3"], reference[0]["plain.mask_logits"]
    expected, other = (masked, plain) if prob else (plain, masked)
    assert_close(mask_logits[-1], expected)
    assert not torch.allclose(mask_logits[-1], other, atol=1e-2)
