"""A run's folder belongs to one run at a time, which goes on from its newest whole checkpoint."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from eomt.files import claimed, in_use
from eomt.reporting.loggers import MetricsFile
from eomt.settings.run import check_output_dir, found_before
from eomt.training.run_folder import cut_metrics, forgetting, newest_checkpoint, run_folder

HOLD = """
import sys, time
from eomt.files import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def save(folder, name, steps, half=False):
    path = folder / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": steps, "w": torch.zeros(1000)}, path)
    if half:
        path.write_bytes(path.read_bytes()[:-99])
    return path


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield tmp_path, process
    process.kill()
    process.communicate()


def test_a_folder_is_held_by_one_process_until_it_dies(held):
    folder, process = held
    assert in_use(folder)
    with (
        pytest.raises(ValueError, match="is in use by another process: wait for its end"),
        run_folder(folder, "auto", {}),
    ):
        pass
    process.kill()
    process.wait()
    with claimed(folder):
        pass


def test_the_checkpoint_with_the_most_steps_is_found_and_half_ones_and_drafts_are_passed_over(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    best = save(tmp_path, "best.ckpt", 4)
    assert newest_checkpoint(tmp_path) == best
    (tmp_path / "checkpoints" / ".last.ckpt.draft").mkdir()
    torch.save({"global_step": 99}, tmp_path / "checkpoints" / ".last.ckpt.draft" / "last.ckpt")
    last = save(tmp_path, "last.ckpt", 8)
    assert newest_checkpoint(tmp_path) == last
    save(tmp_path, "last.ckpt", 8, half=True)
    assert newest_checkpoint(tmp_path) == best
    save(tmp_path, "best.ckpt", 4, half=True)
    assert newest_checkpoint(tmp_path) is None


def test_contents_that_a_power_failure_left_as_zeros_are_not_whole(tmp_path):
    path = save(tmp_path, "last.ckpt", 8)
    content = bytearray(path.read_bytes())
    middle = content.index(b"\x00" * 3900)
    content[middle + 100 : middle + 200] = b"\x01" * 100  # its checksum says zeros
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoints", "adapter", "model"])
def test_whatever_a_run_left_keeps_another_one_out_and_auto_lets_it_go_on(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="holds a run: continue it with resume=auto, or choose another folder"):
        check_output_dir(tmp_path, None)
    with pytest.raises(ValueError, match="holds a run"):
        check_output_dir(tmp_path, str(tmp_path.parent / "other" / "checkpoints" / "last.ckpt"))
    check_output_dir(tmp_path, "auto")
    check_output_dir(tmp_path, str(tmp_path / "checkpoints" / "last.ckpt"))


def test_what_never_came_to_a_checkpoint_is_set_aside_and_the_run_starts_anew(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(text)
        (tmp_path / "summary.json").write_text("{}")
        with run_folder(tmp_path, "auto", {}) as resume:
            assert resume is None
    assert [(tmp_path / f"earlier_{i}" / "metrics.csv").read_text() for i in (1, 2)] == ["first", "second"]
    assert not (tmp_path / "metrics.csv").exists() and (tmp_path / "earlier_2" / "summary.json").exists()


def steps(folder):
    return [row["step"] for row in csv.DictReader((folder / "metrics.csv").open())]


def test_metrics_go_on_without_what_will_be_logged_again(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1\n1,1\n2,1\n3,")  # killed while it wrote
    cut_metrics(tmp_path, 2)
    log = MetricsFile(str(tmp_path))
    log.log_metrics({"loss": 2.0}, 2)
    log.log_metrics({"val/miou": 0.5}, 2)
    assert steps(tmp_path) == ["0", "1", "2", "2"]
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", "steps": 2}))
    cut_metrics(tmp_path, 2)  # its last validation came after the last step
    assert steps(tmp_path) == ["0", "1", "2", "2"]


def refused(folder, kept, before=(), written=("config.yaml",)):
    """A run's folder after a start that was refused; what is there before, and what the start writes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run.log", *before):
        (folder / name).touch()
    forget = forgetting(folder, "run.log", kept)
    for name in written:
        (folder / name).touch()
    forget()


def test_a_start_that_was_refused_leaves_no_folder(tmp_path):
    refused(tmp_path / "outputs" / "name" / "time", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_there_stays_and_so_does_all_that_others_wrote(tmp_path):
    refused(tmp_path / "given", tmp_path / "given")
    refused(tmp_path / "own", tmp_path, before=["config.yaml"])
    refused(tmp_path / "trained", tmp_path, written=["config.yaml", "summary.json"])
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert files == {
        "given", "own", "own/run.log", "own/config.yaml",
        "trained", "trained/run.log", "trained/config.yaml", "trained/summary.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    "words", [["output_dir=runs/a b/c"], ["--multirun", "hydra.sweep.dir='runs/x'"], ["output_dir='runs/${name}'"]]
)
def test_a_folder_that_was_there_before_a_start_is_known_whatever_lies_below(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert found_before(words) == tmp_path
    (tmp_path / "runs").mkdir()
    assert found_before(words) == tmp_path / "runs"
    assert found_before([]) == tmp_path


@pytest.mark.parametrize("words", [[], ["output_dir=new/run"], ["output_dir=run"]])
def test_a_run_that_cannot_start_leaves_nothing_but_the_folder_that_it_was_called_in(tmp_path, monkeypatch, words):
    import train_with_lora

    monkeypatch.chdir(tmp_path)
    assert train_with_lora.main(["experiment=toy_source", "model.llrd=2.0", *words]) == 1
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
