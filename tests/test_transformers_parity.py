"""An independent implementation, transformers' EoMT, computes the same from the same weights."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peer import normalized, our_names, our_network, peer_network
from eomt.models.checkpoint import load_checkpoint
from eomt.models.vit import ViT

pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")

CLASSES, QUERIES, SIZE = 5, 10, 64


@pytest.fixture(scope="module")
def theirs():
    """transformers' network, its weights random and far from their tame start."""
    torch.manual_seed(0)
    model = peer_network(64, 4, 2, SIZE, CLASSES, QUERIES, blocks=2).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.15)
    return model


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """Our network with the same weights, loaded as a checkpoint of a user would be."""
    path = tmp_path_factory.mktemp("parity") / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in our_names(theirs.state_dict()).items()}, path)
    kwargs = {"embed_dim": 64, "depth": 4, "num_heads": 2}
    network = our_network("vit_small_patch14_reg4_dinov2", (SIZE, SIZE), CLASSES, QUERIES, 2, kwargs).eval()
    report = load_checkpoint(network, path)
    assert not report.skipped and not report.resampled
    return network


def compare(ours, theirs, prob):
    """Both networks' final outputs, ours given [0, 1] and theirs the normalised pixels that they expect."""
    ours.attn_mask_probs.fill_(prob)
    theirs.attn_mask_probs.fill_(prob)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(normalized(images))
        mask_logits, class_logits = ours(images)
    assert expected.masks_queries_logits.std() > 0.1 and expected.class_queries_logits.std() > 0.1
    torch.testing.assert_close(mask_logits[-1], expected.masks_queries_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(class_logits[-1], expected.class_queries_logits, atol=1e-4, rtol=0)
    return mask_logits[-1]


def test_plain_outputs_match_transformers(ours, theirs):
    annealed = compare(ours, theirs, 0.0)
    with torch.no_grad(), ours.deployed():
        images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(ours(images)[0][0], annealed, atol=1e-4, rtol=0)


def test_masked_outputs_match_transformers(ours, theirs):
    masked = compare(ours, theirs, 1.0)
    assert not torch.allclose(masked, compare(ours, theirs, 0.0), atol=1e-2)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_gradients_of_all_weights_match_transformers(ours, theirs, prob):
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    for network in (ours, theirs):
        network.attn_mask_probs.fill_(prob)
        network.zero_grad()
    expected, (mask_logits, class_logits) = theirs(normalized(images)), ours(images)
    generator = torch.Generator().manual_seed(2)
    masks, classes = (torch.randn(logits[-1].shape, generator=generator) for logits in (mask_logits, class_logits))
    ((mask_logits[-1] * masks).mean() + (class_logits[-1] * classes).mean()).backward()
    ((expected.masks_queries_logits * masks).mean() + (expected.class_queries_logits * classes).mean()).backward()
    gradients = our_names({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert len(gradients) == sum(p.grad is not None for p in ours.parameters()) > 80
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-5, msg=name)


def test_random_rescaling_of_rotary_coordinates_matches_transformers():
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "image_size": 96, "patch_size": 16}
    theirs = dinov3.DINOv3ViTRopePositionEmbedding(dinov3.DINOv3ViTConfig(**sizes)).train()
    kwargs = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    ours = ViT((96, 96), 16, "vit_small_patch16_dinov3_qkvb", False, kwargs).train().backbone.rope
    for seed in range(3):
        torch.manual_seed(seed)
        cos, sin = theirs(torch.zeros(1, 3, 96, 96))
        torch.manual_seed(seed)
        embeddings = ours.get_embed((6, 6))
        torch.testing.assert_close(embeddings, torch.cat((sin, cos), -1), atol=1e-6, rtol=0)
