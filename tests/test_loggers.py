"""A picture or a line of a log that cannot be written ends no run, and what can wait is written later."""

import csv
import errno
import io
import json
import logging
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import pytest
from conftest import TOY_DATA, TOY_MODEL, run_training
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from eomt.command_line import LogFile, ScreenLog
from eomt.files import Tolerated
from eomt.reporting.loggers import EventFile, MetricsFile, finish_loggers
from eomt.reporting.wandb_logger import wandb_logger
from eomt.settings.compose import compose_run
from eomt.settings.sweeps import name_job, report_sweep
from eomt.training.callbacks import RunProgressBar
from eomt.training.class_scores import score_words
from eomt.training.finite_steps import FiniteSteps

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full_disk():
    """Files cannot grow beyond a size, which stands in for a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_what_a_run_can_do_without_is_warned_of_once(caplog):
    tolerated = Tolerated("samples/")
    for _ in range(3):
        with tolerated:
            raise FULL
    assert warnings(caplog) == [f"samples/ cannot be written, the run goes on without: {FULL}"]
    with pytest.raises(ZeroDivisionError), tolerated:
        1 / 0  # noqa: B018


def test_metrics_have_a_row_for_each_step_and_new_columns_keep_the_earlier_rows(tmp_path):
    log = MetricsFile(tmp_path)
    for step, metrics in enumerate(({"loss": 1.5}, {"loss": 2.5, "epoch": 0}, {"val/miou": 0.5}, {"loss": 4.5})):
        log.log_metrics(metrics, step)
    log.finalize("success")
    found = rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in found] == ["0", "1", "2", "3"]
    assert [row["loss"] for row in found] == ["1.5", "2.5", "", "4.5"]
    assert os.listdir(tmp_path) == ["metrics.csv"]


@pytest.mark.parametrize("name", ["loss", "another"])
def test_rows_that_a_full_disk_refuses_are_written_whole_once_there_is_room(tmp_path, full_disk, caplog, name):
    path = tmp_path / "metrics.csv"
    log = MetricsFile(tmp_path)
    log.log_metrics({"loss": 0.5}, 0)
    before = path.read_bytes()
    full_disk(len(before) + 3)
    for step in (1, 2):
        log.log_metrics({name: 0.5}, step)
        assert path.read_bytes() == before
    full_disk(10**6)
    log.log_metrics({"loss": 0.5}, 3)
    assert [row["step"] for row in rows(path)] == ["0", "1", "2", "3"] and len(warnings(caplog)) == 1
    assert all(row[name] == "0.5" for row in rows(path)[1:3])


def test_a_folder_that_cannot_be_written_costs_the_metrics_and_nothing_else(tmp_path, caplog):
    (tmp_path / "file").touch()
    for logger in (MetricsFile(tmp_path / "file"), EventFile(tmp_path / "file")):
        logger.log_hyperparams({"lr": 1})
        logger.log_metrics({"loss": 0.5}, 0)
        logger.save()
        logger.finalize("success")
    assert len(warnings(caplog)) == 2


def test_events_go_on_in_a_new_file_after_an_error(tmp_path, caplog):
    log = EventFile(tmp_path, name="", version="")
    log.log_metrics({"loss": 1.0}, 0)
    log.experiment.flush()
    log.experiment.add_scalar = lambda *args: (_ for _ in ()).throw(FULL)
    log.log_metrics({"loss": 2.0}, 1)
    log.log_metrics({"loss": 3.0}, 2)
    log.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {event.step for event in events.Scalars("loss")} >= {2} and len(warnings(caplog)) == 1
    with pytest.raises(ValueError, match="not supported"):
        log.log_metrics({"loss": object()}, 3)


class Gone(io.StringIO):
    """A screen whose reader has left."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("screen", [None, Gone()])
def test_a_progress_bar_without_a_screen_draws_nothing(monkeypatch, caplog, screen):
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", None)
    progress = RunProgressBar()
    progress._refresh_rate = 1  # as on a screen
    for bar in (progress.init_sanity_tqdm(), progress.init_train_tqdm()):
        bar.reset(10)
        bar.update(5)
        bar.refresh()
        bar.close()
    assert len(warnings(caplog)) == (screen is not None)


def record(message):
    return logging.LogRecord("eomt", logging.INFO, "file", 1, message, None, None)


