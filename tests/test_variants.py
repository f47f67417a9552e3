"""What a variant trains, keeps and costs, and how a run proves on which crops."""

import logging
from types import SimpleNamespace

import lightning
import pytest
import torch
from conftest import TINY

from eomt.data.toy_streets import toy_streets
from eomt.reporting.run_summary import CountFlops, HashBatches, StepClock
from eomt.training.callbacks import SaveBest
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


def build(**settings):
    torch.manual_seed(0)
    return MaskClassificationSemantic(**{**TINY, **settings})


@pytest.fixture
def data(toy_cache):
    return lambda: toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=2, num_workers=0
    )


def fit(module, data, *callbacks, **trainer):
    lightning.seed_everything(3, verbose=False)
    settings = {"max_steps": 2, "max_epochs": -1, "limit_val_batches": 0} | trainer
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **quiet, **settings).fit(module, data())


def trained_blocks(module):
    names = [name.split(".blocks.") for name, p in module.backbone.named_parameters(prefix="b") if p.requires_grad]
    return {int(name[1].split(".")[0]) for name in names if len(name) > 1}


def test_unfreezing_the_last_blocks_trains_them_the_norm_and_the_heads_alone():
    module = build(unfreeze_last_n=2)
    assert trained_blocks(module) == {1, 2}
    assert all(p.requires_grad for p in module.network.encoder.norm.parameters())
    assert all(p.requires_grad for part in module.heads().values() for p in part.parameters())
    assert not module.backbone.patch_embed.proj.weight.requires_grad and not module.backbone.pos_embed.requires_grad


def test_lora_takes_the_place_of_unfrozen_blocks_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        module = build(unfreeze_last_n=2, use_lora=True)
    assert "LoRA takes its place, no block is unfrozen" in caplog.text
    assert all(".lora_" in name for name, p in module.backbone.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("count", [4, 0, -1])
def test_impossible_numbers_of_unfrozen_blocks_are_refused(count):
    with pytest.raises(ValueError, match="unfreeze_last_n"):
        build(unfreeze_last_n=count)


@pytest.mark.parametrize(("keep", "kept"), [("best", 0.5), ("last", 0.3)])
def test_the_artefact_is_that_of_the_best_or_of_the_last_validation(tmp_path, keep, kept):
    callback = SaveBest(tmp_path, keep)
    saved = []
    for miou in (0.2, 0.5, 0.3):
        module = torch.nn.Module()
        module.lora, module.class_iou, module.scored = None, {}, []
        module.score = lambda miou=miou: miou
        module.save_pretrained = lambda folder, miou=miou: write(folder, miou)
        callback.on_validation_epoch_end(
            SimpleNamespace(sanity_checking=False, global_step=1, is_global_zero=True), module
        )
        saved.append((tmp_path / "model" / "score").read_text())
    assert saved[-1] == str(kept) and callback.best["miou"] == pytest.approx(kept)


def write(folder, miou):
    folder.mkdir(exist_ok=True)
    (folder / "score").write_text(str(miou))


def test_counted_flops_order_the_variants_as_their_backward_passes_do(data):
    variants = {
        "head": {"freeze": ["backbone"]},
        "last": {"use_lora": True, "lora_blocks": 2},
        "lora": {"use_lora": True},
        "full": {},
    }
    flops = {}
    for name, settings in variants.items():
        counter = CountFlops()
        fit(build(num_blocks=1, **settings), data, counter)
        flops[name] = counter.flops
    assert flops["head"] < flops["last"] < flops["lora"] < flops["full"]


def test_an_optimiser_step_counts_all_the_batches_that_it_accumulates(data):
    one, two = CountFlops(), CountFlops()
    fit(build(), data, one)
    fit(build(), data, two, accumulate_grad_batches=2)
    assert two.flops == 2 * one.flops > 0


def test_a_compiled_network_hides_its_flops_and_none_are_made_up(data):
    counter = CountFlops()
    module = build()
    module.hparams["compile"] = True
    fit(module, data, counter)
    assert counter.flops is None


def test_the_hash_of_the_batches_is_that_of_seed_and_data_whatever_trains(data):
    hashes = []
    for settings in ({}, {"use_lora": True, "lora_dropout": 0.5}):
        batches = HashBatches()
        fit(build(**settings), data, batches)
        hashes.append(batches.hash)
    other = HashBatches()
    fit(build(), lambda: colourless(data()), other)
    assert hashes[0] == hashes[1] != other.hash and len(other.hash) == 64


def colourless(data):
    data.train_set.transform.color_jitter = False
    return data


def test_a_run_that_an_earlier_version_began_identifies_its_batches_by_their_bytes_alone():
    batches = HashBatches(num_batches=2)
    batches.load_state_dict({"seen": 1, "hash": "a" * 64})
    batches.on_train_batch_start(None, None, [torch.zeros(2), torch.zeros(2)], 1)
    assert batches.seen == 2 and batches.identity.exact == batches.hash and batches.identity.stored is None


def test_a_resumed_run_keeps_the_hash_and_the_clock_that_it_began_with():
    batches, clock = HashBatches(num_batches=1), StepClock()
    batches.on_train_batch_start(None, None, [torch.zeros(2)], 0)
    resumed, later = HashBatches(num_batches=1), StepClock()
    resumed.load_state_dict(batches.state_dict())
    resumed.on_train_batch_start(None, None, [torch.ones(2)], 0)
    assert resumed.hash == batches.hash
    clock.started -= 100
    later.load_state_dict(clock.state_dict())
    assert later.elapsed() > 100
