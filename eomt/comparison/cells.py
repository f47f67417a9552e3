"""One cell of a matrix: a run that is trained, evaluated and scored, in processes of its own."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from eomt.command_line import quoted
from eomt.comparison.tuning import chosen_settings, setting_words, settled
from eomt.files import in_use, read_json, write_json
from eomt.inference.saved import shipped
from eomt.places import SCRIPTS, TRAIN
from eomt.processes import PASSED_ON, Interrupted
from eomt.settings.formats import CELL, MATRIX, SUMMARY, read_format, stamped
from eomt.training.run_folder import set_aside

TOYS = "toy_anomalies"  # the benchmark that is drawn where it is needed


@dataclass
class Cell:
    """One run of a matrix, by its folder there; Hydra sweeps over them."""

    cell: str
    matrix: str


def run_cell(cell: Cell) -> None:
    """Runs one cell of the matrix, unless it is finished, or running in another process."""
    from filelock import FileLock, Timeout
    from hydra.core.hydra_config import HydraConfig

    matrix = Path(cell.matrix)
    facts = read_format(matrix / "matrix.json", MATRIX, {})
    folder, asked = matrix / cell.cell, facts["cells"][cell.cell]
    alike = [name for name, other in facts["cells"].items() if ("trial" in other) == ("trial" in asked)]
    words = f"[{HydraConfig.get().job.num + 1}/{len(alike)}] {title(asked)}"
    try:
        with FileLock(matrix / f".{cell.cell.replace('/', '_')}.lock", timeout=0):
            if finished(folder, facts, trial="trial" in asked):
                print(f"== {words}: finished before, kept", flush=True)
            elif "trial" in asked and settled(matrix, asked["variant"], asked["trial"]):
                print(f"== {words}: failed before, and the choice is made", flush=True)
            elif folder.is_dir() and in_use(folder):  # by a run whose matrix was killed
                print(f"== {words}: another process runs it, left alone", flush=True)
            else:
                train_and_evaluate(asked, words, matrix, facts, folder)
    except Timeout:
        print(f"== {words}: another process runs it, left alone", flush=True)


def title(cell: dict[str, Any]) -> str:
    """Names a cell for a reader: `lora_r8, seed 0`."""
    if "trial" in cell:
        return f"{cell['variant']}, trial of {', '.join(f'{key}={value}' for key, value in cell['trial'].items())}"
    some = "" if cell["images"] == "all" else f", {cell['images']} images"
    return f"{cell['variant']}, seed {cell['seed']}{some}"


def train_and_evaluate(cell: dict[str, Any], title: str, matrix: Path, facts: dict[str, Any], folder: Path) -> None:
    """One cell, in processes of its own; whatever happens to it, the others go on."""
    print(f"== {title}", flush=True)
    script = [sys.executable, str(TRAIN), "--config-name", facts["config_name"]]
    tuned = [] if "trial" in cell else setting_words(chosen_settings(matrix, cell["variant"]))
    group = [f"group={quoted(matrix.name)}", f"job={quoted(title.partition(', ')[2])}"]
    train = [*script, *cell["words"], *tuned, *fixed(cell, folder), *group, "resume=auto"]
    evaluate = [sys.executable, str(SCRIPTS / "compare.py"), "evaluate", str(folder), *facts["source"]]
    folder.mkdir(parents=True, exist_ok=True)
    if (status(folder) or "").startswith("failed: LoRA audit"):  # of which the rest of a run shows too little
        set_aside(folder)
    started = time.time()
    with one_device(matrix, facts["devices"]) as environment:
        error = None if status(folder) == "finished" else run_logged(train, folder / "run.log", environment)
        if not error and status(folder) != "finished":  # a signal ended it
            error = f"the run was {status(folder)}: the same command goes on from its last checkpoint"
        anomaly_errors = {}
        if "trial" not in cell:  # which its own validation scores
            error = error or run_logged(evaluate, folder / "run.log", environment)
            anomaly_errors = {} if error else score_anomalies(folder, facts, environment)
    cell_facts = {"variant": cell["variant"], "seed": cell["seed"], "status": "failed" if error else "finished"}
    cell_facts |= {
        "error": error,
        "anomaly_errors": anomaly_errors,
        "command": ["python", "train_with_lora.py", *train[2:]],
    }
    write_json(folder / "cell.json", stamped(CELL, cell_facts))
    minutes, seconds = divmod(round(time.time() - started), 60)
    outcome = (
        f"failed: {error}" if error else "finished" + "".join(f", no scores: {e}" for e in anomaly_errors.values())
    )
    print(f"== {title}: {outcome} after {minutes} min {seconds} s", flush=True)


def fixed(cell: dict[str, Any], folder: Path | str) -> list[str]:
    """Settings of each run; the artefact of the last step is no choice among the evaluated images."""
    own = [f"variant={cell['variant']}", f"seed={cell['seed']}"]
    return [*own, f"output_dir={quoted(folder)}", "callbacks.save_best.keep=last"]


def finished(folder: Path, facts: dict[str, Any], trial: bool = False) -> bool:
    """Whether a cell is done: its own summary says so, and it is evaluated on all that the matrix asks for."""
    ended = read_format(folder / "cell.json", CELL, {}).get("status") == "finished" == status(folder)
    evaluated = trial or not facts["source"] or (folder / "evaluation" / "source.json").is_file()
    return ended and evaluated and (trial or not without_scores(folder, facts["anomaly"]))


def without_scores(run: Path, benchmarks: Sequence[str]) -> list[str]:
    """The anomaly benchmarks that the run has no results on, or went on after them; the picture comes last."""
    return [name for name in benchmarks if outdated(run, run / "anomaly" / f"{name}.png")]


def outdated(run: Path, scores: Path) -> bool:
    """Whether the run has no such scores, or they are of another network than it ships.

    Networks have ids; where an earlier version left none, the run must not have gone on after the scores.
    """
    if not scores.is_file():
        return True
    own = read_format(run / "summary.json", SUMMARY).get("artefact_id")
    scored = read_json(scores.with_suffix(".json"), {}).get("artefact_id")
    if own and scored:
        return own != scored
    return scores.stat().st_mtime < (run / "summary.json").stat().st_mtime


def status(folder: Path) -> str | None:
    return read_format(folder / "summary.json", SUMMARY, {}).get("status")


def run_logged(command: Sequence[str], log: Path, environment: dict[str, str]) -> str | None:
    """Runs a command, its output both shown and appended to the log; returns its error, or None."""
    before = log.stat().st_size if log.is_file() else 0
    with (
        log.open("ab") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            copy_output(process, file)
        except Interrupted:  # it ends as this process was asked to
            process.send_signal(PASSED_ON)
            copy_output(process, file)
            raise
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}; 9 often means that memory ran out"
    output = log.read_bytes()[before:].decode(errors="replace")
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]  # its sentence comes last
    return (errors or lines or [f"exit code {process.returncode}"])[-1]


def copy_output(process: subprocess.Popen, file: BinaryIO) -> None:
    """Shows what a process prints until it ends, and writes it to a file."""
    while part := process.stdout.read1():
        sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        file.write(part)


@contextmanager
def one_device(matrix: Path, devices: Sequence[int]) -> Iterator[dict[str, str]]:
    """An environment that shows one of the GPUs, free until the end of the block; without `devices` all of them."""
    environment = {**os.environ, "HYDRA_FULL_ERROR": "0"}
    if not devices:
        yield environment
        return
    from filelock import FileLock, Timeout

    while True:
        for device in devices:
            try:
                with FileLock(matrix / f".device_{device}.lock", timeout=1):
                    yield {**environment, "CUDA_VISIBLE_DEVICES": str(device)}
                    return
            except Timeout:
                continue


def score_anomalies(run: Path, facts: dict[str, Any], environment: dict[str, str]) -> dict[str, str]:
    """Scores the run's artefact on the benchmarks it has no results on; returns the errors of those that failed."""
    errors = {}
    for name in without_scores(run, facts["anomaly"]):
        command = [sys.executable, str(SCRIPTS / "evaluate_anomaly.py"), str(shipped(run)), f"data={name}"]
        command += [] if name == TOYS else [f"data.root={facts['anomaly_root']}"]
        if error := run_logged(command, run / "run.log", environment):
            errors[name] = error
        shutil.rmtree(run / "anomaly" / "logits", ignore_errors=True)  # gigabytes, of every cell
    return errors
