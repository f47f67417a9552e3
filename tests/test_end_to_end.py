"""Whole runs on toy streets, started the way a user starts them."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import pytest
import torch
import warm
import yaml
from conftest import TOY_DATA as DATA
from conftest import TOY_MODEL as MODEL

ROOT = Path(__file__).parent.parent


def command_line(toy_cache, folder, *arguments):
    command = [warm.python(), str(ROOT / "train_with_lora.py"), *DATA, f"data.root={toy_cache}", "model=tiny", *MODEL]
    return [*command, f"output_dir={folder}", *arguments]


def train(toy_cache, folder, *arguments, code=0):
    result = subprocess.run(
        command_line(toy_cache, folder, *arguments),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def summary_of(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def run_evaluate(*arguments, code=0):
    command = [warm.python(), str(ROOT / "scripts" / "evaluate.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == code, result.stdout + result.stderr
    return result


def evaluate(artefact, folder, *overrides):
    """The mIoU that scripts/evaluate.py finds and writes."""
    assert "road" in run_evaluate(artefact, *overrides, "--output", folder).stdout
    (scores,) = folder.glob("*.json")
    return json.loads(scores.read_text())["miou"]


@pytest.fixture(scope="module")
def source(toy_run):
    """The folder of a full training run and what it printed."""
    return toy_run


@pytest.fixture(scope="module")
def adapted(source, toy_cache, tmp_path_factory):
    """A LoRA run from it, by the guide's own flags."""
    folder = tmp_path_factory.mktemp("lora")
    flags = f"--use_lora --lora_rank 4 --lora_alpha 8 --epochs 3 --batch_size 4 --ckpt_path {source[0]}/model".split()
    return folder, train(toy_cache, folder, "data.domain=night_fog", *flags), toy_cache


def test_a_full_run_leaves_one_folder_with_everything(source):
    folder, printed = source
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "summary.json", "checkpoints", "model", "samples"} <= names
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list((folder / "samples").glob("*.png"))
    assert "TRAINABLE PARAMETERS" in printed and "SUMMARY: 100.00% trainable" in printed
    assert "mIoU" in printed and str(folder) in printed


def test_the_summary_says_what_the_run_was_and_cost(source):
    summary = summary_of(source[0])
    assert summary["schema_version"] == 1 and summary["status"] == "finished" and summary["steps"] == 8
    assert 0 < summary["miou"] < 1 and set(summary["class_iou"]) >= {"road", "sky", "car"}
    assert summary["miou_classes"] == sum(iou is not None for iou in summary["class_iou"].values())
    assert summary["trainable_parameters"] == summary["total_parameters"] > 1e5
    assert summary["files"]["model/model.safetensors"] > 4 * summary["total_parameters"]
    assert summary["peak_memory"]["bytes"] > 1e8 and summary["estimated_memory"]["bytes"] > 1e6
    assert "estimated: " in source[1] and summary["lora_audit"] is None
    step = summary["seconds_per_step"]
    assert step["total"] == pytest.approx(step["data"] + step["compute"]) and step["data"] > 0
    assert {"torch", "peft", "timm"} <= set(summary["versions"]) and summary["seed"] == 0
    assert len(summary["data"]["train"]) == 64 and summary["data"]["val_images"] == 3


def test_metrics_are_written_for_every_validation(source):
    rows = list(csv.DictReader((source[0] / "metrics.csv").open()))
    scores = [float(row["val/miou"]) for row in rows if row.get("val/miou")]
    assert len(scores) == 4 and max(scores) == pytest.approx(summary_of(source[0])["miou"], abs=1e-6)


def test_the_saved_network_scores_what_the_run_reported(source, toy_cache, tmp_path):
    overrides = [*DATA, f"data.root={toy_cache}"]
    found = evaluate(source[0] / "model", tmp_path, *overrides)
    assert found == pytest.approx(summary_of(source[0])["miou"], abs=1e-6)


@pytest.mark.parametrize("artefact", ["", "adapter", "checkpoints/best.ckpt"])
def test_every_form_of_an_adapter_scores_what_the_run_reported_and_nothing_is_repeated(adapted, tmp_path, artefact):
    assert evaluate(adapted[0] / artefact, tmp_path) == pytest.approx(summary_of(adapted[0])["miou"], abs=1e-6)


def test_a_merged_adapter_scores_what_the_adapter_does_in_float32(adapted, tmp_path):
    script, adapter = ROOT / "scripts" / "merge_lora.py", adapted[0] / "adapter"
    subprocess.run([warm.python(), script, adapter, tmp_path / "merged"], check=True, capture_output=True)
    data = [*DATA, f"data.root={adapted[2]}", "data.domain=night_fog", "--precision", "32-true"]
    apart, merged = (
        evaluate(model, tmp_path / f"{model.name}_scores", *data) for model in (adapter, tmp_path / "merged")
    )
    assert merged == pytest.approx(apart, abs=1e-6)


