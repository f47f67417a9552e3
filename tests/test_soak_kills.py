"""A run that is ended again and again, in the middle of a write, too, ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY_DATA, TOY_MODEL

from eomt.training.run_folder import newest_checkpoint, steps_in

KILLS = int(os.environ.get("EOMT_SOAK_KILLS", 30))  # half of them on each of two file systems
OTHER_FILE_SYSTEM = "/dev/shm"
EPOCHS = 60


def start(folder, toy_cache):
    words = [*TOY_DATA, "data.num_train=24", f"data.root={toy_cache}", "model=tiny", *TOY_MODEL, "data.batch_size=2"]
    words += ["variant=full", f"trainer.max_epochs={EPOCHS}", "trainer.check_val_every_n_epoch=2"]
    words += ["callbacks.samples.every_n_epochs=0", f"output_dir={folder}", "resume=auto"]
    command = [sys.executable, str(ROOT / "train_with_lora.py"), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def is_writing(folder):
    """Whether a checkpoint or the artefact is being written."""
    drafts = [*folder.glob("checkpoints/.*.ckpt.*"), *folder.glob(".model.part")]
    return any(path.exists() for draft in drafts for path in draft.rglob("*"))


def kill(process, folder, chance, while_writing):
    """Ends a run that has come further than before, at a random time or in the middle of a write."""
    before, began = steps_of(folder), time.monotonic()
    while process.poll() is None and steps_of(folder) == before and time.monotonic() - began < 120:
        time.sleep(0.05)
    if while_writing:
        while process.poll() is None and not is_writing(folder):
            pass
    else:
        time.sleep(chance.uniform(0, 2))
    process.send_signal(signal.SIGKILL if while_writing or chance.random() < 0.7 else signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), error[-3000:]


def steps_of(folder):
    checkpoint = newest_checkpoint(folder)
    return steps_in(checkpoint) if checkpoint else 0


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_a_run_that_is_killed_again_and_again_has_the_weights_of_one_that_never_was(toy_cache, tmp_path):
    process = start(tmp_path / "whole", toy_cache)
    assert process.wait() == 0, process.stderr.read()[-3000:]
    wanted, chance = weights(tmp_path / "whole"), random.Random(0)
    with tempfile.TemporaryDirectory(dir=OTHER_FILE_SYSTEM) as elsewhere:
        assert os.stat(elsewhere).st_dev != os.stat(tmp_path).st_dev
        for folder in (tmp_path / "killed", Path(elsewhere) / "killed"):
            seen = []
            for count in range(KILLS // 2):
                process = start(folder, toy_cache)
                kill(process, folder, chance, while_writing=count % 2 == 0)
                assert newest_checkpoint(folder), "the newest is best.ckpt where last.ckpt was being written"
                seen.append(steps_of(folder))
            print(f"{folder}: killed after {seen} of {EPOCHS * 12} steps")
            assert seen == sorted(seen)
            process = start(folder, toy_cache)
            assert process.wait() == 0, process.stderr.read()[-3000:]
            found = weights(folder)
            assert all(torch.equal(found["state_dict"][key], wanted["state_dict"][key]) for key in wanted["state_dict"])
            summaries = [json.loads((place / "summary.json").read_text()) for place in (folder, tmp_path / "whole")]
            assert len({summary["miou"] for summary in summaries}) == 1 and summaries[0]["parts"] > 1
            strays = [path for path in folder.rglob(".*") if path.name != ".lock"]
            assert not strays, strays
            metrics = [(place / "metrics.csv").read_text() for place in (folder, tmp_path / "whole")]
            assert sorted(metrics[0].splitlines()) == sorted(metrics[1].splitlines())
