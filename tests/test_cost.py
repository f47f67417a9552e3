"""What training costs: operations counted, memory estimated without any, and scripts/cost.py."""

import json
import logging
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run_script
from torch import nn

from eomt.cost import variant_costs
from eomt.cost.flops import flop_counter
from eomt.cost.training_cost import fake_tensors, largest_batch, rehearsal, training_cost, variants
from eomt.reporting import run_report
from eomt.settings.compose import compose_run, plain
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.trunk_cache import TrunkCache

run = partial(run_script, "cost.py")
CLASSES = 5  # in every image
on_cpu = {"precision": "32-true", "device": "cpu", "targets": CLASSES}


def settings(**changes):
    return {**TINY, "lora_dropout": 0.0, **changes}


def counted(work):
    with flop_counter() as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (6, 1), (6, 2)])
def test_a_convolution_takes_one_share_of_products_forward_and_two_backward_whatever_its_groups(groups, stride):
    layer = nn.Conv2d(6, 6, 3, padding=1, stride=stride, groups=groups, bias=False)
    images = torch.randn(2, 6, 8, 10, requires_grad=True)
    products = 2 * (8 // stride) * (10 // stride) * 6 * (6 // groups) * 9  # images, pixels, channels out, in, kernel
    assert counted(lambda: layer(images)) == 2 * products
    assert counted(lambda: layer(images).sum().backward()) == 3 * 2 * products
    assert counted(lambda: layer(images.detach()).sum().backward()) == 2 * 2 * products


@pytest.mark.parametrize("masked", [False, True])
def test_attention_takes_two_products_forward_and_five_backward(masked):
    query = torch.randn(2, 3, 10, 16, requires_grad=True)
    key, value = (torch.randn(2, 3, 24, 16, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, 10, 24) > 0.1 if masked else None
    product = 2 * (2 * 3 * 10 * 24 * 16)
    assert counted(lambda: F.scaled_dot_product_attention(query, key, value, mask)) == 2 * product
    step = lambda: F.scaled_dot_product_attention(query, key, value, mask).sum().backward()  # noqa: E731
    assert counted(step) == 7 * product


def real_module(**changes):
    torch.manual_seed(0)
    module = MaskClassificationSemantic(**settings(**changes)).train()
    module.log = module.log_dict = lambda *args, **options: None
    return module


def real_step(module, images=None):
    """One step of real training on two images, to be called; in Lightning's order."""
    optimizer = module.optimizer()
    images = torch.randint(256, (2, 3, 64, 128), dtype=torch.uint8) if images is None else images
    labels = (torch.arange(128, dtype=torch.uint8) % CLASSES).expand(2, 64, -1).contiguous()

    def step():
        loss = module.training_step((images, labels), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


WAYS = {
    "full": {},
    "lora": {"use_lora": True},
    "last": {"use_lora": True, "lora_blocks": 1},
    "frozen": {"freeze": ["backbone"]},
    "checkpointed": {"checkpoint_predictions": True},
    "unmasked": {"masked_attn_enabled": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_operations_are_estimated_as_they_are_counted_in_a_real_step(way):
    assert training_cost(settings(**WAYS[way]), 2, **on_cpu).flops == counted(real_step(real_module(**WAYS[way])))


def test_from_a_checkpoint_training_begins_without_masks_and_the_checkpoint_is_not_read():
    module = real_module()
    module.network.attn_mask_probs.zero_()
    cost = training_cost(settings(ckpt_path="no such file"), 2, **on_cpu)
    assert cost.flops == counted(real_step(module)) != training_cost(settings(), 2, **on_cpu).flops


def test_training_from_cached_blocks_is_estimated_without_them():
    changes = {"use_lora": True, "lora_blocks": 2, "masked_attn_enabled": False}
    module = real_module(**changes)
    logged = run_report.estimate_cost(trainer_of(callbacks=[TrunkCache()]), module, 2)
    assert logged == training_cost(settings(**changes), 2, precision="32-true", device="cpu", cached_blocks=1)
    module.train_from(1)
    tokens = torch.zeros(2, module.network.encoder.num_prefix_tokens + 4 * 8, 64, dtype=torch.bfloat16)
    cost = training_cost(settings(**changes), 2, **on_cpu, cached_blocks=1)
    assert cost.flops == counted(real_step(module, tokens))


def allocated(step):
    """The most bytes that two steps hold of what they allocate, optimiser state and all, from torch's records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("way", WAYS)
def test_the_peak_is_that_of_torchs_own_records_of_real_steps(way):
    cost = training_cost(settings(**WAYS[way]), 2, **on_cpu)
    images_and_labels = 2 * 4 * 64 * 128
    measured = cost.weights + images_and_labels + allocated(real_step(real_module(**WAYS[way])))
    assert cost.peak == pytest.approx(measured, rel=0.01)


def test_weights_gradients_and_optimizer_are_those_of_the_parameters():
    for way in ("full", "lora", "frozen"):
        module, cost = real_module(**WAYS[way]), training_cost(settings(**WAYS[way]), 1, **on_cpu)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert sum(cost.trained.values()) == trained
        assert sum(cost.parameters.values()) == sum(p.numel() for p in module.parameters())
        assert cost.gradients == 4 * trained and cost.optimizer == pytest.approx(8 * trained, rel=0.01)
        assert cost.weights == pytest.approx(4 * sum(cost.parameters.values()), rel=0.01)
        heads = {name: sum(p.numel() for p in part.parameters()) for name, part in module.heads().items()}
        assert cost.parameters | heads == cost.parameters and cost.trained | heads == cost.trained
    assert training_cost(settings(use_lora=True), 1).trained["adapters"] == 3 * 16 * ((64 + 192) + (64 + 64))


def test_settings_that_save_memory_do_so_in_the_estimate():
    def cost(precision="bf16-mixed", accumulate=1, **changes):
        return training_cost(settings(**changes), 2, precision=precision, accumulate=accumulate)

    full, lora, last, frozen = (cost(**WAYS[way]) for way in ("full", "lora", "last", "frozen"))
    assert full.peak > lora.peak > last.peak > frozen.peak
    assert full.activations > lora.activations > last.activations > frozen.activations
    assert cost(checkpoint_predictions=True).activations < 0.7 * full.activations
    assert cost("32-true").activations > 1.2 * full.activations
    half = cost(use_lora=True, pretrained=True, base_dtype="bfloat16")
    assert half.weights < 0.85 * lora.weights and half.gradients == lora.gradients
    twice = cost(accumulate=2)
    assert twice.flops == 2 * full.flops


def test_gradients_that_are_added_to_live_through_the_backward_pass_too():
    wide = {"backbone_kwargs": {"embed_dim": 384, "depth": 3, "num_heads": 2}, "img_size": [32, 32]}
    once, twice = (training_cost(settings(**wide), 1, accumulate=n, **on_cpu) for n in (1, 2))
    assert twice.peak > once.peak + 0.1 * once.gradients


def test_a_gpus_autocast_leaves_layer_norms_in_float32_and_the_cpus_does_not():
    normed = settings(backbone_kwargs={**settings()["backbone_kwargs"], "qk_norm": True})  # layer norms of bf16
    gpu, cpu = (training_cost(normed, 2, device=device) for device in ("cuda", "cpu"))
    assert gpu.activations > cpu.activations and gpu.flops == cpu.flops
    gpu, cpu = (training_cost(settings(), 2, precision="32-true", device=device) for device in ("cuda", "cpu"))
    assert gpu == cpu


def test_bytes_are_alive_from_the_operation_that_makes_them_until_the_last_view_is_gone():
    with fake_tensors() as live:
        a = torch.empty(1000)
        b = a[:10]
        c = a + 1
        assert live.bytes == 8000
        del a, c
        assert live.bytes == 4000  # of which b shows a part
        del b
        assert live.bytes == 0 and live.peak == 8000


def test_an_estimate_leaves_random_numbers_and_the_log_as_they_were(caplog):
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        training_cost(settings(use_lora=True, pretrained=True), 1)
        assert not caplog.records and torch.equal(torch.get_rng_state(), before)
        logging.getLogger("eomt").warning("heard")
    assert len(caplog.records) == 1


def test_more_targets_than_classes_or_queries_cannot_be_matched():
    few, many, all_of_them = (training_cost(settings(num_classes=7), 1, targets=targets) for targets in (3, 30, None))
    assert few.peak <= many.peak and few.flops < many.flops and many == all_of_them


@pytest.mark.parametrize("precision", ["8-true", "bf16-true", "transformer-engine"])
def test_a_precision_without_an_estimate_is_refused(precision):
    with pytest.raises(ValueError, match=f"precision {precision}: the cost is known for 32-true, 16-mixed, bf16-mixed"):
        training_cost(settings(), 1, precision=precision)


@pytest.mark.parametrize(("memory", "images"), [(99, 0), (100, 1), (149, 1), (150, 2), (1000, 19), (10**6, 19999)])
def test_the_largest_batch_is_the_last_that_fits(memory, images):
    assert largest_batch(memory, lambda n: SimpleNamespace(peak=50 + 50 * n)) == images


def test_the_largest_batch_is_right_where_memory_does_not_grow_on_a_line():
    assert largest_batch(1000, lambda n: SimpleNamespace(peak=n**2 + 10)) == 31
    assert largest_batch(100, lambda n: SimpleNamespace(peak=20 * n**0.5)) == 25
    assert largest_batch(590, lambda n: SimpleNamespace(peak=50 * n + 100 * (n < 5))) == 11


def test_the_largest_batch_of_a_network_fits_and_one_more_does_not():
    with rehearsal(settings(use_lora=True), **on_cpu) as cost_of:
        peaks = [cost_of(n).peak for n in (1, 5, 6)]
        assert largest_batch(peaks[1], cost_of) == 5 and largest_batch(peaks[2] - 1, cost_of) == 5
        assert largest_batch(peaks[0] - 1, cost_of) == 0


def hparams(**changes):
    return dict(MaskClassificationSemantic(**settings(**changes)).hparams)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, "full"),
        ({"use_lora": True}, "LoRA"),
        ({"use_lora": True, "lora_blocks": 1}, "LoRA, last 1"),
        ({"lora_blocks": 1}, "full"),
        ({"freeze": ["backbone"]}, "frozen"),
        ({"unfreeze_last_n": 1}, "as given"),
        ({"freeze": ["queries"]}, "as given"),
    ],
)
def test_the_variant_that_the_configuration_asks_for_is_known(changes, given):
    ways, found = variants(hparams(**changes))
    last = "LoRA, last 1" if changes.get("lora_blocks") == 1 else "LoRA, last 2"
    assert (
        found == given
        and list(ways)[:4] == ["full", "LoRA", last, "frozen"]
        and (len(ways) == 5) == (given == "as given")
    )
    assert training_cost(ways[found], 1) == training_cost(hparams(**changes), 1)


def test_variants_without_lora_have_no_base_in_bf16():
    ways, given = variants(hparams(use_lora=True) | {"pretrained": True, "base_dtype": "bfloat16"})
    weights = {name: training_cost(way, 1).weights for name, way in ways.items()}
    assert given == "LoRA" and weights["LoRA"] < 0.85 * weights["full"] and weights["frozen"] == weights["full"]


TINY_RUN = ["model=tiny", "data=toy_streets", "model.backbone_kwargs={embed_dim:64,depth:3,num_heads:2}"]


def test_the_command_line_shows_what_fits_and_writes_json(tmp_path):
    words = [*TINY_RUN, "data.img_size=[64,128]", "data.batch_size=3", "variant=lora_r4", "trainer.precision=32-true"]
    result = run(*words, "--memory", 2, "--json", tmp_path / "a" / "cost.json")
    assert result.returncode == 0, result.stderr
    for word in ("64x128, batch 3, 32-true", "LoRA *", "LoRA, last 3", "activations", "fits 2 GiB", "largest batch"):
        assert word in result.stdout, word
    facts = json.loads((tmp_path / "a" / "cost.json").read_text())
    assert list(facts["variants"]) == ["full", "LoRA", "LoRA, last 3", "frozen"]
    lora = facts["variants"]["LoRA"]
    assert lora["given"] and lora["fits"] and lora["largest_batch"] > facts["variants"]["full"]["largest_batch"] > 3
    assert lora["trained"]["adapters"] == 3 * 4 * ((64 + 192) + (64 + 64)) and lora["trained"]["backbone"] == 0


def test_a_backbone_that_is_left_out_is_told_by_its_name(monkeypatch):
    monkeypatch.setattr(variant_costs, "_costs", lambda *given, **options: {})
    facts = variant_costs.variant_costs(plain(compose_run(["model=vit_large", "data=toy_streets"])), None, None)
    assert facts["configuration"]["backbone_name"] == "vit_large_patch14_reg4_dinov2"


def test_both_image_sizes_are_one(call_script, tmp_path):
    facts = []
    for word in ("data.img_size=[64,96]", "model.img_size=[64,96]"):
        assert call_script("cost.py", *TINY_RUN, word, "--json", tmp_path / "cost.json") == (0, "")
        facts.append(json.loads((tmp_path / "cost.json").read_text()))
    assert facts[0] == facts[1] and facts[0]["configuration"]["img_size"] == [64, 96]


def test_a_trunk_cache_is_counted_for_the_variant_that_has_it(call_script, tmp_path):
    words = [*TINY_RUN, "variant=lora_last_k", "model.num_blocks=1", "model.masked_attn_enabled=false"]
    facts = []
    for cached in ("false", "true"):
        assert call_script("cost.py", *words, f"trunk_cache={cached}", "--json", tmp_path / "cost.json") == (0, "")
        facts.append(json.loads((tmp_path / "cost.json").read_text())["variants"])
    for name, without in facts[0].items():
        cached = facts[1][name]
        assert cached["flops"] < without["flops"] if without["given"] else cached == without
    code, error = call_script("cost.py", *TINY_RUN, "trunk_cache=true")
    assert code == 1 and "trunk_cache: " in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=vit_largest"], "vit_largest"),
        (["model.lora_rnak=4"], "did you mean lora_rank?"),
        (["model.img_size=[60,64]"], "try [64, 64]"),
        (["data.batch_size=0"], "must be at least 1"),
        (["data.batch_size=many"], "data.batch_size 'many'"),
        (["--memory=0"], "--memory 0: must be greater than 0"),
        (["trainer.precision=bf16-true"], "precision bf16-true: the cost is known for"),
    ],
)
def test_what_cannot_be_meant_is_told_in_a_sentence(call_script, words, sentence):
    code, error = call_script("cost.py", *TINY_RUN, *words)
    assert code == 1 and error.startswith("error: ") and sentence in error and error.count("\n") == 1, error


def trainer_of(**changes):
    facts = {"callbacks": [], "precision": "32-true", "accumulate_grad_batches": 1, "max_steps": -1}
    return SimpleNamespace(**{**facts, "strategy": SimpleNamespace(root_device=torch.device("cpu")), **changes})


def test_a_run_logs_the_estimate_of_its_own_settings(caplog):
    module = MaskClassificationSemantic(**settings(use_lora=True))
    with caplog.at_level(logging.INFO):
        cost = run_report.estimate_cost(trainer_of(), module, 2)
    assert cost == training_cost(settings(use_lora=True), 2, precision="32-true", device="cpu")
    assert f"estimated: {cost.peak / 2**30:.2f} GiB at the peak" in caplog.text and "TFLOP a step" in caplog.text
    assert run_report.estimate_cost(trainer_of(max_steps=0), module, 2) is None


def test_an_estimate_that_fails_is_a_warning_that_names_the_error(caplog):
    module = MaskClassificationSemantic(**settings())
    assert run_report.estimate_cost(trainer_of(precision="8-true"), module, 2) is None
    assert "the cost of training cannot be estimated: ValueError: precision 8-true" in caplog.text


def test_the_measured_peak_stands_beside_the_estimate_without_weights_and_libraries_on_a_cpu():
    gib = 2**30
    estimate = {"bytes": 3 * gib, "weights": gib}
    memory = {"bytes": 5 * gib, "of": "resident set of the process", "before_training": 2 * gib}
    sentence = run_report.beside_estimate({"peak_memory": memory, "estimated_memory": estimate})
    assert sentence == ", 3.00 GiB of it added by training, estimated 2.00 GiB"
    del memory["before_training"]
    sentence = run_report.beside_estimate({"peak_memory": memory, "estimated_memory": estimate})
    assert sentence == ", estimated 3.00 GiB"
    assert run_report.beside_estimate({"peak_memory": memory, "estimated_memory": None}) == ""
