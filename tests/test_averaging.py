"""What is scored is what is saved, drawn and audited, whichever callback swaps the weights for a validation."""

import json
from types import SimpleNamespace

import lightning
import pytest
import torch
from conftest import TOY_DATA, TOY_MODEL
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from test_interruption import EPOCH, SignalAt, train

import train_with_lora
from eomt.command_line import RunError
from eomt.data.toy_streets import toy_streets
from eomt.processes import Interrupted
from eomt.reporting.sample_pictures import SamplePictures
from eomt.training.callbacks import SaveBest
from eomt.training.checkpoint_files import BestCheckpoint
from eomt.training.evaluation import evaluate
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.run_folder import newest_checkpoint
from eomt.training.weight_average import EMA

LIGHTNINGS = "+callbacks.mine={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.7}"
OURS = ["callbacks=ema", "callbacks.ema.decay=0.7"]


def run(toy_cache, folder, *words):
    """A run of two epochs of two steps in this process: its exit code."""
    settings = ["data.batch_size=4", "trainer.max_epochs=2", "model.lr=2e-3", "model.warmup_steps=[0,0]"]
    settings += ["callbacks.samples.every_n_epochs=0", "trainer.precision=32-true", "trainer.accelerator=cpu"]
    place = [f"data.root={toy_cache}", f"output_dir={folder}"]
    return train_with_lora.main([*TOY_DATA, *place, "model=tiny", *TOY_MODEL, *settings, *words])


def toys(toy_cache):
    return toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 64], batch_size=1, num_workers=0
    )


@pytest.mark.parametrize(
    "words",
    [
        [LIGHTNINGS],
        ["callbacks=ema"],
        ["lora=small", *OURS],
        ["lora=small", "+callbacks.mine={_target_: lightning.pytorch.callbacks.WeightAveraging}"],
    ],
    ids=["Lightning's", "ours", "ours with LoRA", "the plain average with LoRA"],
)
def test_the_score_of_an_average_is_that_of_the_artefact(toy_cache, tmp_path, words):
    assert run(toy_cache, tmp_path, *words) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for saved in (summary["artefact"], "checkpoints/best.ckpt"):
        own_base = tmp_path / "adapter" / "base.safetensors"
        base = str(own_base) if saved.endswith(".ckpt") and own_base.exists() else None
        module = MaskClassificationSemantic.from_pretrained(tmp_path / saved, base)
        assert module.artefact_id == summary["artefact_id"]
        assert evaluate(module, toys(toy_cache), "32-true", "cpu").miou == summary["miou"], saved
    trained = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["current_model_state"]
    assert any(not torch.equal(tensor, module.state_dict()[key]) for key, tensor in trained.items())
    assert (summary["lora_audit"] or {}).get("frozen_unchanged", {"passed": True})["passed"]


def test_an_average_of_rounded_frozen_weights_is_refused_before_anything_is_built(toy_cache, tmp_path, capsys):
    assert run(toy_cache, tmp_path, "lora=small", LIGHTNINGS) == 1
    error = capsys.readouterr().err
    assert "callbacks.mine" in error and "give callbacks=ema" in error and not (tmp_path / "checkpoints").exists()


class Zeros(Callback):
    """Swaps the class head for zeros, at the hooks that it is told."""

    def __init__(self, out, back):
        setattr(self, out, self.swap_out)
        setattr(self, back, self.swap_back)

    def swap_out(self, trainer, module, *args):
        self.kept = module.network.class_head.weight.detach().clone()
        module.network.class_head.weight.data.zero_()

    def swap_back(self, trainer, module, *args):
        module.network.class_head.weight.data.copy_(self.kept)


@pytest.mark.parametrize(
    ("out", "back"),
    [("on_validation_start", "on_validation_end"), ("on_validation_epoch_start", "on_validation_epoch_end")],
)
def test_weights_that_somebody_elses_callback_swaps_in_are_scored_saved_and_drawn(toy_cache, tmp_path, out, back):
    save, samples = SaveBest(tmp_path, "last"), SamplePictures(tmp_path / "samples", 1)
    drawn = []
    samples.draw = lambda *_: drawn.append([row[2] for row in samples.rows])
    module = train(tmp_path, toy_cache, save, Zeros(out, back), samples)
    saved = MaskClassificationSemantic.from_pretrained(tmp_path / "adapter")
    assert not saved.network.class_head.weight.any() and module.network.class_head.weight.any()
    dataset = toys(toy_cache).val_set
    assert len(drawn[-1]) == 3
    assert all(torch.equal(saved.predict(dataset[i][0]), prediction) for i, prediction in enumerate(drawn[-1]))


@pytest.mark.parametrize("swaps", [False, True])
def test_best_ckpt_has_the_weights_that_were_scored_or_is_not_written(toy_cache, tmp_path, recwarn, swaps):
    best = BestCheckpoint(tmp_path / "checkpoints", "best", monitor="val/miou", mode="max")
    swap = [Zeros("on_validation_epoch_start", "on_validation_epoch_end")] if swaps else []
    train(tmp_path, toy_cache, SaveBest(tmp_path, "last"), best, *swap)
    assert (tmp_path / "checkpoints" / "best.ckpt").exists() != swaps
    same = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="val/miou", mode="max")
    assert best.state_key == same.state_key, "checkpoints of earlier versions hold its state by that name"
    assert any("best.ckpt is not written" in str(warning.message) for warning in recwarn) == swaps


