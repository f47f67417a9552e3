"""What a run left in files, read with care: a file that is not what it should be is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as DamagedError

import numpy as np
import yaml

from eomt.command_line import one_sentence

RESULT = {"score": str, "temperature": float | int, "auprc": float | int | None, "anomalous": int, "valid": int}


def check_ckpt_path(ckpt_path: str | Path | None) -> None:
    """Raises FileNotFoundError where weights are named that are not there."""
    if ckpt_path and not Path(ckpt_path).expanduser().exists():
        raise FileNotFoundError(f"ckpt_path {ckpt_path}: no such file or folder")


def read_evaluation(file: Path, facts: Mapping[str, Any]) -> dict[str, bool]:
    """Which classes have pixels in what `scripts/evaluate.py` wrote; ValueError if it is something else."""
    try:
        targets = np.load(file)["confusion"].sum((0, 2))  # of [N, target, prediction]
        return dict(zip(facts["classes"], (targets > 0).tolist(), strict=True))
    except (ValueError, LookupError, TypeError, EOFError, BadZipFile, DamagedError) as error:
        raise ValueError(f"{file} and {file.stem}.json are not what scripts/evaluate.py writes: {error}") from error


def read_scores(file: Path) -> tuple[str, list[dict[str, Any]]]:
    """A benchmark's title and results as `scripts/evaluate_anomaly.py` writes them.

    Raises:
        ValueError: it is something else.
    """
    facts = read_json(file)
    title, results = facts.get("title"), facts.get("results")
    kinds = {"title": (title, str), "results": (results, list)}
    wrong = [name for name, (found, kind) in kinds.items() if not (found and isinstance(found, kind))]
    if not wrong:
        wrong = [name for name, kind in RESULT.items() if not all(holds(result, name, kind) for result in results)]
    if wrong:
        raise ValueError(f"{file} is not what scripts/evaluate_anomaly.py writes: look at {', '.join(wrong)} in it")
    return title, results


def holds(result: Any, name: str, kind: Any) -> bool:
    """Whether a result has a value of this kind."""
    return isinstance(result, dict) and name in result and isinstance(result[name], kind)


def read_json(path: Path) -> dict[str, Any] | None:
    """`read_settings` of a JSON file."""
    return read_settings(path, json.loads)


def read_settings(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    """The file's content; None if it is not there, ValueError if it cannot be parsed or is no mapping."""
    if not path.is_file():
        return None
    try:
        content = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({one_sentence(error)}): it may be half-written") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where names and values should be: look at it")
    return content