def test_an_evaluation_leaves_the_confusion_matrix_as_table_and_picture(source, tmp_path):
    run_evaluate(source[0] / "model", "--output", tmp_path)
    rows = list(csv.reader((tmp_path / "toy_streets_confusion.csv").open()))
    counts = np.load(tmp_path / "toy_streets.npz")["confusion"]
    names = json.loads((tmp_path / "toy_streets.json").read_text())["classes"]
    assert rows[0][1:] == names and [row[0] for row in rows[1:]] == names
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], dtype=np.int64), counts.sum(0))
    assert (tmp_path / "toy_streets_confusion.png").stat().st_size > 10_000


def test_evaluating_on_other_classes_is_refused(source, camvid_root):
    result = run_evaluate(source[0] / "model", "data=camvid", f"data.root={camvid_root}", code=1)
    assert "the network knows 19 classes" in result.stderr and "has 11" in result.stderr


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.lora_rank=8", "model.lora_rank=8 contradicts the model, which carries lora_rank=4"),
        ("data.img_size=[32,32]", "contradicts the model, which carries img_size=[64, 64]"),
        ("trainer.max_epochs=3", "only the data can be chosen here"),
    ],
)
def test_what_contradicts_the_model_is_refused(adapted, override, sentence):
    assert sentence in run_evaluate(adapted[0] / "adapter", "data=toy_streets", override, code=1).stderr


def test_a_lora_run_ends_with_a_small_adapter_and_a_passed_audit(adapted, source):
    folder, result, _ = adapted
    summary = summary_of(folder)
    assert "TRAINABLE PARAMETERS (LoRA)" in result.stdout and "Total frozen" in result.stdout
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "eomt_config.json",
        "heads.safetensors",
    }
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert all(check["passed"] for check in summary["lora_audit"].values()) and len(summary["lora_audit"]) >= 9
    assert summary["trainable_parameters"] < summary["total_parameters"]
    assert (folder / "checkpoints" / "last.ckpt").stat().st_size < (
        source[0] / "checkpoints" / "last.ckpt"
    ).stat().st_size


def test_lora_checkpoints_hold_no_frozen_weight(adapted):
    checkpoint = torch.load(adapted[0] / "checkpoints" / "last.ckpt", weights_only=True)
    backbone = [key for key in checkpoint["state_dict"] if ".backbone." in key]
    assert backbone and all(".lora_" in key for key in backbone)


def test_the_auto_preset_counts_the_images_and_says_so(source, toy_cache, tmp_path):
    arguments = ["lora=auto", "trainer.max_epochs=1", "data.batch_size=4", "model.lora_alpha=9"]
    result = train(toy_cache, tmp_path, *arguments, f"model.ckpt_path={source[0]}/model")
    assert "lora=auto: 8 training images, so lora=small" in result.stdout
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 9, 0.1)


def test_a_run_of_no_steps_evaluates_the_network_it_starts_from(source, toy_cache, tmp_path):
    train(toy_cache, tmp_path, "variant=none", "data.batch_size=4", f"model.ckpt_path={source[0]}/model")
    summary = summary_of(tmp_path)
    assert summary["steps"] == 0 and summary["status"] == "finished"
    assert summary["miou"] == pytest.approx(summary_of(source[0])["miou"], abs=1e-6)


def test_patience_ends_a_run_that_no_longer_improves(toy_cache, tmp_path):
    train(toy_cache, tmp_path, "data.batch_size=8", "model.lr=1e-12", "trainer.max_epochs=30", "patience=2")
    assert summary_of(tmp_path)["steps"] < 10


