"""A step that is not finite changes nothing, is recorded, and does not go on for long."""

import json
import logging
import math

import lightning
import pytest
import torch
from conftest import TINY, TOY_DATA, TOY_MODEL, fit, run_python, run_training
from lightning.pytorch.plugins import MixedPrecision
from spoilt import Spoilt

from eomt.command_line import RunError
from eomt.data.toy_streets import toy_streets
from eomt.reporting.run_report import print_result
from eomt.training.callbacks import AuditLoRA
from eomt.training.finite_steps import FiniteSteps


@pytest.fixture
def data(toy_cache):
    return toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=1, num_workers=0
    )


def build(**settings):
    torch.manual_seed(0)
    return Spoilt(**{**TINY, "warmup_steps": [0, 0], "lr": 1e-3, **settings})


def state_of(module):
    """Weights and the optimiser's state, copied."""
    (optimizer,) = module.trainer.optimizers
    moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    return [p.detach().clone() for p in module.parameters()], moments


def same(one, other):
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(one, other, strict=True))


class Watch(FiniteSteps):
    """Remembers the state after each step."""

    def on_train_batch_end(self, trainer, module, *args):
        self.states = [*getattr(self, "states", []), state_of(module)]


def records(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "failures").glob("*.json"))]


@pytest.mark.parametrize("what", ["loss", "logit", "gradient"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_step_that_is_not_finite_leaves_weights_and_optimiser_as_they_were(data, tmp_path, what, clip):
    module, finite = build(spoil=[1], what=what), Watch(tmp_path)
    trainer = fit(module, data, finite, max_steps=3, gradient_clip_val=clip)
    first, second, third = finite.states
    assert same(first, second) and not same(second, third)
    assert (finite.skipped, finite.overflows, finite.in_a_row) == (1, 0, 0) and trainer.global_step == 3
    (record,) = records(tmp_path)
    assert record["step"] == 1 and record["reason"] == what
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_a_momentum_that_decays_is_left_alone_too(data, tmp_path):
    def sgd(groups):
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)

    module, finite = build(spoil=[1], optimizer=sgd), Watch(tmp_path)
    fit(module, data, finite, max_steps=3)
    assert same(finite.states[0], finite.states[1]) and not same(finite.states[1], finite.states[2])


def test_the_record_is_enough_to_make_the_batch_again(data, tmp_path):
    module, finite, batches = build(spoil=[5, 6]), FiniteSteps(tmp_path), []
    on_start = module.on_train_batch_start
    module.on_train_batch_start = lambda batch, index: batches.append(batch) or on_start(batch, index)
    data.batch_size = 2
    fit(module, data, finite, max_steps=4, accumulate_grad_batches=2)
    (record, other) = records(tmp_path)
    assert record["epoch"] == 1 and [batch["batch"] for batch in record["batches"]] == [0, 1]
    assert math.isfinite(record["gradient_norm"]) and record["process"] == 0 and other["step"] == 3
    good, bad = record["batches"]
    assert all(isinstance(value, float) for term in good["terms"].values() for value in term)
    assert "nan" in bad["terms"]["class"] and bad["logits_finite"]
    for batch, (images, labels) in zip((good, bad), batches[4:6], strict=True):
        for item, image, target in zip(batch["images"], images, labels, strict=True):
            assert item["name"] == data.train_set.names[item["index"]]
            again = data.train_set[item["index"], item["seed"]]
            assert torch.equal(again[0], image) and torch.equal(again[1], target)


def test_so_many_in_a_row_end_the_run_and_name_the_file_of_the_first(data, tmp_path):
    module, finite = build(spoil=[1, 3, 4, 5]), FiniteSteps(tmp_path, limit=3)
    with pytest.raises(
        RunError, match=r"3 steps in a row had a loss that is not finite .*failures/step_000003_process_0.*lr"
    ):
        fit(module, data, finite, max_steps=8)
    assert finite.skipped == 4 and [record["step"] for record in records(tmp_path)] == [1, 3, 4, 5]
    with pytest.raises(ValueError, match="limit 0"):
        FiniteSteps(tmp_path, limit=0)


def test_weights_that_are_broken_end_the_run_at_once_with_their_name(data, tmp_path):
    with pytest.raises(ValueError, match=r"after step 1: .* holds NaN or infinity.* lower model\.lr"):
        fit(build(lr=1e38), data, FiniteSteps(tmp_path), max_steps=8)
    with pytest.raises(ValueError, match=r"after step 1: .* holds NaN or infinity"):
        fit(build(lr=1e38), data, FiniteSteps(tmp_path / "last"), max_steps=1)


def scaler(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def test_an_overflow_of_scaled_gradients_is_counted_apart(data, tmp_path):
    module, finite, plugin = build(spoil=[1], what="overflow"), Watch(tmp_path), scaler(4.0)
    fit(module, data, finite, max_steps=3, plugins=[plugin], precision=None)
    assert (finite.skipped, finite.overflows) == (0, 1) and plugin.scaler.get_scale() == 2
    assert same(finite.states[0], finite.states[1]) and not records(tmp_path)


@pytest.mark.parametrize(("what", "scale"), [("loss", 4.0), ("logit", 4.0), ("overflow", 1.0)])
def test_what_no_smaller_scale_would_cure_is_a_failure_under_16_mixed_too(data, tmp_path, what, scale):
    module, finite = build(spoil=[1], what=what), Watch(tmp_path)
    fit(module, data, finite, max_steps=3, plugins=[scaler(scale)], precision=None)
    assert (finite.skipped, finite.overflows) == (1, 0) and same(finite.states[0], finite.states[1])
    assert records(tmp_path)[0]["reason"] == what.replace("overflow", "gradient")


def test_a_resumed_run_counts_on(data, tmp_path):
    finite = FiniteSteps(tmp_path, limit=5)
    trainer = fit(build(spoil=[6, 7]), data, finite, max_epochs=1, max_steps=-1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = FiniteSteps(tmp_path, limit=5)
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["FiniteSteps"])
    assert (again.skipped, again.in_a_row, again.first) == (2, 2, finite.first)


def test_the_audit_waits_for_adapters_as_long_as_steps_are_skipped(data, tmp_path):
    module, audit = build(spoil=range(1, 22), use_lora=True, lora_lr=0.1), AuditLoRA()
    fit(module, data, FiniteSteps(tmp_path, limit=30), audit, max_steps=24)
    assert audit.audit.complete and all(check["passed"] for check in audit.audit.results.values())
    assert audit.audited_step == 3


def test_a_run_whose_steps_are_finite_is_the_same_with_and_without_the_check(data, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "eomt")
    ends = []
    for callbacks in ([], [FiniteSteps(tmp_path)]):
        module = build()
        fit(module, data, *callbacks, max_steps=3, gradient_clip_val=0.01)
        ends.append(state_of(module))
    assert same(*ends) and not list(tmp_path.iterdir()) and not caplog.records


def test_two_processes_skip_the_same_steps_when_one_of_them_fails(toy_cache, tmp_path):
    result = run_python("tests/spoilt.py", toy_cache, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in "01":
        facts = json.loads((tmp_path / f"process_{rank}.json").read_text())
        assert facts["skipped"] == 2 and facts["unchanged"] == [1, 2], "a loss and logits of process 1 alone"
    assert facts["weights"] == json.loads((tmp_path / "process_0.json").read_text())["weights"]
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "failures").iterdir()}
    assert sorted(found) == [f"step_00000{step}_process_{rank}.json" for step in (1, 2) for rank in (0, 1)]
    assert [record["reason"] for _, record in sorted(found.items())] == ["loss", "loss", "logit", "logit"]
    for step in (1, 2):
        images = [found[f"step_00000{step}_process_{rank}.json"]["batches"][0]["images"] for rank in (0, 1)]
        assert images[0] != images[1], "each process has its own batch"


def test_a_run_whose_last_update_breaks_the_network_fails_and_leaves_no_artefact(toy_cache, tmp_path):
    words = [*TOY_DATA, f"data.root={toy_cache}", "model=tiny", *TOY_MODEL, "data.batch_size=4", "trainer.max_epochs=1"]
    words += ["model.lr=1e38", "model.warmup_steps=[1,0]", f"output_dir={tmp_path}"]
    result = run_training(*words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: after step 2: network.encoder.backbone.cls_token holds NaN or infinity" in result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"].startswith("failed: after step 2: ") and summary["miou"] is None
    assert summary["skipped_steps"] == summary["overflows"] == 0
    assert not (tmp_path / "model").exists() and not (tmp_path / "checkpoints").exists()


def test_a_run_says_at_its_end_how_many_steps_were_skipped(capsys, tmp_path):
    summary = {"class_iou": {}, "artefact": "model", "files": {}, "trainable_parameters": 1, "total_parameters": 1}
    summary |= {"seconds_per_step": {"total": 1.0, "data": 0.0}, "peak_memory": {"bytes": 1, "of": "x"}, "steps": 9}
    print_result(summary | {"estimated_memory": None, "skipped_steps": 2, "overflows": 3}, tmp_path)
    said = capsys.readouterr().out
    assert f"2 of 9 steps were skipped, their loss or gradients were not finite: {tmp_path / 'failures'}" in said
    assert "3 of 9 steps overflowed in 16 bits" in said


class Foreign(lightning.LightningModule):
    """A module of somebody else's: a loss, a layer and an optimiser; the second batch's loss is infinite."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum() * (math.inf if batch_idx == 1 else 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_step_of_any_module_is_skipped_and_recorded(tmp_path):
    finite = FiniteSteps(tmp_path)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    torch.manual_seed(7)
    trainer = lightning.Trainer(max_epochs=1, callbacks=[finite], enable_model_summary=False, **options)
    trainer.fit(Foreign(), torch.utils.data.DataLoader(torch.ones(3, 2)))
    (record,) = records(tmp_path)
    assert finite.skipped == 1 and record["step"] == 1 and record["seed"] == 7


class Normed(lightning.LightningModule):
    """A module with running statistics, of which some inputs are not finite."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(self.norm(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_skipped_step_leaves_running_statistics_as_they_were(tmp_path, accumulated):
    inputs = torch.rand(6 * accumulated, 4, 2, generator=torch.Generator().manual_seed(1))
    spoilt = inputs.clone()
    spoilt[2 * accumulated - 1] = math.nan  # of step 1, the last batch
    found = []
    for batches in (spoilt, torch.cat((inputs[:accumulated], inputs[2 * accumulated :]))):
        module, finite = Normed(), FiniteSteps(tmp_path / str(len(found)))
        fit(module, batches, finite, max_steps=len(batches) // accumulated, accumulate_grad_batches=accumulated)
        found.append(module.state_dict())
        assert finite.skipped == (batches is spoilt)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
