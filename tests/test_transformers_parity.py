"""An independent implementation, transformers' EoMT, computes the same from the same weights."""

import pytest
import torch
from safetensors.torch import save_file

from eomt.models.checkpoint import load_checkpoint
from eomt.models.eomt import EoMT
from eomt.models.vit import ViT

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")

CLASSES, QUERIES, SIZE = 5, 10, 64
NAMES = {
    "query.weight": "q.weight",
    "class_predictor.": "class_head.",
    "mask_head.fc1.": "mask_head.0.",
    "mask_head.fc2.": "mask_head.2.",
    "mask_head.fc3.": "mask_head.4.",
    "upscale_block.block.": "upscale.",
    ".layernorm2d.": ".norm.",
    "embeddings.cls_token": "encoder.backbone.cls_token",
    "embeddings.register_tokens": "encoder.backbone.reg_token",
    "embeddings.patch_embeddings.projection.": "encoder.backbone.patch_embed.proj.",
    "embeddings.position_embeddings.weight": "encoder.backbone.pos_embed",
    "layernorm.": "encoder.backbone.norm.",
    ".attention.out_proj.": ".attn.proj.",
    ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma",
}


@pytest.fixture(scope="module")
def theirs():
    """transformers' network, its weights random and far from their tame start."""
    config = transformers.EomtConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=16,
        num_upscale_blocks=2,
        num_queries=QUERIES,
        num_blocks=2,
        num_register_tokens=4,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    model = transformers.EomtForUniversalSegmentation(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.15)
    return model


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """Our network with the same weights, loaded as a checkpoint of a user would be."""
    state = {}
    for key, tensor in theirs.state_dict().items():
        if key.startswith("criterion."):
            continue
        if ".attention.q_proj." in key:
            parts = [theirs.state_dict()[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            key, tensor = key.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        elif ".attention.k_proj." in key or ".attention.v_proj." in key:
            continue
        for their_name, our_name in NAMES.items():
            key = (
                key.replace(their_name, our_name) if their_name[0] == "." else replace_start(key, their_name, our_name)
            )
        key = replace_start(key, "layers.", "encoder.backbone.blocks.")
        state[key] = tensor[None] if key.endswith("pos_embed") else tensor
    path = tmp_path_factory.mktemp("parity") / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)

    kwargs = {"embed_dim": 64, "depth": 4, "num_heads": 2}
    encoder = ViT((SIZE, SIZE), 16, "vit_small_patch14_reg4_dinov2", False, kwargs)
    network = EoMT(encoder, CLASSES, QUERIES, num_blocks=2).eval()
    report = load_checkpoint(network, path)
    assert not report.skipped and not report.resampled
    return network


def replace_start(key, start, new):
    return new + key.removeprefix(start) if key.startswith(start) else key


def compare(ours, theirs, prob):
    """Both networks' final outputs, ours given [0, 1] and theirs the normalised pixels that they expect."""
    ours.attn_mask_probs.fill_(prob)
    theirs.attn_mask_probs.fill_(prob)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixel_values = (images - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = theirs(pixel_values)
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
