"""The runs of a sweep: their folder, what each of them varies, and what became of them."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from eomt.command_line import unquoted
from eomt.files import read_json, read_yaml

SWEEP = "hydra.sweep.dir"


def name_sweep(words: Sequence[str]) -> list[str]:
    """Returns the words with a folder for all runs of a sweep, if they ask for one: that of `output_dir`, or a new one.

    Raises:
        ValueError: several folders.
    """
    if not {"--multirun", "-m"} & set(words):
        return list(words)
    given = [word.partition("=")[2] for word in words if word.lstrip("+").startswith("output_dir=")]
    if given and unquoted(given[-1]) == given[-1]:  # a list of values, which is left without quotes
        raise ValueError(f"output_dir={given[-1]}: a sweep has one folder, and each run its own in it; give one path")
    kept = [word for word in words if not word.lstrip("+").startswith("output_dir=")]
    folder = given[-1] if given else f"outputs/multirun/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    return kept if any(word.startswith(f"{SWEEP}=") for word in kept) else [*kept, f"{SWEEP}={folder}"]


def find_sweep(words: Sequence[str]) -> Path | None:
    """Returns the folder of the sweep that `name_sweep` has named; None for a single run."""
    folder = next((word.partition("=")[2] for word in words if word.startswith(f"{SWEEP}=")), None)
    return Path(unquoted(folder)) if folder and {"--multirun", "-m"} & set(words) else None


@contextmanager
def no_empty_sweep(words: Sequence[str]) -> Iterator[None]:
    """Removes the folder of a sweep behind the block, where Hydra alone wrote there: no run has begun, or none is left.

    Args:
        words: of the command line, with what `name_sweep` adds.
    """
    from eomt.settings.run import found_before, remove_empty

    folder, kept = find_sweep(words), found_before(words)
    try:
        yield
    finally:
        record = Path(os.path.abspath(folder), "multirun.yaml") if folder else None
        if record and record.is_file() and list(record.parent.iterdir()) == [record]:
            record.unlink()
            remove_empty(record.parent, kept)


def given_overrides(hydra_config: Any) -> list[str]:
    """The overrides of a run as they were written, with the interpolations that some hold."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(hydra_config.overrides.task, resolve=False)


def name_job(hydra_config: Any, words: Sequence[str]) -> str:
    """Names one run of a sweep by its number and what it varies: `1 model.lora_rank=8`.

    Args:
        hydra_config: Hydra's own, of the run.
        words: of the command line, where several values of a key make the sweep; a sweeper may vary others.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    varied = {
        each.get_key_element()
        for each in OverridesParser.create().parse_overrides(overrides)
        if each.is_sweep_override()
    }
    for name in ("params", "search_space"):  # of sweepers that optimise
        varied |= set(hydra_config.sweeper.get(name) or ())
    chosen = [word for word in given_overrides(hydra_config) if word.partition("=")[0].lstrip("+") in varied]
    return " ".join([str(hydra_config.job.num), *chosen])


def report_sweep(folder: Path, failed: Mapping[Path, str]) -> int:
    """Lists the runs of a sweep, the best first, then those that failed; returns a code.

    Those that a launcher ran in other processes are among them.
    """
    found = (
        path
        for path in sorted(Path(os.path.abspath(folder)).rglob("summary.json"))
        if not path.parent.name.startswith("earlier_")
    )
    runs = {path.parent: read_json(path) for path in found}
    statuses = {run: summary.get("status", "without a result") for run, summary in runs.items()}
    failed = {run: status for run, status in statuses.items() if status != "finished"} | dict(failed)
    finished = [run for run in runs if run not in failed]
    for run in sorted(finished, key=lambda run: -(runs[run].get("miou") or 0)):
        miou = runs[run].get("miou")
        job = read_yaml(run / "config.yaml", {}).get("job") or run.name
        print(f"mIoU {'none' if miou is None else f'{100 * miou:.2f}'}  {job}")
    for run, reason in failed.items():
        print(f"failed: {run}: {reason.removeprefix('failed: ')}", file=sys.stderr)
    print(f"{len(finished)} runs finished in {folder}, {len(failed)} failed")
    return 1 if failed else 0
