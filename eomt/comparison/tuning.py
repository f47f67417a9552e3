"""Settings that a matrix chooses for each variant, on images held out of the training images, before its runs."""

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eomt.files import read_json, write_json
from eomt.settings.compose import plain
from eomt.settings.formats import CELL, SUMMARY, TUNING, read_format, stamped

HOLD_OUT = 0.2  # of the training images
FOLDER = "tuning"  # in a matrix's folder

Settings = dict[str, int | float]
Grid = dict[str, list[int | float]]


def read_grid(text: str) -> Grid:
    """Reads `model.lr=[1e-4,3e-4] model.lora_lr=[...]`, values in ascending order.

    Raises:
        ValueError: it is written otherwise, or has a key twice, or what is no number.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    grid: Grid = {}
    try:
        parsed = OverridesParser.create().parse_overrides(shlex.split(text))
    except (OverrideParseException, ValueError) as error:
        raise ValueError(f'tune="{text}" cannot be read: write tune="model.lr=[1e-4,3e-4]"') from error
    for override in parsed:
        key, values = override.key_or_group, override.value()
        values = getattr(values, "list", values)  # 1,2 is a sweep to Hydra
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if key in grid or not numbers:
            raise ValueError(f"tune: {override.input_line} must give {key} once, with numbers in brackets")
        grid[key] = sorted(set(values))
    return grid


def grids(matrix: Mapping[str, Any]) -> dict[str, Grid]:
    """The values to try for each variant of a `matrix.json`, which were one grid for all in earlier versions."""
    tune = matrix.get("tune", {})
    of_all = any(isinstance(values, list) for values in tune.values())
    return dict.fromkeys(matrix["variants"], tune) if of_all else tune


def check_grids(tune: Mapping[str, Grid]) -> None:
    """Raises ValueError where there is nothing to choose among for a variant."""
    for variant, grid in tune.items():
        for key, values in grid.items():
            if len(values) < 2:
                raise ValueError(f"tune: {key}={values} of {variant} leaves no choice: give two numbers or more")


def widened(before: Mapping[str, Grid], now: Mapping[str, Grid]) -> dict[str, Grid]:
    """The values to try for each variant of a matrix that goes on: what was tried before, and further ones.

    A variant of before may get values for some of its settings, another one gets the same settings as the others.

    Raises:
        ValueError: other settings are given than before, or none.
    """
    keys = {key for grid in before.values() for key in grid}
    for name, grid in now.items() if keys else ():
        if not (keys >= set(grid) if name in before else keys == set(grid)):
            raise ValueError(
                f"that chooses {', '.join(sorted(keys))}, and tune= gives {name} {', '.join(grid)}: give the same"
            )
    if bool(keys) != bool(now):
        words = f"that chooses {', '.join(sorted(keys))}: give tune= again" if keys else "without tune=: leave it out"
        raise ValueError(words)
    wider = {
        name: {key: sorted({*before.get(name, {}).get(key, ()), *values}) for key, values in grid.items()}
        for name, grid in now.items()
    }
    return {**before, **{name: {**before.get(name, {}), **grid} for name, grid in wider.items()}}


def grid_for(grid: Mapping[str, Sequence[int | float]], config: Any, own: Any) -> list[Settings]:
    """The settings to try for one variant: all combinations of those that mean something to it.

    Args:
        grid: from `read_grid`.
        config: the variant's, composed.
        own: what the variant's file says, which is what its name means and is not tuned.
    """
    from omegaconf import OmegaConf

    frozen = config.model.use_lora or "backbone" in (config.model.get("freeze") or ())

    def matters(key: str) -> bool:
        without_adapters = key.startswith("model.lora_") and not config.model.use_lora
        without_decay = key.startswith("model.llrd") and frozen
        return not (without_adapters or without_decay) and OmegaConf.select(own, key) is None

    keys = [key for key in grid if matters(key)]
    if config.trainer.max_steps == 0 or not keys:
        return []
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(grid[key] for key in keys))]


def name_trials(variant: str, trials: Sequence[Settings], before: Mapping[str, Settings]) -> dict[str, Settings]:
    """Folders of a variant's trials in a matrix, those of before with further ones after them."""
    new = [settings for settings in trials if settings not in before.values()]
    return {**before, **{f"{FOLDER}/{variant}/trial_{len(before) + k}": settings for k, settings in enumerate(new)}}