def test_the_log_of_a_run_goes_on_when_there_is_room_again(tmp_path, full_disk, capsys):
    handler = LogFile(tmp_path / "run.log")
    handler.emit(record("first"))
    full_disk(7)
    handler.emit(record("second"))
    handler.emit(record("third"))
    full_disk(10**6)
    handler.emit(record("fourth"))
    handler.close()
    assert (tmp_path / "run.log").read_text().split() == ["first", "second", "third", "fourth"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "run.log cannot be written, the run goes on without" in line


def test_a_log_that_stays_full_is_closed_without_an_error(tmp_path, full_disk, capsys):
    handler = LogFile(tmp_path / "run.log")
    full_disk(2)
    handler.emit(record("first"))
    handler.close()
    ScreenLog(Gone()).emit(record("to nobody"))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_line_of_the_log_stands_beside_no_progress_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(Tqdm, "_instances", WeakSet(), raising=False)  # other tests may have left bars above it
    monkeypatch.setattr("tqdm.tqdm", type("tqdm", (tqdm,), {"_instances": WeakSet()}))  # as it is once loaded again
    bar = Tqdm(total=2, file=screen, desc="Epoch 0")
    ScreenLog(screen).emit(record("step 1"))
    bar.close()
    lines = [part for part in re.split("[\r\n]", screen.getvalue()) if "step 1" in part]
    assert lines == ["step 1"]


def test_a_mistake_in_a_call_of_the_log_is_still_shown(tmp_path, capsys):
    for handler in (LogFile(tmp_path / "run.log"), ScreenLog()):
        handler.emit(logging.LogRecord("eomt", logging.INFO, "file", 1, "%d", ("word",), None))
        assert "Logging error" in capsys.readouterr().err
        handler.close()


def test_a_record_of_a_skipped_step_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "failures").touch()
    finite = FiniteSteps(tmp_path)
    with finite.tolerated:
        (finite.folder / "x").mkdir()
    assert "failures/ cannot be written" in warnings(caplog)[0]


