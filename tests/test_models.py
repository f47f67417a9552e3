"""The network over every backbone family: shapes, gradients, LoRA, masks, and what it refuses."""

import time

import pytest
import timm
import torch
from conftest import prediction
from safetensors.torch import save_file
from torch import nn

from eomt.lora.audit import LoRAAudit
from eomt.models.eomt import EoMT, Prediction
from eomt.models.resampling import resize
from eomt.models.scale_block import ScaleBlock, as_map
from eomt.models.vit import QueryMask, ViT, attend
from lora_config import LoRASettings, apply_lora

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}
PREFIX_TOKENS = {
    "vit_small_patch14_reg4_dinov2": 5,
    "vit_small_patch14_dinov2": 1,
    "vit_small_patch16_dinov3": 5,
    "vit_small_patch16_dinov3_qkvb": 5,
    "vit_base_patch16_siglip_512.v2_webli": 0,
    "vit_tiny_patch16_224": 1,
    "eva02_tiny_patch14_224": 1,
}
ROTARY = ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"]
SIZES = [(64, 64), (32, 64)]
every_family = pytest.mark.parametrize("name", PREFIX_TOKENS)
every_size = pytest.mark.parametrize("img_size", SIZES, ids=str)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def encoder(name="vit_tiny_patch16_224", img_size=(64, 64), patch_size=16, pretrained=False, **kwargs):
    return ViT(img_size, patch_size, name, pretrained, TINY | kwargs)


def network(name="vit_tiny_patch16_224", img_size=(64, 64), patch_size=16, **settings):
    return EoMT(encoder(name, img_size, patch_size), **({"num_classes": 3, "num_q": 6, "num_blocks": 2} | settings))


def images(img_size=(64, 64), batch=2):
    return torch.rand(batch, 3, *img_size)


# Shapes and gradients


