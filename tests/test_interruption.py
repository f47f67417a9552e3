"""A run that a signal ends goes on as if it had never stopped, and its processes end together."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import lightning
import pytest
import torch
from conftest import ROOT, TINY, TOY_DATA, TOY_MODEL, run_training
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import train_with_lora
from eomt.data.toy_streets import toy_streets
from eomt.processes import (
    PASSED_ON,
    Interrupted,
    Interruption,
    check_one_folder,
    check_sweep,
    command_to_continue,
    is_first_process,
)
from eomt.reporting.loggers import MetricsFile
from eomt.training.checkpoint_files import BestCheckpoint, CheckpointFiles
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.run_folder import cut_metrics, newest_checkpoint, steps_in
from eomt.training.stop_on_signal import StopOnSignal

EPOCH = 4  # batches


class SignalAt(Callback):
    """Sends a signal during the backward pass of a step, or at an image of a validation."""

    def __init__(self, step=None, validation=None, image=0, signum=signal.SIGTERM):
        self.step, self.validation, self.image, self.signum = step, validation, image, signum
        self.validations = 0

    def on_before_backward(self, trainer, *args):
        if trainer.global_step == self.step:
            self.step = None  # once, also where gradients are accumulated
            os.kill(os.getpid(), self.signum)

    def on_validation_start(self, *args):
        self.validations += 1

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, *args):
        if (self.validations, batch_idx) == (self.validation, self.image):
            os.kill(os.getpid(), self.signum)


def train(folder, toy_cache, *callbacks, resume=None, workers=0, **settings):
    """Three epochs of four steps with dropout, each with a validation; returns the trained module."""
    torch.manual_seed(0)
    module = MaskClassificationSemantic(**TINY, use_lora=True, lora_rank=2, lora_dropout=0.5)
    torch.manual_seed(7)
    data = toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=2, num_workers=workers
    )
    with Interruption() as interruption:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=3,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            logger=MetricsFile(str(folder)),
            plugins=[CheckpointFiles()],
            callbacks=[
                *callbacks,
                StopOnSignal(interruption, folder / "checkpoints" / "last.ckpt"),
                ModelCheckpoint(folder / "checkpoints", "last", save_on_train_epoch_end=True),
            ],
            **settings,
        )
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module


def rows(folder):
    return [{k: v for k, v in row.items() if v} for row in csv.DictReader((folder / "metrics.csv").open())]


@pytest.fixture(scope="module")
def whole(toy_cache, tmp_path_factory):
    """A run that never stopped: its weights and its curves."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, toy_cache).state_dict(), rows(folder)


@pytest.mark.parametrize(
    ("stop", "steps"),
    [
        ({"step": 1}, 2),
        ({"step": EPOCH - 1}, EPOCH),  # a validation follows
        ({"validation": 1, "image": 0}, EPOCH),
        ({"validation": 1, "image": 2, "signum": signal.SIGHUP}, EPOCH),
        ({"step": 3 * EPOCH - 1, "signum": signal.SIGINT}, 3 * EPOCH),  # the last one
    ],
    ids=["in an epoch", "before a validation", "in a validation", "at its last image", "in the last step"],
)
def test_an_interrupted_run_goes_on_bit_for_bit_and_its_curves_have_no_gap_and_no_double_entry(
    whole, toy_cache, tmp_path, stop, steps
):
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path, toy_cache, SignalAt(**stop))
    assert stopped.value.code == 128 + stop.get("signum", signal.SIGTERM)
    last = newest_checkpoint(tmp_path)
    assert steps_in(last) == steps
    cut_metrics(tmp_path, steps)
    state = train(tmp_path, toy_cache, resume=last).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in whole[0].items())
    assert rows(tmp_path) == whole[1]


class EndsBetweenItsCheckpoints(ModelCheckpoint):
    """At the end of the second epoch, once one checkpoint is written, and before the other is."""

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyError("killed")


def test_a_run_goes_on_bit_for_bit_from_best_ckpt_where_it_is_the_newest(whole, toy_cache, tmp_path):
    best = BestCheckpoint(tmp_path / "checkpoints", "best", monitor="step", mode="max", enable_version_counter=False)
    with pytest.raises(KeyError):
        train(tmp_path, toy_cache, best, EndsBetweenItsCheckpoints(save_top_k=0))
    newest = newest_checkpoint(tmp_path)
    assert newest.name == "best.ckpt" and steps_in(newest) == 2 * EPOCH
    cut_metrics(tmp_path, 2 * EPOCH)
    state = train(tmp_path, toy_cache, resume=newest).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in whole[0].items())
    assert rows(tmp_path) == whole[1]


def test_a_step_is_whole_before_an_interruption_when_gradients_are_accumulated(toy_cache, tmp_path):
    settings = {"accumulate_grad_batches": 2}
    wanted = train(tmp_path / "whole", toy_cache, **settings).state_dict()
    with pytest.raises(Interrupted):
        train(tmp_path, toy_cache, SignalAt(step=2), **settings)
    last = newest_checkpoint(tmp_path)
    assert steps_in(last) == 3
    state = train(tmp_path, toy_cache, resume=last, **settings).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items())