def test_the_last_checkpoint_is_the_last_even_when_an_earlier_one_was_better(source):
    last, best = (torch.load(source[0] / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in ("last", "best"))
    assert last["global_step"] == summary_of(source[0])["steps"] == 8
    assert best["global_step"] == summary_of(source[0])["best_step"]


def test_a_sweep_gives_every_job_its_own_folder_and_its_own_run_of_wandb(toy_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ["data.batch_size=4", "trainer.max_epochs=1", "logger=wandb", "--multirun", "model.num_q=10,11,12"]
    result = train(toy_cache, tmp_path, *arguments)
    ids = set()
    for job, queries in enumerate((10, 11, 12)):
        folder = tmp_path / str(job)
        assert summary_of(folder)["status"] == "finished"
        assert (folder / "model" / "model.safetensors").is_file()
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["group"], config["job"]) == (tmp_path.name, f"{job} model.num_q={queries}")
        assert f"mIoU {100 * summary_of(folder)['miou']:.2f}  {job} model.num_q={queries}\n" in result.stdout
        [run] = (folder / "wandb").glob("offline-run-*")
        ids.add(run.name.rpartition("-")[2])
    assert len(ids) == 3


def test_each_run_of_a_sweep_has_its_turn_and_those_that_failed_are_listed(source, toy_cache, tmp_path):
    arguments = ["--multirun", "model.lr=-1,1e-3", "seed=0,a", "trainer.max_steps=0", "data.batch_size=4"]
    result = train(toy_cache, tmp_path, *arguments, code=1)
    assert f"failed: {tmp_path}/0: lr -1: must be greater than 0" in result.stderr, result.stderr
    assert f"failed: {tmp_path}/3: seed 'a': should be" in result.stderr
    assert f"1 runs finished in {tmp_path}, 3 failed" in result.stdout
    assert "Traceback" not in result.stderr


def test_an_optimising_sweeper_gets_the_miou_of_each_run(toy_cache, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_jobs=1"]
    search += ["hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1", "model.lr=tag(log,interval(1e-4,1e-2))"]
    train(toy_cache, tmp_path, "--multirun", *search, "data.batch_size=4", "trainer.max_epochs=1")
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    runs = [(summary_of(tmp_path / str(job))["miou"], tmp_path / str(job) / "config.yaml") for job in range(2)]
    assert best["best_value"] == max(miou for miou, _ in runs)
    chosen = yaml.safe_load(max(runs)[1].read_text())["model"]["lr"]
    assert best["best_params"] == {"model.lr": pytest.approx(chosen)}


def test_a_sweep_takes_one_folder(toy_cache, tmp_path):
    result = train(toy_cache, tmp_path, "--multirun", "seed=0,1", "output_dir=a,b", code=2)
    assert "output_dir=a,b: a sweep has one folder, and each run its own in it" in result.stderr


def test_a_mistaken_resume_leaves_the_records_of_the_run_as_they_were(source, toy_cache):
    folder = source[0]
    before = {name: (folder / name).read_bytes() for name in ("metrics.csv", "summary.json", "config.yaml")}
    resume = f"resume={folder}/checkpoints/last.ckpt"
    train(toy_cache, folder, "data.batch_size=4", "model.lr=1e-5", resume, code=1)
    garbage = train(toy_cache, folder, "data.batch_size=4", f"resume={folder}/model/model.safetensors", code=1)
    assert "it is no checkpoint of a run" in garbage.stderr and "Traceback" not in garbage.stderr
    assert all((folder / name).read_bytes() == content for name, content in before.items())


def test_an_evaluation_follows_data_that_have_moved_and_says_when_they_are_gone(adapted, toy_cache, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(toy_cache, moved)
    found = evaluate(adapted[0] / "adapter", tmp_path / "scores", f"data.root={moved}")
    assert found == pytest.approx(summary_of(adapted[0])["miou"], abs=1e-6)
    result = run_evaluate(adapted[0] / "adapter", "data.rot=x", code=1)
    assert "data.rot is not in" in result.stderr and "did you mean root?" in result.stderr


def test_scores_on_other_images_are_not_written_over(source, tmp_path):
    run_evaluate(source[0] / "model", "--output", tmp_path)
    result = run_evaluate(source[0] / "model", "data.num_val=2", "--output", tmp_path, code=1)
    assert "holds scores on other images: give another folder with --output" in result.stderr


def test_resuming_with_other_settings_is_refused(source, toy_cache, tmp_path):
    resume = f"resume={source[0]}/checkpoints/last.ckpt"
    result = train(toy_cache, tmp_path, "data.batch_size=4", "model.lr=1e-5", resume, code=1)
    assert "error: resume: the checkpoint was trained with lr 0.002, now it is 1e-05" in result.stderr


def test_a_full_run_resumes_where_it_stopped(source, toy_cache, tmp_path):
    resume = f"resume={source[0]}/checkpoints/last.ckpt"
    train(toy_cache, tmp_path, "data.batch_size=4", "trainer.max_epochs=5", "model.lr=2e-3", resume)
    assert summary_of(tmp_path)["steps"] == 10 and summary_of(tmp_path)["miou"] >= summary_of(source[0])["miou"]


def test_the_same_command_again_leaves_a_finished_run_as_it_is(toy_cache, tmp_path):
    arguments = ["data.batch_size=4", "trainer.max_epochs=2", "patience=1", "model.lr=1e-9", "resume=auto"]
    train(toy_cache, tmp_path, *arguments)
    names = ("metrics.csv", "summary.json", "config.yaml", "checkpoints/last.ckpt", "model/eomt_config.json")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    assert "holds this run, finished after 4 steps" in train(toy_cache, tmp_path, *arguments).stdout
    train(toy_cache, tmp_path, *arguments, "model.lr=1", code=1)
    assert before == {name: (tmp_path / name).read_bytes() for name in names}
    fewer = train(toy_cache, tmp_path, *arguments, "trainer.max_epochs=1")
    assert "the checkpoint has 4 steps behind it, more than the 2 of this run: nothing was trained" in fewer.stdout


def test_a_folder_that_holds_a_run_is_not_written_over(source, toy_cache):
    result = train(toy_cache, source[0], "data.batch_size=4", "trainer.max_epochs=1", code=1)
    assert "holds a run: continue it with resume=auto, or choose another folder" in result.stderr
    assert summary_of(source[0])["steps"] == 8


def test_a_lora_run_resumes_where_it_stopped(adapted, source, toy_cache, tmp_path):
    flags = f"--use_lora --lora_rank 4 --lora_alpha 8 --batch_size 4 --ckpt_path {source[0]}/model".split()
    resume = f"resume={adapted[0]}/checkpoints/last.ckpt"
    train(toy_cache, tmp_path, "data.domain=night_fog", *flags, "trainer.max_epochs=5", resume)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert {int(row["epoch"]) for row in rows if row.get("val/miou")} == {3, 4}
    before, after = summary_of(adapted[0]), summary_of(tmp_path)
    assert after["steps"] == 10 and after["miou"] >= before["miou"]
    assert all(check["passed"] for check in after["lora_audit"].values())


def test_two_runs_with_one_seed_are_the_same_on_a_cpu(toy_cache, tmp_path):
    for name in ("a", "b"):
        train(toy_cache, tmp_path / name, "data.batch_size=4", "trainer.max_epochs=1", "seed=5")
    a, b = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert summary_of(tmp_path / "a")["miou"] == summary_of(tmp_path / "b")["miou"]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_run_that_was_killed_and_resumed_ends_as_if_nothing_had_happened(source, toy_cache, tmp_path, workers):
    arguments = ["data.batch_size=4", "trainer.max_epochs=4", "variant=lora_r4", f"model.ckpt_path={source[0]}/model"]
    arguments += [f"data.num_workers={workers}", "trainer.check_val_every_n_epoch=2", "model.lora_dropout=0.3"]
    train(toy_cache, tmp_path / "whole", *arguments)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    slow = ["trainer.limit_val_batches=3", "callbacks.samples.every_n_epochs=1"]  # time to be killed in
    process = subprocess.Popen([sys.executable, *command_line(toy_cache, tmp_path / "killed", *arguments, *slow)[1:]])
    while process.poll() is None and not is_zipfile(last):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert torch.load(last, weights_only=True)["global_step"] < 8, "it was not killed in time"
    train(toy_cache, tmp_path / "killed", *arguments, f"resume={last}")
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "killed")
    ]
    whole, killed = (state["state_dict"] for state in states)
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert summary_of(tmp_path / "whole")["miou"] == summary_of(tmp_path / "killed")["miou"]
    assert summary_of(tmp_path / "whole")["batches"] == summary_of(tmp_path / "killed")["batches"]


def test_two_processes_count_every_validation_image_once(source, toy_cache, tmp_path):
    arguments = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "data.batch_size=2"]
    arguments += ["--use_lora", f"model.ckpt_path={source[0]}/model", "trainer.max_epochs=2"]
    train(toy_cache, tmp_path, *arguments)
    summary = summary_of(tmp_path)
    found = evaluate(tmp_path / "adapter", tmp_path / "scores", *DATA, f"data.root={toy_cache}")
    assert found == pytest.approx(summary["miou"], abs=1e-6)
    assert all(check["passed"] for check in summary["lora_audit"].values())


def test_a_failed_audit_stops_the_run_in_a_sentence_and_is_in_the_summary(source, toy_cache, tmp_path):
    arguments = [
        "model.use_lora=true",
        "model.lora_lr=1e-30",
        f"model.ckpt_path={source[0]}/model",
        "data.batch_size=1",
    ]
    result = train(toy_cache, tmp_path, *arguments, "trainer.max_epochs=4", code=1)
    assert "error: LoRA audit" in result.stderr and "Traceback" not in result.stderr
    summary = summary_of(tmp_path)
    assert summary["status"].startswith("failed: LoRA audit")
    assert not all(check["passed"] for check in summary["lora_audit"].values())


def test_wandb_without_a_key_goes_offline_with_one_line_and_never_asks(toy_cache, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    result = train(toy_cache, tmp_path / "run", "--use_wandb", "data.batch_size=4", "trainer.max_epochs=1")
    output = result.stdout + result.stderr
    assert output.count("wandb is offline") == 1
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