def test_a_run_goes_on_where_pictures_and_logs_cannot_be_written_and_nobody_reads(toy_cache, tmp_path):
    for name in ("samples", "tensorboard"):
        (tmp_path / name).touch()
    words = [*TOY_DATA, f"data.root={toy_cache}", "model=tiny", *TOY_MODEL, "data.batch_size=4", "trainer.max_epochs=2"]
    result = run_training(*words, "logger=tensorboard", f"output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert '"status": "finished"' in (tmp_path / "summary.json").read_text()
    for name in ("samples/", "tensorboard/"):
        assert result.stdout.count(f"WARNING {name} cannot be written, the run goes on without") == 1


@pytest.mark.parametrize(("lora", "trained"), [("true", ["adapters", "heads"]), ("false", ["backbone", "heads"])])
def test_tensorboard_has_pictures_and_named_learning_rates_and_no_figure_without_meaning(
    toy_cache, tmp_path, lora, trained
):
    words = [*TOY_DATA, f"data.root={toy_cache}", "model=tiny", *TOY_MODEL, "data.batch_size=4", "trainer.max_epochs=2"]
    words += ["trainer.log_every_n_steps=1", f"model.use_lora={lora}", "logger=tensorboard"]
    result = run_training(*words, f"output_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr[-3000:]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0}).Reload()
    assert events.Tags()["images"] == ["kept", "samples"]
    assert {event.step for event in events.Images("kept")} <= {2, 4}
    assert "hp_metric" not in events.Tags()["scalars"]
    rates = [name for name in events.Tags()["scalars"] if name.startswith("lr")]
    assert sorted(rates) == [f"lr/{name}" for name in trained]
    first = rows(tmp_path / "run" / "metrics.csv")[0]
    assert all(float(first[name]) > 0 or name == "lr/backbone" for name in rates)


def test_tensorboard_calls_the_runs_of_a_sweep_by_what_they_vary(tmp_path):
    events = EventFile(tmp_path, name="tensorboard", version="", job="1 model.ckpt_path=/a/b")
    assert Path(events.log_dir) == tmp_path / "tensorboard" / "1 model.ckpt_path=_a_b"
    assert Path(EventFile(tmp_path, name="tensorboard", version="", job=None).log_dir) == tmp_path / "tensorboard"
    assert compose_run(["logger=tensorboard", "job=3 x"]).logger.tensorboard.job == "3 x"


def test_a_metric_that_is_no_number_is_an_empty_cell(tmp_path):
    MetricsFile(tmp_path).log_metrics({"loss": float("nan"), "val/miou": 0.5}, 3)
    assert rows(tmp_path / "metrics.csv") == [{"loss": "", "step": "3", "val/miou": "0.5"}]


def test_a_run_of_wandb_is_named_by_what_it_varies_without_tags_that_are_none_and_ends_as_the_run_did(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = wandb_logger(name="camvid_head", job="1 seed=2", group="sweep", job_type="train", tags=[None, "camvid"])
    init = made._wandb_init
    wanted = {"name": "camvid_head 1 seed=2", "group": "sweep", "job_type": "train", "tags": ["camvid"]}
    assert {key: init[key] for key in wanted} == wanted
    assert "anonymous" not in init, "wandb warns of it, whatever its value"
    made.finish()  # where nothing was begun
    codes = []
    for ended_well in (True, False):
        made._experiment = SimpleNamespace(finish=lambda exit_code: codes.append(exit_code))
        finish_loggers([made, MetricsFile(tmp_path)], ended_well)
    assert codes == [0, 1]


@pytest.mark.parametrize(
    ("words", "params", "name"),
    [
        (["model.lora_rank=4,8", "seed=1"], {}, "3 model.lora_rank=8"),
        (["model.lora_rank=8", "seed=1,2"], {}, "3 seed=1"),
        (["seed=1"], {"model.lora_rank": "range(4,8)"}, "3 model.lora_rank=8"),
    ],
)
def test_a_job_of_a_sweep_is_named_by_its_number_and_what_it_varies(words, params, name):
    task = ["model.lora_rank=8", "seed=1", "data.root='/a b'"]
    hydra = {"sweeper": {"params": params}, "overrides": {"task": task}, "job": {"num": 3}}
    assert name_job(OmegaConf.create(hydra), ["--multirun", *words, "hydra.sweep.dir='x'"]) == name


def test_the_runs_of_a_sweep_are_listed_once_the_best_first_and_those_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for job, (status, miou) in enumerate((("finished", 0.5), ("failed: no room", None), ("finished", 0.625))):
        folder = tmp_path / "sweep" / str(job)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"status": status, "miou": miou}))
        (folder / "config.yaml").write_text(f"job: {job} model.lora_rank={4 * job}\n")
    assert report_sweep(Path("sweep"), {tmp_path / "sweep" / "1": "no room"}) == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "mIoU 62.50  2 model.lora_rank=8", "mIoU 50.00  0 model.lora_rank=0", "2 runs finished in sweep, 1 failed",
    ]  # fmt: skip
    assert told.err.splitlines() == [f"failed: {tmp_path / 'sweep' / '1'}: no room"]


def test_a_log_file_gets_a_line_an_epoch_without_control_characters_and_the_time_left_comes_first(caplog):
    caplog.set_level(logging.INFO)
    progress = RunProgressBar()
    assert not progress.on_screen
    progress.started, progress.first_step = time.monotonic() - 10, 0
    trainer = SimpleNamespace(
        global_step=5,
        current_epoch=0,
        is_global_zero=True,
        progress_bar_metrics={"train/loss": 12.34567, "val/miou": 0.5},
        loggers=[],
    )
    progress._trainer, progress._train_progress_bar = trainer, SimpleNamespace(disable=True)
    progress.on_train_epoch_end(trainer, SimpleNamespace(total_steps=10))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "epoch 0, step 5: left 0:00:10, loss 12.35"


def test_a_validation_tells_its_mean_the_change_and_the_three_worst_classes():
    iou = {"sky": 0.9, "pole": 0.1, "sign": 0.2, "fence": 0.3, "gone": float("nan")}
    assert score_words(0.375, iou, 0.35) == "mIoU 37.50 (+2.50), least: pole 10.00, sign 20.00, fence 30.00"
    assert score_words(0.5, {"road": 0.6, "rest": 0.4}, None) == "mIoU 50.00, least: rest 40.00, road 60.00"
    assert score_words(0.5, {"road": 0.5}, 0.5) == "mIoU 50.00 (+0.00)"
