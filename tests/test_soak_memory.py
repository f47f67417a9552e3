"""A long run of training and validation stays as it was after its first minutes: memory, open files, threads."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOY_DATA, TOY_MODEL

MINUTES = float(os.environ.get("EOMT_SOAK_MINUTES", 20))
EVERY = 5  # seconds between two looks
PAGE = os.sysconf("SC_PAGE_SIZE")


def processes(pid):
    """The process and those that it started and that still run."""
    children = [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]
    return [pid, *(each for child in children for each in processes(child))]


def look(pid):
    """Resident MiB, open files and threads of a process and its children together; None where one ended meanwhile."""
    try:
        places = [Path(f"/proc/{each}") for each in processes(pid)]
        resident = sum(int((place / "statm").read_text().split()[1]) for place in places) * PAGE / 2**20
        return resident, *(sum(len(os.listdir(place / name)) for place in places) for name in ("fd", "task"))
    except OSError:
        return None


def watch(process, minutes):
    """What `look` saw, [N, 4], its time in minutes first."""
    started, seen = time.monotonic(), []
    while process.poll() is None and (now := (time.monotonic() - started) / 60) < minutes:
        if figures := look(process.pid):
            seen.append((now, *figures))
        time.sleep(EVERY)
    return np.array(seen)


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 120)
def test_memory_open_files_and_threads_of_a_long_run_stay_flat(toy_cache, tmp_path):
    words = [*TOY_DATA, f"data.root={toy_cache}", "data.num_workers=1", "model=tiny", *TOY_MODEL, "data.batch_size=4"]
    words += ["trainer.max_epochs=1000000", "callbacks.samples.every_n_epochs=5", f"output_dir={tmp_path}"]
    with (tmp_path / "printed.txt").open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train_with_lora.py", *words], stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            seen = watch(process, MINUTES)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -9, (tmp_path / "printed.txt").read_text()[-3000:]
    minutes, resident, files, threads = seen[seen[:, 0] > MINUTES / 4].T  # the rest is warm-up
    slope = np.polyfit(minutes, resident, 1)[0]
    figures = {"MiB": resident, "files": files, "threads": threads}
    epochs = len(list((tmp_path / "samples").iterdir())) * 5
    print(
        f"{epochs} epochs in {MINUTES:g} minutes, after warm-up: {resident.min():.0f} to {resident.max():.0f} MiB, "
        f"{slope:+.2f} MiB a minute, {files.min():.0f} to {files.max():.0f} open files, "
        f"{threads.min():.0f} to {threads.max():.0f} threads"
    )
    # medians: a look may fall into the writing of a checkpoint or the sending of a batch, which open files for a moment
    half = len(minutes) // 2
    grown = {name: np.median(values[half:]) - np.median(values[:half]) for name, values in figures.items()}
    assert grown["MiB"] < 0.02 * np.median(resident) and grown["files"] <= 1 and grown["threads"] <= 0, grown