def test_an_interruption_between_validations_goes_on_bit_for_bit(toy_cache, tmp_path):
    settings = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    wanted = train(tmp_path / "whole", toy_cache, **settings).state_dict()
    with pytest.raises(Interrupted):
        train(tmp_path, toy_cache, SignalAt(step=EPOCH + 1), **settings)
    cut_metrics(tmp_path, EPOCH + 2)
    state = train(tmp_path, toy_cache, resume=newest_checkpoint(tmp_path), **settings).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items())
    assert rows(tmp_path) == rows(tmp_path / "whole")


class Seen(Callback):
    """The batches of each step, by its number."""

    def __init__(self):
        self.names = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        items = trainer.datamodule.batch_items(batch_idx)
        assert torch.equal(batch[0][0], trainer.datamodule.train_set[items[0]["index"], items[0]["seed"]][0])
        self.names.setdefault(trainer.current_epoch, []).append([(item["name"], item["seed"]) for item in items])


@pytest.mark.parametrize(
    "settings",
    [
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.8, "accumulate_grad_batches": 2},
        {"overfit_batches": 3},
        {"reload_dataloaders_every_n_epochs": 1},
        {"val_check_interval": 2, "workers": 1},
    ],
    ids=str,
)
def test_whatever_makes_up_an_epoch_a_run_goes_on_within_it_as_if_it_had_never_stopped(toy_cache, tmp_path, settings):
    whole, first, second = Seen(), Seen(), Seen()
    wanted = train(tmp_path / "whole", toy_cache, whole, **settings).state_dict()
    with pytest.raises(Interrupted):
        train(tmp_path, toy_cache, first, SignalAt(step=2 if "accumulate_grad_batches" in settings else 4), **settings)
    state = train(tmp_path, toy_cache, second, resume=newest_checkpoint(tmp_path), **settings).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items())
    assert {epoch: first.names.get(epoch, []) + second.names.get(epoch, []) for epoch in range(3)} == whole.names


def test_overfit_batches_are_the_same_images_in_each_epoch_augmented_anew(toy_cache, tmp_path):
    seen = Seen()
    train(tmp_path, toy_cache, seen, overfit_batches=2)
    images = [[name for batch in seen.names[epoch] for name, _ in batch] for epoch in range(3)]
    assert images[0] == images[1] == images[2] and len(set(images[0])) == 4
    assert seen.names[0] != seen.names[1]


def test_loaders_that_are_made_anew_bring_the_batches_that_they_would_have_brought(toy_cache, tmp_path):
    once, anew = Seen(), Seen()
    train(tmp_path / "once", toy_cache, once)
    train(tmp_path / "anew", toy_cache, anew, reload_dataloaders_every_n_epochs=1)
    assert once.names == anew.names


def test_loader_processes_leave_the_signals_to_the_process_that_trains(toy_cache, tmp_path):
    class ToAll(Callback):
        """As a terminal and a scheduler do."""

        def on_before_backward(self, trainer, *args):
            if trainer.global_step == 1:
                children = [str(process.pid) for process in torch.multiprocessing.active_children()]
                assert children
                for name in ("INT", "TERM"):
                    subprocess.run(["kill", f"-{name}", *children], check=True)
                time.sleep(0.5)
                assert not any(map(ended, children))
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(tmp_path, toy_cache, ToAll(), workers=1)
    assert steps_in(newest_checkpoint(tmp_path)) == 2


def test_outside_of_training_a_signal_ends_the_work_on_the_spot_and_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"), Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_as_nohup_does_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            interruption.install()
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signum is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_for_a_summary_that_is_being_written():
    with pytest.raises(Interrupted), Interruption() as interruption:
        with interruption.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        interruption.check()


def test_a_second_signal_ends_the_process_at_once_but_one_that_was_passed_on_does_not():
    code = (
        "import os, signal\nfrom eomt.processes import *\nwith Interruption() as interruption:\n"
        "    interruption.deferred = True\n    for s in ({}): os.kill(os.getpid(), s)\n    print(interruption.signum)"
    )

    def ran(*signals):
        words = ", ".join(f"signal.{s.name}" for s in signals)
        return subprocess.run(
            [sys.executable, "-c", code.format(words + ",")], cwd=ROOT, capture_output=True, text=True
        )

    assert ran(signal.SIGTERM, signal.SIGINT).returncode == -signal.SIGINT
    assert ran(signal.SIGTERM, PASSED_ON).stdout == "15\n" == ran(PASSED_ON).stdout