@every_size
@every_family
def test_each_masked_block_and_the_end_predict_masks_of_a_quarter_of_the_image(name, img_size):
    mask_logits, class_logits = network(name, img_size)(images(img_size))
    height, width = img_size
    assert [tuple(m.shape) for m in mask_logits] == [(2, 6, height // 4, width // 4)] * 3
    assert [tuple(c.shape) for c in class_logits] == [(2, 6, 4)] * 3


@every_family
def test_without_masked_attention_there_is_one_prediction(name):
    mask_logits, class_logits = network(name, masked_attn_enabled=False)(images())
    assert len(mask_logits) == len(class_logits) == 1


@every_size
@every_family
def test_tokens_are_those_of_timms_own_forward(name, img_size):
    vit = encoder(name, img_size).eval()
    for parameter in vit.backbone.parameters():  # position embeddings that start at zero would hide an error
        torch.nn.init.normal_(parameter, std=0.2)
    batch = images(img_size)
    x, rope = vit.embed(batch)
    assert x.shape[1] == PREFIX_TOKENS[name] + vit.grid_size[0] * vit.grid_size[1]
    for block in vit.blocks:
        x = block(x) if rope is None else block(x, rope=rope)
    expected = vit.backbone.forward_features((batch - vit.pixel_mean) / vit.pixel_std)
    torch.testing.assert_close(vit.norm(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
@every_family
def test_every_parameter_receives_a_finite_gradient(name, masked):
    net = network(name, masked_attn_enabled=masked)
    mask_logits, class_logits = net(images())
    sum(logits.square().mean() for logits in mask_logits + class_logits).backward()
    without = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@every_family
def test_lora_acts_on_every_adapted_layer_and_starts_unnoticed(name):
    net, settings = network(name), LoRASettings(rank=2, alpha=4, target_modules=("attn.qkv", "attn.proj"))
    apply_lora(net.encoder.backbone, settings)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    audit = LoRAAudit(net, net.encoder.backbone, settings)
    batch = images()
    audit.before_training(optimizer, lambda: net(batch))
    assert audit.results["adapters_change_output"]["detail"] == "the outputs have a gradient in all 6 layers"
    assert all(result["passed"] for result in audit.results.values())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"])
def test_calling_the_projection_layer_changes_no_output(name):
    net, batch = network(name).eval(), images()
    through_layer = net(batch)[0][-1]
    for block in net.encoder.blocks:
        block.attn.qkv_bias_separate = False
    torch.testing.assert_close(net(batch)[0][-1], through_layer, atol=1e-5, rtol=1e-5)


# Tokens and positions


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_skip_the_queries_in_the_blocks_that_see_them(name):
    net = network(name)
    prefix = PREFIX_TOKENS[name]
    assert [block.attn.num_prefix_tokens for block in net.encoder.blocks] == [prefix, prefix + 6, prefix + 6]


@every_family
def test_permuting_the_queries_permutes_the_predictions(name):
    net, batch = network(name).eval(), images()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.nn.init.normal_(net.q.weight)
    with torch.no_grad():
        before = net(batch)
        net.q.weight.copy_(net.q.weight[order])
        after = net(batch)
    for ours, expected in zip(after[0] + after[1], before[0] + before[1], strict=True):
        torch.testing.assert_close(ours, expected[:, order], atol=1e-5, rtol=1e-4)


def test_the_pixel_statistics_are_the_backbones_own():
    siglip, dinov2 = encoder("vit_base_patch16_siglip_512.v2_webli"), encoder("vit_small_patch14_dinov2")
    assert siglip.pixel_mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert dinov2.pixel_std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize(("patch_size", "blocks"), [(4, 1), (8, 1), (16, 2), (32, 3)])
def test_the_patch_grid_is_upscaled_towards_a_quarter_of_the_image(patch_size, blocks):
    net = network(patch_size=patch_size)
    assert len(net.upscale) == blocks
    assert net(images())[0][0].shape[-1] == 64 // patch_size * 2**blocks


# Attention masks


def masks(mask_logits):
    return prediction(mask_logits, torch.zeros(*mask_logits.shape[:2], 4))


def columns(net):
    """Where the patches begin, and how many tokens there are."""
    first = net.num_q + net.encoder.num_prefix_tokens
    return first, first + net.encoder.grid_size[0] * net.encoder.grid_size[1]


def test_with_probability_0_nothing_is_masked():
    assert network().attention_mask(masks(torch.randn(2, 6, 16, 16)), 0.0) is None


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_512.v2_webli"])
@every_size
def test_with_probability_1_a_query_sees_its_own_patches_all_queries_and_the_prefix(name, img_size):
    net = network(name, img_size)
    down, across = net.encoder.grid_size
    chosen = torch.rand(2, 6, down, across) > 0.5
    chosen[0, 0] = False  # an empty mask leaves the queries and the prefix
    logits = torch.where(chosen, 5.0, -5.0).repeat_interleave(4, -2).repeat_interleave(4, -1)
    mask = net.attention_mask(masks(logits), 1.0)
    first, total = columns(net)
    assert mask.shape == (2, 1, 6, total)  # no rows for prefix and patches: they see everything
    assert torch.equal(mask[:, 0, :, first:], chosen.flatten(2))
    assert mask[:, 0, :, :first].all()


def test_the_mask_at_patch_resolution_is_that_of_the_whole_masks():
    net = network().double()
    one = Prediction(*(torch.randn(s, dtype=torch.float64) for s in ((2, 6, 32), (2, 32, 16, 16), (2, 6, 5))))
    whole = torch.einsum("bqc,bchw->bqhw", one.embeddings, one.features)
    expected = torch.nn.functional.interpolate(whole, net.encoder.grid_size, mode="bilinear")
    torch.testing.assert_close(one.mask_logits(net.encoder.grid_size), expected, rtol=0, atol=1e-12)
    inside = net.attention_mask(one, 1.0)[:, 0, :, columns(net)[0] :]
    assert torch.equal(inside, expected.flatten(2) > 0)


@every_family
def test_attention_in_two_calls_equals_one_with_the_whole_mask(name):
    net = network(name).double().eval()
    block, tokens = net.encoder.blocks[-1], columns(net)[1]
    for key, parameter in block.named_parameters():
        if "gamma" in key:  # layer scales start at 1e-5
            torch.nn.init.ones_(parameter)
    rope = net.encoder.embed(images().double())[1]
    x = torch.randn(2, tokens, net.encoder.embed_dim, dtype=torch.float64)
    rows = torch.rand(2, 1, net.num_q, tokens) > 0.5
    rows[..., 0] = True
    whole = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    whole[:, :, : net.num_q] = rows
    expected = block(x, attn_mask=whole) if rope is None else block(x, rope=rope, attn_mask=whole)
    ours = attend(block, x, rope, rows.as_subclass(QueryMask))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(ours, attend(block, x, rope))


@pytest.mark.parametrize("prob", [1.0, 0.0])
def test_checkpointed_predictions_have_the_same_outputs_and_gradients_and_keep_less(prob):
    def run(checkpointed):
        torch.manual_seed(0)
        net = network(checkpoint_predictions=checkpointed).double()
        net.attn_mask_probs.fill_(prob)
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = net.predictions(images().double())
            loss = sum(t.pow(2).mean() for one in outputs for t in (one.mask_logits(), one.class_logits))
        loss.backward()
        return loss, [p.grad for p in net.parameters()], sum(kept.values())

    (loss, gradients, much), (again, same, little) = run(False), run(True)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    for one, other in zip(gradients, same, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-15)
    assert little < 0.8 * much


@every_family
@pytest.mark.parametrize("adapted", [False, True])
def test_blocks_compile_without_graph_breaks_masked_or_not(name, adapted):
    net = network(name)
    if adapted:
        apply_lora(net.encoder.backbone, LoRASettings(dropout=0.0))
    net.double()
    x, rope = net.trunk(images().double(), 0)
    x = torch.cat((net.q.weight.expand(2, -1, -1), x), 1)
    mask = (torch.rand(2, 1, net.num_q, x.shape[1]) > 0.5).as_subclass(QueryMask)
    for each in (None, mask):
        same_when_compiled(attend, net.encoder.blocks[-1], x, rope, each)
    same_when_compiled(lambda upscale, x: upscale(x), net.upscale, torch.randn(2, 32, 4, 4, dtype=torch.float64))


def same_when_compiled(function, module, x, *others):
    """Output and gradients, in one graph."""
    torch._dynamo.reset()
    x = x.detach().requires_grad_()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    results = []
    for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        out = each(module, x, *others)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-10)


def test_the_linear_form_of_the_upscaling_equals_the_transposed_convolution():
    block = ScaleBlock(8).double()
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(as_map(block.double_size(x)), block.conv1(x), rtol=0, atol=1e-12)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_the_upscaling_that_computes_its_maps_again_has_the_outputs_and_gradients_of_the_plain_formula():
    block = ScaleBlock(8).double()
    nn.init.normal_(block.norm.weight)
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64, requires_grad=True)
    leaves = (x, *block.parameters())
    ours, plain = block(x), block.norm(block.conv2(block.act(block.conv1(x))))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(block.plainly(block.double_size(x)), plain, rtol=0, atol=1e-12)  # what is compiled
    grad = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_upscaling_has_the_types_of_the_plain_formula(autocast):
    block = ScaleBlock(8)
    x = torch.randn(2, 8, 5, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = block(x), block.norm(block.conv2(block.act(block.conv1(x))))
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, rtol=0, atol=0.05 if autocast else 1e-5)
    a, b = (torch.autograd.grad(out.square().sum(), (x, *block.parameters())) for out in (ours, plain))
    assert [t.dtype for t in a] == [t.dtype for t in b]


def test_the_upscaling_keeps_one_map_for_the_backward_pass():
    block, kept = ScaleBlock(8), {}
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        out = block(x)
    assert sum(t.numel() for t in kept.values() if t.numel() >= out.numel()) == out.numel()


def test_with_probability_a_half_about_half_of_the_queries_are_free():
    net = network(num_q=400)
    mask = net.attention_mask(masks(torch.full((2, 400, 16, 16), -1.0)), 0.5)
    seen = mask[:, 0, :400, columns(net)[0] :]
    assert torch.equal(seen.all(-1), seen.any(-1))  # a query is free as a whole
    assert 0.4 < seen.all(-1).float().mean() < 0.6


@every_family
def test_masks_reach_the_attention_of_the_blocks_that_see_queries(name):
    net, batch = network(name).eval(), images()
    torch.nn.init.normal_(net.q.weight)
    for key, parameter in net.encoder.backbone.named_parameters():
        if "gamma" in key:  # layer scales start at 1e-5
            torch.nn.init.ones_(parameter)
    with torch.no_grad():
        masked = net(batch)[1]
        net.attn_mask_probs.zero_()
        free = net(batch)[1]
    assert torch.equal(masked[0], free[0])  # the prediction before the first masked block
    assert not torch.allclose(masked[-1], free[-1], atol=1e-5)


def test_deployed_switches_masked_attention_off_and_restores_it():
    net = network()
    with net.deployed():
        assert len(net(images())[0]) == 1
    assert net.masked_attn_enabled
    net.masked_attn_enabled = False
    with net.deployed():
        pass
    assert not net.masked_attn_enabled


def test_deployed_restores_masked_attention_after_an_exception():
    net = network()
    with pytest.raises(ValueError, match="built for"), net.deployed():
        net(images((32, 32)))
    assert net.masked_attn_enabled


# Refusals


@pytest.mark.parametrize(
    ("img_size", "patch_size", "valid"),
    [((100, 64), 16, r"\[96, 64\]"), ((640, 650), 14, r"\[644, 644\]"), ((64, 5), 16, r"\[64, 16\]")],
)
def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_the_nearest_valid_one(img_size, patch_size, valid):
    with pytest.raises(ValueError, match=f"multiples of patch_size {patch_size}; try {valid}"):
        ViT(img_size, patch_size, "vit_tiny_patch16_224", False)


@pytest.mark.parametrize("img_size", [(64,), (3, 64, 64)])
def test_a_size_is_two_numbers(img_size):
    with pytest.raises(ValueError, match="two numbers"):
        ViT(img_size, 16, "vit_tiny_patch16_224", False)


def test_a_patch_size_of_0_is_refused():
    with pytest.raises(ValueError, match="patch_size 0"):
        encoder(patch_size=0)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"image \[64, 32\].*img_size \[64, 64\]"):
        network()(images((64, 32)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small_patch14_dinov9", "did you mean .*vit_small_patch14_dinov2"),
        ("dinov2", "did you mean .*dinov2"),
        ("vit_tiny_patch16_224.no_such_tag", "timm has .*vit_tiny_patch16_224.augreg"),
        ("resnet18", "'resnet18' is no plain ViT"),
        ("swin_tiny_patch4_window7_224", "no plain ViT"),
        ("beit_base_patch16_224", "no plain ViT"),
        ("vit_small_patch16_18x2_224", "no plain ViT"),
        ("vit_small_patch16_rope_mixed_224", "no plain ViT"),
    ],
)
def test_a_backbone_that_cannot_serve_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message):
        encoder(name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"no_such_argument": 1}, "no_such_argument"), ({"patch_drop_rate": 0.5}, "patch_drop_rate")],
)
def test_backbone_kwargs_that_cannot_serve_are_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        encoder(**kwargs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 4}, "num_blocks 4: must be between 1 and the backbone's depth 3"),
        ({"num_blocks": 0}, "num_blocks 0"),
        ({"num_classes": 0}, "num_classes 0: must be at least 1"),
        ({"num_q": 0}, "num_q 0"),
    ],
)
def test_impossible_counts_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        network(**settings)