def test_weights_that_change_between_scoring_and_saving_are_an_error(toy_cache, tmp_path):
    swaps = Zeros("on_validation_batch_start", "on_validation_batch_end")
    with pytest.raises(RunError, match=r"on_validation_epoch_start.*on_validation_epoch_end"):
        train(tmp_path, toy_cache, SaveBest(tmp_path), swaps)
    assert not (tmp_path / "adapter").exists()


class ZerosAtTheEnd(Zeros):
    def __init__(self):
        super().__init__("on_train_end", "on_exception")


def test_weights_that_a_run_ends_with_are_scored(toy_cache, tmp_path, monkeypatch):
    build = train_with_lora.build_callbacks
    monkeypatch.setattr(train_with_lora, "build_callbacks", lambda *args: {**build(*args), "mine": ZerosAtTheEnd()})
    assert run(toy_cache, tmp_path, "callbacks.save_best.keep=last") == 0
    module = MaskClassificationSemantic.from_pretrained(tmp_path / "model")
    assert not module.network.class_head.weight.any()
    miou = json.loads((tmp_path / "summary.json").read_text())["miou"]
    assert evaluate(module, toys(toy_cache), "32-true", "cpu").miou == miou


@pytest.fixture(scope="module")
def whole(toy_cache, tmp_path_factory):
    return averaged(toy_cache, tmp_path_factory.mktemp("whole"))


def averaged(toy_cache, folder, *callbacks, average=EMA, **settings):
    """Three epochs with an average: the weights at the end, and the id of the artefact."""
    save = SaveBest(folder)
    decay = {} if average is WeightAveraging else {"decay": 0.7}
    module = train(folder, toy_cache, save, average(**decay), *callbacks, **settings)
    return module.state_dict(), save.artefact_id, str(save.best)


@pytest.mark.parametrize(
    "stop",
    [{"step": 1}, {"step": EPOCH - 1}, {"validation": 1, "image": 1}, {"validation": 2, "image": 0}],
    ids=["in an epoch", "before a validation", "in a validation", "at its first image"],
)
def test_an_interrupted_run_with_an_average_goes_on_bit_for_bit(whole, toy_cache, tmp_path, stop):
    with pytest.raises(Interrupted):
        averaged(toy_cache, tmp_path, SignalAt(**stop))
    state, artefact, best = averaged(toy_cache, tmp_path, resume=newest_checkpoint(tmp_path))
    assert all(torch.equal(state[key], tensor) for key, tensor in whole[0].items())
    assert (artefact, best) == whole[1:]


@pytest.mark.parametrize("average", [EMAWeightAveraging, WeightAveraging])
def test_an_interrupted_run_with_lightnings_average_goes_on_bit_for_bit(toy_cache, tmp_path, average):
    wanted = averaged(toy_cache, tmp_path / "whole", average=average)
    with pytest.raises(Interrupted):
        averaged(toy_cache, tmp_path / "run", SignalAt(validation=2, image=1), average=average)
    last = newest_checkpoint(tmp_path / "run")
    found = averaged(toy_cache, tmp_path / "run", average=average, resume=last)
    assert all(torch.equal(found[0][key], tensor) for key, tensor in wanted[0].items())
    assert found[1:] == wanted[1:]


def test_a_signal_waits_for_the_weights_that_somebody_elses_callback_has_swapped(toy_cache, tmp_path):
    swaps = Zeros("on_validation_epoch_start", "on_validation_epoch_end")
    with pytest.raises(Interrupted):
        train(tmp_path, toy_cache, SaveBest(tmp_path), swaps, SignalAt(validation=1, image=0))
    last = torch.load(newest_checkpoint(tmp_path), weights_only=True)
    assert last["state_dict"]["network.class_head.weight"].any() and last["global_step"] == EPOCH + 1


def test_a_checkpoint_of_a_lora_run_with_an_average_holds_no_base(toy_cache, tmp_path):
    averaged(toy_cache, tmp_path)
    content = torch.load(newest_checkpoint(tmp_path), weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert not any(".base_layer." in key for key in content[part]) and content[part], part


def test_an_average_starts_without_a_warning(toy_cache, tmp_path, recwarn):
    assert run(toy_cache, tmp_path, "callbacks=ema", "trainer.limit_val_batches=1", "trainer.max_epochs=1") == 0
    assert not [w for w in recwarn if "WeightAveraging" in str(w.message)]


def test_an_average_leaves_frozen_weights_as_they_are():
    module = lightning.LightningModule()
    module.layer = torch.nn.Linear(100, 100)
    average, trainer = EMA(decay=0.999), SimpleNamespace(global_step=0)
    average.setup(trainer, module, "fit")
    before = module.layer.weight.detach().clone()
    for trainer.global_step in range(1, 50):
        average.on_train_batch_end(trainer, module, None, None, 0)
    average.on_train_end(trainer, module)
    assert torch.equal(module.layer.weight, before)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_an_average_that_never_moves_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay {decay}: a share from 0 up to below 1"):
        EMA(decay)
