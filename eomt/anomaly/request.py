"""Settings of an anomaly evaluation: benchmarks, scores and temperatures; checked before torch is imported."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eomt.anomaly.benchmarks import benchmarks_below, find_benchmark, find_folder
from eomt.anomaly.scores import Variant
from eomt.anomaly.toy_anomalies import check_settings
from eomt.command_line import unquoted
from eomt.settings.compose import read_settings

TOYS, OF_TOYS = "toy_anomalies", ("data.number", "data.size", "data.seed")
SETTINGS: dict[str, Any] = {
    "data": [],
    "data.root": None,
    "data.number": 60,
    "data.size": [128, 256],
    "data.seed": 0,
    "scores": ["msp", "max_logit", "max_entropy", "rba"],
    "temperatures": [1.0],
}


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Returns all `SETTINGS`, with the values that words `KEY=VALUE` give; what may be several is a list.

    Raises:
        ValueError: an unknown setting, or one that cannot be read.
    """
    settings = read_settings(words, SETTINGS)
    roots = [word.partition("=")[2] for word in words if word.startswith("data.root=")]
    settings["data.root"] = unquoted(roots[-1]) if roots else None  # a path, also where it looks like a number
    for key in ("data", "scores", "temperatures"):
        if not isinstance(settings[key], list):
            settings[key] = [] if settings[key] is None else [settings[key]]
        if any(isinstance(each, list | dict) for each in settings[key]):
            raise ValueError(f"{key}={settings[key]} must be a value or a list of values")
    return settings


def choose_benchmarks(settings: Mapping[str, Any]) -> list[str]:
    """Returns the benchmarks that are named, or all that lie under the root; toys may still have to be drawn.

    Raises:
        ValueError, FileNotFoundError: none is named or found, a name is unknown, or its folders are not there.
    """
    names, root = settings["data"], settings["data.root"]
    toys = [settings[key] for key in OF_TOYS]
    if TOYS not in names and toys != [SETTINGS[key] for key in OF_TOYS]:
        raise ValueError(f"{', '.join(OF_TOYS)} are for data={TOYS} only; leave them out")
    if not (names or root):
        raise ValueError(f"give data.root=FOLDER of the benchmarks, or data={TOYS}, which are drawn")
    if not names:
        return benchmarks_below(root)
    absent = []
    for name in names:
        if name == TOYS:
            check_settings(*toys)
            continue
        try:
            find_folder(Path(root or "").expanduser(), find_benchmark(name))
        except FileNotFoundError as error:
            absent.append(str(error))
    if absent:
        raise FileNotFoundError("; ".join(absent))
    return list(dict.fromkeys(names))


def variant_to_export(name: str | None, asked: Sequence[Variant]) -> Variant | None:
    """Returns the score and temperature that `--export NAME` means; None without a name.

    Raises:
        ValueError: not one of those that are computed, or several, or h5py is missing.
    """
    if name is None:
        return None
    chosen = [variant for variant in asked if variant[0] == name]
    if not chosen:
        raise ValueError(f"--export {name}: name one of scores={[name for name, _ in asked]}")
    if len(chosen) > 1:
        raise ValueError(f"--export {name}: there are {len(chosen)} temperatures, give one with temperatures=[1.0]")
    if find_spec("h5py") is None:
        raise ValueError("--export needs h5py: pip install h5py")
    return chosen[0]
