"""Mistakes are answered before the heavy libraries are imported: modules are counted, not seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchvision", "timm", "lightning", "peft", "torchmetrics", "matplotlib")
REPORT = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", sorted(set({HEAVY!r}) & set(sys.modules))))
sys.argv = sys.argv[1:]
sys.path.insert(0, "scripts")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def imported_by(*words):
    """Exit code, error and heavy libraries of a command line."""
    result = subprocess.run([sys.executable, "-c", REPORT, *words], cwd=ROOT, capture_output=True, text=True)
    return result.returncode, result.stderr, result.stdout.splitlines()[-1]


LORA = ("--config-name", "cityscapes_lora")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*LORA, "data.root=/nowhere"), "Cityscapes needs /nowhere/leftImg8bit_trainvaltest.zip"),
        (LORA, "data.root is required"),
        (("experiment=toy_source", "model.use_lora=true", "model.lora_rank=0"), "LoRA rank 0"),
        ((*LORA, "data.root=/tmp", "model.lora_dropout=1.5"), "LoRA dropout 1.5"),
        (("--img_size", "100", "100", "--use_lora"), "try [96, 96]"),
        ((*LORA, "data.root=/tmp", "model.ckpt_path=/nowhere/x.ckpt"), "ckpt_path /nowhere/x.ckpt"),
        (("experiment=toy_source", "resume=/nowhere/last.ckpt"), "resume /nowhere/last.ckpt"),
        (("experiment=toy_source", "model.lora_rank=many"), "model.lora_rank 'many'"),
        (
            ("data=folder", "data.images=/nowhere", "data.masks=/nowhere", "data.classes=/nowhere"),
            "/nowhere is not there",
        ),
    ],
)
def test_a_mistake_in_a_run_is_answered_without_the_libraries_that_train(words, sentence, tmp_path):
    code, error, imported = imported_by("train_with_lora.py", *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 1 and sentence in error and "Traceback" not in error
    assert imported == "imported: []"


def test_an_occupied_folder_is_answered_without_the_libraries_that_train(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n")
    code, error, imported = imported_by("train_with_lora.py", "experiment=toy_source", f"output_dir={tmp_path}")
    assert code == 1 and "holds a run: choose another folder" in error
    assert imported == "imported: []"
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n"


def test_a_second_call_in_one_process_finds_the_environment_as_the_first_one_did(monkeypatch, capsys, tmp_path):
    import train_with_lora

    monkeypatch.chdir(tmp_path)
    for setting in (None, "0"):
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        if setting is not None:
            monkeypatch.setenv("HYDRA_FULL_ERROR", setting)
        before, words = dict(os.environ), list(sys.argv)
        assert train_with_lora.main(["experiment=toy_source", "model.lora_rnk=4"]) == 2
        assert "did you mean lora_rank" in capsys.readouterr().err
        assert train_with_lora.main(["experiment=toy_source", "model.llrd=2.0"]) == 1
        assert "llrd 2.0" in capsys.readouterr().err
        assert dict(os.environ) == before and sys.argv == words
