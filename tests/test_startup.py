"""Mistakes are answered before the heavy libraries are imported: modules are counted, not seconds."""

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