def test_the_command_that_goes_on_names_the_folder_and_quotes_what_needs_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_with_lora.py"])
    words = ["data.root='/a b'", "data.masks='/c'", "+resume=x", "output_dir='old'", "model.img_size=[64,64]"]
    assert command_to_continue(words, Path("runs/1")) == (
        "python train_with_lora.py 'data.root=/a b' data.masks=/c 'model.img_size=[64,64]' "
        "output_dir=runs/1 resume=auto"
    )
    words = [
        "--multirun",
        "model.name='a, b'",
        "data.mask_template='{name}_m'",
        "hydra.sweep.dir='old'",
        "data.root='a,b'",
    ]
    assert command_to_continue(words, Path("old")) == (
        "python train_with_lora.py --multirun 'model.name='\"'\"'a, b'\"'\"'' 'data.mask_template={name}_m' "
        "'data.root='\"'\"'a,b'\"'\"'' output_dir=old resume=auto"
    )


@pytest.mark.parametrize("variables", [{"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_processes_that_were_started_from_outside_share_a_folder_and_one_touches_it(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not is_first_process()
    with pytest.raises(ValueError, match="2 processes were started for this run: give output_dir=FOLDER"):
        check_one_folder(["seed=1"])
    check_one_folder(["output_dir='runs'"])


@pytest.mark.parametrize(
    ("trainer", "refused"),
    [
        ({"devices": 2, "strategy": "ddp"}, True),
        ({"devices": "2"}, True),
        ({"devices": [0, 1]}, True),
        ({"devices": "0,1"}, True),
        ({"devices": 1, "num_nodes": 2}, True),
        ({"devices": 1}, False),
        ({"devices": [3]}, False),
        ({"devices": "auto", "accelerator": "cpu"}, False),
    ],
)
def test_a_sweep_whose_runs_would_start_processes_is_refused(trainer, refused):
    with pytest.raises(ValueError, match=r"--multirun with several processes a run") if refused else nullcontext():
        check_sweep(trainer)


def test_a_sweep_of_runs_of_two_processes_starts_none(toy_cache, tmp_path, capsys):
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "--multirun", "model.lr=1e-4,2e-4"]
    assert train_with_lora.main(words(toy_cache, tmp_path, *two)) == 1
    assert "give trainer.devices=1, or start each run by itself" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/config.yaml"))


# Whole processes


def test_a_finished_run_of_several_processes_goes_on_with_more_epochs_in_all_of_them(toy_cache, tmp_path):
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "resume=auto"]
    for epochs in (1, 2):
        result = run_training(*words(toy_cache, tmp_path, *two, f"trainer.max_epochs={epochs}"))
        assert result.returncode == 0, result.stderr[-2000:]
        assert summary_of(tmp_path)["steps"] == 2 * epochs


def words(toy_cache, folder, *further):
    return [
        *TOY_DATA,
        f"data.root={toy_cache}",
        "model=tiny",
        *TOY_MODEL,
        "data.batch_size=2",
        f"output_dir={folder}",
        *further,
    ]


def start(toy_cache, folder, *further):
    """A run that is in its second epoch."""
    command = [sys.executable, str(ROOT / "train_with_lora.py"), *words(toy_cache, folder, *further)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and newest_checkpoint(folder) is None:
        time.sleep(0.1)
    return process


def ended(process):
    """Whether a process has, be it that nobody has asked for its exit code."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_sigterm_ends_a_run_with_its_code_a_summary_and_the_command_that_finishes_it(toy_cache, tmp_path):
    process = start(toy_cache, tmp_path, "trainer.max_epochs=100")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output[-2000:]
    assert "interrupted by SIGTERM; go on with: python " in output and "Traceback" not in output
    assert f"output_dir={tmp_path} resume=auto" in output.rpartition("go on with")[2]
    assert summary_of(tmp_path)["status"] == "interrupted"
    refused = run_training(*words(toy_cache, tmp_path))
    assert refused.returncode == 1 and "holds a run: continue it with resume=auto" in refused.stderr
    steps = steps_in(newest_checkpoint(tmp_path))
    finished = run_training(*words(toy_cache, tmp_path, f"trainer.max_epochs={steps // 4 + 2}", "resume=auto"))
    assert finished.returncode == 0, finished.stderr[-2000:]
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["parts"], summary["steps"]) == ("finished", 2, (steps // 4 + 2) * 4)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_of_two_processes_ends_when_a_signal_reaches_one_of_them(toy_cache, tmp_path, signum):
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=100"]
    process = start(toy_cache, tmp_path, *two)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (int(c) for c in children if "LOCAL_RANK=1" in Path(f"/proc/{c}/environ").read_text())
    began = time.monotonic()
    os.kill(second, signum)
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 30 and ended(second)
    assert "Traceback" not in output and steps_in(newest_checkpoint(tmp_path)) >= 2
    if signum == signal.SIGTERM:
        assert process.returncode == 143 and output.count("interrupted by SIGTERM") == 1
        assert summary_of(tmp_path)["status"] == "interrupted"
    else:
        assert process.returncode == 1
        assert "error: another process of this run ended" in output and "resume=auto goes on" in output
        assert summary_of(tmp_path)["status"].startswith("failed: another process of this run ended")
