"""Learning rates and mask probabilities are the published ones, at every step."""

import itertools

import pytest
from conftest import backbone_kwargs

from eomt.models.eomt import EoMT
from eomt.models.vit import ViT
from eomt.training.param_groups import param_groups
from eomt.training.schedules import (
    default_annealing,
    lr_factor,
    mask_probability,
    resolve_annealing,
    resolve_steps,
    resolve_warmup,
)

RECIPES = {
    "default_llrd_0.8": {"lr": 1e-4, "llrd": 0.8, "decay_masked_blocks": True},
    "dinov3_recipe": {"lr": 2e-4, "llrd": 1.0, "decay_masked_blocks": True},
    "no_l2_decay": {"lr": 1e-4, "llrd": 0.8, "decay_masked_blocks": False},
}


@pytest.fixture
def network(reference):
    facts = reference[1]
    encoder = ViT(
        facts["img_size"], backbone_name=facts["backbone"], pretrained=False, backbone_kwargs=backbone_kwargs(facts)
    )
    return EoMT(encoder, facts["num_classes"], facts["num_queries"], facts["num_blocks"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_learning_rate_of_the_published_recipes_is_reproduced(reference, network, recipe):
    published = reference[1]["optimizer"][recipe]
    groups = param_groups(network, adapters=(), lora_lr=1e-3, weight_decay=0.05, **RECIPES[recipe])
    group_of = {id(p): group for group in groups for p in group["params"]}
    parameters = {f"network.{name}": p for name, p in network.named_parameters()}
    assert sorted(parameters) == sorted(published["names"])
    heads, backbone = resolve_warmup((50, 100), 400)
    for i, name in enumerate(published["names"]):
        group = group_of[id(parameters[name])]
        assert group["lr"] == pytest.approx(published["base_lr"][i], rel=1e-9)
        assert group["weight_decay"] == published["weight_decay"][i]
        start, warmup = (heads, backbone) if group["kind"] == "backbone" else (0, heads)
        for step, rates in published["lr_at_step"].items():
            assert group["lr"] * lr_factor(int(step), 400, start, warmup) == pytest.approx(
                rates[i], rel=1e-9, abs=1e-15
            )


def test_groups_are_few(network):
    assert len(param_groups(network, (), 1e-4, 1e-4, 0.8, True, 0.05)) == 7  # six rates in the backbone, and the heads
    assert len(param_groups(network, (), 1e-4, 1e-4, 1.0, True, 0.05)) == 2


def test_adapters_have_their_own_rate_and_no_decay_at_all(network):
    adapter = network.encoder.blocks[0].attn.qkv.weight
    (lora,) = [g for g in param_groups(network, [adapter], 1e-4, 3e-4, 0.8, True, 0.05) if g["kind"] == "lora"]
    assert (len(lora["params"]), lora["lr"], lora["weight_decay"]) == (1, 3e-4, 0.0)


def test_frozen_parameters_are_in_no_group(network):
    network.encoder.backbone.requires_grad_(False)
    assert {g["kind"] for g in param_groups(network, (), 1e-4, 1e-4, 0.8, True, 0.05)} == {"heads"}


def test_annealing_follows_the_published_probabilities(reference):
    published = reference[1]["attn_mask_annealing"]
    for step, probs in published["prob_at_step"].items():
        ours = [
            mask_probability(int(step), start, end, published["poly_power"])
            for start, end in zip(published["start_steps"], published["end_steps"], strict=True)
        ]
        assert ours == pytest.approx(probs, abs=1e-7)  # published in float32


PUBLISHED_ANNEALING = {  # below configs/dinov2/: the steps that the file divides by, where fades start and end
    "cityscapes/semantic/eomt_large_1024.yaml": (19902, [3317, 6634, 9951, 13268], [6634, 9951, 13268, 16585]),
    "ade20k/semantic/eomt_large_512.yaml": (39120, [6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600]),
    "coco/panoptic/eomt_base_640.yaml": (88692, [14782, 36955, 59128], [29564, 51737, 73910]),
}


@pytest.mark.parametrize("name", PUBLISHED_ANNEALING)
def test_the_default_annealing_is_that_of_the_published_file(name):
    steps, starts, ends = PUBLISHED_ANNEALING[name]
    spans = resolve_annealing(None, None, len(starts), steps)
    assert [step for span in spans for step in span] == pytest.approx(
        [step for span in zip(starts, ends, strict=True) for step in span], abs=1
    )


def test_five_masks_fade_evenly_from_a_sixth_to_four_sixths_of_the_run():
    starts, ends = default_annealing(5)
    assert starts == pytest.approx([1 / 6, 0.29167, 0.41667, 0.54167, 4 / 6], abs=1e-5)
    assert [end - start for start, end in zip(starts, ends, strict=True)] == pytest.approx([1 / 6] * 5)


@pytest.mark.parametrize("num_blocks", range(1, 13))
def test_the_last_sixth_of_the_run_is_without_masks(num_blocks):
    assert all(
        mask_probability(step, *span) == 0
        for step in range(501, 600)
        for span in resolve_annealing(None, None, num_blocks, 600)
    )
    assert all(
        mask_probability(step, *span) == 1
        for step in range(99)
        for span in resolve_annealing(None, None, num_blocks, 600)
    )


def test_the_mask_of_a_single_block_fades_in_the_middle_of_the_run():
    assert resolve_annealing(None, None, 1, 1200) == [(500, 700)]


def test_cosine_falls_smoothly_to_zero():
    factors = [lr_factor(step, 100, 0, 10, "cosine") for step in range(101)]
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_lengths_are_steps_or_fractions_of_the_run():
    assert resolve_steps("x", 30, 400) == 30
    assert resolve_steps("x", 0.1, 400) == 40
    assert resolve_steps("x", 1.0, 400) == 400
    with pytest.raises(ValueError, match=r"x 1\.5: a fraction"):
        resolve_steps("x", 1.5, 400)


def test_a_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="500 \\+ 1000 do not end within the run of 400 steps"):
        resolve_warmup((500, 1000), 400)
