"""Results that evaluations leave in a run's folder, read with care: a file that is not what it should be is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as DamagedError

import numpy as np

from eomt.settings.formats import ANOMALY, SUMMARY, read_format

RESULT = {"score": str, "temperature": float | int, "auprc": float | int | None, "anomalous": int, "valid": int}


def read_summary(run: Path) -> dict[str, Any]:
    """Returns the summary of a run, nothing if there is none yet; ValueError where its score is no number."""
    file = run / "summary.json"
    summary = read_format(file, SUMMARY, {})
    miou = summary.get("miou")
    if miou is not None and not (isinstance(miou, (int, float)) and 0 <= miou <= 1):
        raise ValueError(f"{file} says miou {miou!r}: a share from 0 to 1 is meant; put back what the run wrote")
    return summary


def read_confusion(file: Path, facts: Mapping[str, Any]) -> np.ndarray:
    """Returns the counts [N, target, prediction] that `scripts/evaluate.py` wrote beside its facts.

    Raises:
        ValueError: it is something else, or of other images or classes than the facts say.
    """
    try:
        with np.load(file) as archive:
            confusion = archive["confusion"]
        wanted = (len(facts.get("images", confusion)), len(facts["classes"]), len(facts["classes"]))
    except (ValueError, LookupError, TypeError, EOFError, BadZipFile, DamagedError) as error:
        raise ValueError(f"{file} and {file.stem}.json are not what scripts/evaluate.py writes: {error}") from error
    if confusion.shape != wanted:
        raise ValueError(f"{file} has counts {confusion.shape}, {file.stem}.json says {wanted}: evaluate again")
    return confusion


def read_sequences(file: Path, facts: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Returns the video that each image is a frame of, nothing where an earlier version or the data name none.

    Raises:
        ValueError: they are not one for each image.
    """
    found = facts.get("sequences") or []
    if not isinstance(found, list) or not all(name is None or isinstance(name, str) for name in found):
        raise ValueError(f"{file} has sequences {found!r}: a list of names is meant; evaluate again")
    if found and len(found) != len(facts["images"]):
        raise ValueError(f"{file} has {len(found)} sequences for {len(facts['images'])} images: evaluate again")
    return tuple(found)


def read_scores(file: Path) -> dict[str, Any]:
    """Returns what `scripts/evaluate_anomaly.py` wrote of a benchmark: its title, results and facts.

    Raises:
        ValueError: it is something else.
    """
    facts = read_format(file, ANOMALY)
    title, results = facts.get("title"), facts.get("results")
    kinds = {"title": (title, str), "results": (results, list)}
    wrong = [name for name, (found, kind) in kinds.items() if not (found and isinstance(found, kind))]
    if not wrong:
        wrong = [name for name, kind in RESULT.items() if not all(holds(result, name, kind) for result in results)]
    if wrong:
        raise ValueError(
            f"{file} holds no results of anomaly scores as scripts/evaluate_anomaly.py writes them: look at "
            f"{', '.join(wrong)} in it, evaluate again or delete it"
        )
    return facts


def holds(result: Any, name: str, kind: Any) -> bool:
    """Whether a result has a value of this kind."""
    return isinstance(result, dict) and name in result and isinstance(result[name], kind)
