"""Reads and checks the arguments of a training that will run elsewhere: files of that place may be missing here."""

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eomt.command_line import unquoted
from eomt.comparison.matrix import check_matrix, parse_matrix
from eomt.launch.job import IN_STUDIO
from eomt.places import ROOT
from eomt.settings.compose import compose_run
from eomt.settings.run import check_output_dir

NOT_A_RUN = ("--multirun", "-m", "--cfg", "-c", "--help", "-h")
FORGIVEN = () if IN_STUDIO else (FileNotFoundError,)
Check = Callable[[Any], None]  # raises ValueError or OSError where a training would refuse a configuration


def find_output_dir(words: Sequence[str]) -> str | None:
    """Returns the folder that the arguments name, or None.

    Raises:
        ValueError: arguments that are not one run, a folder only known later, or one that holds a run.
    """
    if stray := [word for word in words if word in NOT_A_RUN]:
        raise ValueError(f"{stray[0]}: a job is one run; launch one job for each, or a matrix with --compare")
    given = [found[1] for word in words if (found := re.fullmatch(r"\+{0,2}output_dir=(.*)", word))]
    if not given:
        return None
    folder = unquoted(given[-1])
    if not folder or "$" in folder:
        raise ValueError(f"output_dir {folder!r}: give a plain path, so that the job finds its checkpoint again")
    if not any(word.lstrip("+").startswith("resume=") for word in words):
        check_output_dir(ROOT / folder, None)
    return folder


def default_name(asked: Any, compare: bool) -> str:
    """Returns a job's name of what is trained, and the time: folder-vit-small-lora-20260101-120000.

    Args:
        asked: the configuration of a training, or what `read_matrix` returns.
        compare: whether it is a matrix.
    """
    what = f"compare-{Path(parse_matrix(*asked)[0]['folder']).name}" if compare else asked.name
    return re.sub("[^a-z0-9]+", "-", what.lower()) + time.strftime("-%Y%m%d-%H%M%S")


def compose_training(words: Sequence[str]) -> Any:
    """Returns the configuration of a training, from translated arguments; raises ValueError for what is mistyped."""
    parser = _options("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd", "--config-path", "-cp", dest="folder")
    for option in ("--package", "-p", "--info", "-i", "--experimental-rerun"):  # Hydra's, which compose nothing
        parser.add_argument(option)
    known, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if not word.startswith("-")]
    return compose_run([*overrides, "output_dir=run"], known.config_name, known.folder and ROOT / known.folder)


def read_matrix(words: Sequence[str]) -> tuple[list[str], str]:
    """Returns overrides and configuration of `compare.py run`; raises ValueError for an option that it has not."""
    known, overrides = _options("--config-name").parse_known_args(words)
    if stray := [word for word in overrides if word.startswith("-")]:
        raise ValueError(f"{stray[0]}: a matrix has no option but --config-name; give key=value")
    return overrides, known.config_name


def check_training(config: Any, check: Check) -> None:
    """Raises as `check` does; missing files are no mistake, unless this is the Studio that the job starts from."""
    with suppress(*FORGIVEN), _at_root():
        check(config)


def check_training_matrix(asked: tuple[Sequence[str], str], check: Check) -> None:
    """Raises where `compare.py run` would refuse what `read_matrix` returns; about files see `check_training`."""
    with suppress(*FORGIVEN), _at_root():
        check_matrix(parse_matrix(*asked)[0], check)


def _options(*names: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest="config_name", default="cityscapes")
    return parser


@contextmanager
def _at_root() -> Iterator[None]:
    """Relative paths begin in the block where the job's shell will be."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(before)