@pytest.mark.parametrize(
    "batch",
    [
        images() * 255,
        (images() - 0.5) / 0.2,
        torch.full((2, 3, 64, 64), float("nan")),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    ],
    ids=["not divided by 255", "normalised twice", "NaN", "uint8"],
)
def test_images_outside_0_to_1_are_refused(batch):
    with pytest.raises(ValueError, match=r"takes .*\[0, 1\]"):
        network()(batch)


def test_normalisation_happens_once_and_inside():
    vit = encoder("vit_small_patch14_dinov2")
    mean = vit.pixel_mean.expand(1, 3, 64, 64)
    torch.testing.assert_close(vit.normalize(mean), torch.zeros_like(mean))


# Pretrained weights


def test_pretrained_weights_without_network_name_the_ways_out():
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="ckpt_path=FILE pretrained=false"):
        encoder(pretrained=True)
    assert time.monotonic() - start < 15


def test_a_backbone_without_pretrained_weights_is_refused_as_pretrained():
    name = next(n for n in timm.list_models("vit_*") if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(ValueError, match=f"no pretrained weights for '{name}'.*pretrained=false"):
        encoder(name, pretrained=True)


@pytest.fixture
def local_weights(tmp_path):
    """A 224-pixel patch-14 checkpoint in a file, as timm's are, and its tensors."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0, **TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return {"file": str(tmp_path / "weights.safetensors"), "num_classes": 0}, model.state_dict()


def test_pretrained_weights_from_a_local_file_load(local_weights):
    overlay, weights = local_weights
    vit = encoder("vit_small_patch14_dinov2", (224, 224), 14, True, pretrained_cfg_overlay=overlay)
    for key, tensor in vit.backbone.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def test_a_patch_14_checkpoint_is_resampled_to_patch_16_and_another_size(local_weights):
    overlay, weights = local_weights
    vit = encoder("vit_small_patch14_dinov2", (64, 96), 16, True, pretrained_cfg_overlay=overlay)
    own = vit.backbone.state_dict()
    resampled = {"patch_embed.proj.weight", "pos_embed"}
    assert all(torch.equal(own[key], weights[key]) for key in weights.keys() - resampled)
    expected = timm.layers.resample_patch_embed(weights["patch_embed.proj.weight"], [16, 16])
    torch.testing.assert_close(own["patch_embed.proj.weight"], expected)
    expected = timm.layers.resample_abs_pos_embed(weights["pos_embed"], [4, 6], num_prefix_tokens=1)
    torch.testing.assert_close(own["pos_embed"], expected)


def test_pretrained_weights_of_another_width_are_refused(local_weights):
    overlay, _ = local_weights
    with pytest.raises(ValueError, match=r"(?s)backbone_kwargs.*size mismatch"):
        encoder("vit_small_patch14_dinov2", (224, 224), 14, True, pretrained_cfg_overlay=overlay, embed_dim=64)


DINOV3_KWARGS = {"embed_dim": 64, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(("kwargs", "random"), [({}, True), ({"rope_rescale_coords": None}, False)])
def test_dinov3_rescales_coordinates_in_training_only_unless_told_otherwise(kwargs, random):
    vit = ViT((64, 64), 16, "vit_small_patch16_dinov3_qkvb", False, DINOV3_KWARGS | kwargs)
    image = torch.rand(1, 3, 64, 64)
    first, second = vit.train().embed(image)[1], vit.embed(image)[1]
    assert torch.equal(first, second) != random
    plain = ViT((64, 64), 16, "vit_small_patch16_dinov3_qkvb", False, DINOV3_KWARGS | {"rope_rescale_coords": None})
    assert torch.equal(vit.eval().embed(image)[1], plain.eval().embed(image)[1])


def test_other_backbones_with_rotary_coordinates_stay_as_timm_has_them():
    vit = ViT((64, 64), 16, "eva02_tiny_patch14_224", False, {"depth": 2}).train()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(vit.embed(image)[1], vit.embed(image)[1])


def test_embeddings_of_as_many_patches_in_another_grid_are_resampled():
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    backbone = timm.create_model("vit_tiny_patch16_224", **small)
    before = backbone.pos_embed.detach().clone()
    assert set(resize(backbone, (112, 448), 16)) == {"pos_embed"}  # 14x14 and 7x28 are 196
    expected = timm.layers.resample_abs_pos_embed(before, [7, 28], [14, 14], num_prefix_tokens=1)
    assert torch.equal(backbone.pos_embed, expected) and not torch.equal(expected, before)