def trial_words(settings: Settings, config: Any) -> list[str]:
    """Overrides of one trial: the settings, the images held out, and half the steps of a run of the matrix."""
    trainer = plain(config)["trainer"]
    unit = "max_steps" if trainer["max_steps"] > 0 else "max_epochs"
    half = f"trainer.{unit}={math.ceil(trainer[unit] / 2)}"
    return [*setting_words(settings), f"data.hold_out={HOLD_OUT}", half, "callbacks.samples.every_n_epochs=0"]


def setting_words(settings: Settings) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def chosen_settings(matrix: Path, variant: str) -> Settings:
    """What was chosen for a variant of the matrix in this folder; nothing where nothing was tuned."""
    return read_format(matrix / FOLDER / f"{variant}.json", TUNING, {}).get("chosen", {})


def settled(matrix: Path, variant: str, settings: Settings) -> bool:
    """Whether a variant's choice in this matrix was made with a trial of these settings, failed or not."""
    trials = read_format(matrix / FOLDER / f"{variant}.json", TUNING, {}).get("trials", [])
    return any(trial["settings"] == settings for trial in trials)


def choose_settings(matrix: Path, variant: str, trials: Mapping[str, Settings]) -> None:
    """Writes down the settings of a variant's best trial, unless they are chosen already among the same trials.

    Args:
        matrix: its folder.
        variant: its name.
        trials: settings by the trial's folder in the matrix.

    Raises:
        ValueError: a trial has not ended, none has a score, or runs stand on what was the best of fewer trials.
    """
    if all(settled(matrix, variant, settings) for settings in trials.values()):
        return
    results = [trial_result(matrix / folder, settings) for folder, settings in trials.items()]
    if any(result["miou"] is None and result["error"] is None for result in results):
        raise ValueError(f"a trial of {variant} has not ended: the same command goes on with it")
    scored = [result for result in results if result["miou"] is not None]
    if not scored:
        raise ValueError(f"no trial has a score; the first says: {results[0]['error']}")
    best = max(scored, key=lambda result: result["miou"])["settings"]
    before = chosen_settings(matrix, variant)
    if before not in ({}, best) and any((matrix / variant).rglob("cell.json")):
        then, now = (", ".join(setting_words(settings)) for settings in (before, best))
        raise ValueError(
            f"{now} is better than {then}, on which the runs in {matrix / variant} stand: move this folder to another "
            "place, and the same command trains them with what is better"
        )
    folder = next(folder for folder, settings in trials.items() if settings == best)
    summary = read_format(matrix / folder / "summary.json", SUMMARY)
    facts = {
        "variant": variant,
        "chosen": best,
        "edges": edges(best, list(trials.values())),
        "trials": results,
        "hold_out": HOLD_OUT,
        "seed": summary.get("seed"),
        "data": summary.get("data"),
    }
    write_json(matrix / FOLDER / f"{variant}.json", stamped(TUNING, facts))


def trial_result(folder: Path, settings: Settings) -> dict[str, Any]:
    """Settings, mIoU on the held-out images, steps, and why there is no score; neither where it has not ended."""
    summary, cell = read_format(folder / "summary.json", SUMMARY, {}), read_format(folder / "cell.json", CELL, {})
    miou = summary.get("miou") if summary.get("status") == "finished" else None
    error = cell.get("error") if miou is None else None
    return {"settings": settings, "miou": miou, "steps": summary.get("steps"), "error": error}


def edges(chosen: Settings, tried: Sequence[Settings]) -> dict[str, str]:
    """Says of each setting whose value is the lowest or the highest that was tried: a better one may lie beyond."""
    found = {}
    for key, value in chosen.items():
        values = {settings[key] for settings in tried}
        if value in (min(values), max(values)):
            found[key] = "lowest" if value == min(values) else "highest"
    return found


def edge_words(tuning: Mapping[str, Any], key: str) -> str:
    """The end of a choice of this setting in a sentence: ` (the highest that was tried)`, or nothing."""
    edge = tuning.get("edges", {}).get(key)
    return f" (the {edge} that was tried)" if edge else ""


def read_tuning(matrix: Path) -> list[dict[str, Any]]:
    """What was chosen in a matrix, by variant in the order of its trials; nothing where nothing was tuned."""
    order = list(read_json(matrix / "matrix.json", {}).get("variants", []))
    files = {path.stem: path for path in (matrix / FOLDER).glob("*.json")}
    return [read_format(files[name], TUNING) for name in order if name in files]
