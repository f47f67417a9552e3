"""Shared by all tests: one thread, no network, the reference numbers, the ways to start a command line."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["OMP_NUM_THREADS"] = "1"  # two workers share the cores; what a test starts inherits it

import lightning
import pytest
import torch
import warm
from filelock import FileLock
from safetensors.torch import load_file, save_file

from eomt.models.checkpoint import load_checkpoint
from eomt.models.eomt import EoMT, Prediction
from eomt.models.vit import ViT

ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / "reference"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference():
    """Tensors of the published implementation, and the facts that go with them."""
    return load_file(REFERENCE / "eomt_reference.safetensors"), json.loads(
        (REFERENCE / "eomt_reference.json").read_text()
    )


@pytest.fixture
def reference_network(reference, tmp_path):
    """The reference network, its weights loaded through the function a user's checkpoint goes through."""
    tensors, facts = reference
    state = {f"network.{k.removeprefix('state.')}": v for k, v in tensors.items() if k.startswith("state.")}
    save_file(state, tmp_path / "published.safetensors")
    encoder = ViT(
        facts["img_size"], backbone_name=facts["backbone"], pretrained=False, backbone_kwargs=backbone_kwargs(facts)
    )
    network = EoMT(encoder, facts["num_classes"], facts["num_queries"], facts["num_blocks"])
    load_checkpoint(network, tmp_path / "published.safetensors")
    return network.eval()


def backbone_kwargs(facts):
    return {key: value for key, value in facts["backbone_kwargs"].items() if key != "patch_size"}


def prediction(mask_logits, class_logits):
    """One with these masks: each query picks its own feature."""
    queries = torch.eye(mask_logits.shape[1], dtype=mask_logits.dtype)
    return Prediction(queries.expand(len(mask_logits), -1, -1), mask_logits, class_logits)


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory):
    """Where the tests' toy streets are drawn, once."""
    return tmp_path_factory.mktemp("toy_streets")


TINY = {  # the smallest network that still has everything
    "img_size": [64, 128],
    "num_classes": 19,
    "backbone_name": "vit_tiny_patch16_224",
    "backbone_kwargs": {"embed_dim": 64, "depth": 3, "num_heads": 2},
    "pretrained": False,
    "num_q": 20,
    "num_blocks": 2,
    "num_points": 64,
}


# the same size for whole runs on toy streets
TOY_MODEL = ["model.img_size=[64,64]", "model.backbone_kwargs={embed_dim:64,depth:3,num_heads:2}"]
TOY_MODEL += ["model.num_blocks=2", "model.num_q=25", "model.num_points=128"]
TOY_DATA = ["data=toy_streets", "data.num_train=8", "data.num_val=3", "data.size=[64,128]", "data.num_workers=0"]


@pytest.fixture(scope="session")
def camvid_root():
    """CamVid, where $EOMT_CAMVID says it is."""
    root = os.environ.get("EOMT_CAMVID")
    if not root:
        pytest.skip("EOMT_CAMVID names no folder with the CamVid images")
    return root


@pytest.fixture(scope="session")
def toy_run(toy_cache, tmp_path_factory):
    """The folder of a full run on toy streets and what it printed: trained once, whichever worker is first."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, printed = root / "toy_run", root / "toy_run.txt"
    with FileLock(root / "toy_run.lock"):
        if not printed.exists():
            settings = ["data.batch_size=4", "trainer.max_epochs=4", "model.lr=2e-3", "trainer.gradient_clip_val=1.0"]
            words = [*TOY_DATA, f"data.root={toy_cache}", "model=tiny", *TOY_MODEL, *settings, f"output_dir={folder}"]
            result = run_training(*words)
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
            printed.write_text(result.stdout)
    return folder, printed.read_text()


def fit(module, data, *callbacks, **trainer):
    """Trains without validation, logging or output; two steps unless told otherwise."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"max_steps": 2, "max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0} | trainer
    trainer = lightning.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **quiet, **settings)
    trainer.fit(module, data)
    return trainer


def run_python(path, *arguments, cwd=ROOT, cold=False, **environment):
    """A file below the root as a user starts it, in a fork that has the libraries, or cold: in a new interpreter."""
    command = [sys.executable if cold else warm.python(), ROOT / path, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200
    )


def run_script(name, *arguments, **options):
    """The same for a file of `scripts/`."""
    return run_python(f"scripts/{name}", *arguments, **options)


run_training = partial(run_python, "train_with_lora.py")
run_cold = partial(run_python, cold=True)


@pytest.fixture(scope="module")
def browser():
    """A Chromium that is there already."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no Chromium to open the page with")
    options = "no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync"
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=[f"--{option}" for option in options.split()])
        yield chromium
        chromium.close()


@pytest.fixture
def call_script(monkeypatch, capsys):
    """The same in this process, which is quicker: exit code and error."""
    monkeypatch.syspath_prepend(ROOT / "scripts")

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        return exit.value.code, capsys.readouterr().err

    return call
