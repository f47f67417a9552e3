"""A matrix of fair runs: what the command line asks for, its checks, and the sweep over its cells."""

import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eomt.command_line import fail, one_sentence, own_process_state, path_in, quote_path, quoted, unquoted
from eomt.comparison.cells import TOYS, finished, fixed, run_cell, title
from eomt.comparison.tuning import (
    Settings,
    check_grids,
    choose_settings,
    edge_words,
    grid_for,
    grids,
    name_trials,
    read_grid,
    read_tuning,
    setting_words,
    trial_words,
    widened,
)
from eomt.files import write_json
from eomt.places import CONFIGS, as_typed
from eomt.settings.compose import build_data, check_named_data, compose_run, configurations, matrix_name, open_data
from eomt.settings.formats import CELL, MATRIX, read_format, stamped
from eomt.settings.hydra_errors import explain_config

VARIANTS = sorted(path.stem for path in (CONFIGS / "variant").glob("*.yaml") if path.stem != "base")
SOURCE = 'source="experiment=NAME data.root=..." or source="data=NAME data.key=value ..."'
OWN_KEYS = {  # what a matrix sets itself, or what would make its runs unequal
    "variant": "give variants=[...]",
    "seed": "give seeds=[...]",
    "resume": "the same command again continues a matrix",
    "callbacks.save_best.keep": "a matrix keeps the network of the last step",
    "patience": "runs must have equally many steps",
    "trainer.max_time": "runs must have equally many steps",
    "trainer.fast_dev_run": "runs must be whole",
    "trainer.limit_val_batches": "runs are scored on all images",
    "data.train_images": "give images=[...]",
    "data.hold_out": 'give tune="KEY=[...]"',
}


def run_matrix(overrides: Sequence[str], config_name: str, check: Callable[[Any], None]) -> int:
    """Checks everything, writes `matrix.json`, and lets Hydra's launcher run the cells; returns an exit code.

    `check` raises ValueError or OSError where a training run would refuse its configuration.
    """
    facts, launcher = parse_matrix(overrides, config_name)
    folder = Path(facts.pop("folder"))
    facts = continue_matrix(folder, facts)
    check_matrix(facts, check)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "matrix.json", stamped(MATRIX, facts))
    tell_once(facts)
    trials = {name: cell for name, cell in facts["cells"].items() if "trial" in cell}
    unsettled: dict[str, str] = {}  # variants without a choice, and why
    if trials:
        launch(folder, trials, launcher)
    for variant in dict.fromkeys(cell["variant"] for cell in trials.values()):
        try:
            choose_settings(folder, variant, trials_of(variant, trials))
        except ValueError as error:
            unsettled[variant] = str(error)
    tell_choices(folder)
    runs = {name: cell for name, cell in facts["cells"].items() if name not in trials}
    if ready := [name for name, cell in runs.items() if cell["variant"] not in unsettled]:
        launch(folder, ready, launcher)
    return summarise(folder, facts, unsettled)


def launch(folder: Path, cells: Iterable[str], launcher: Sequence[str]) -> None:
    """Lets Hydra's launcher run some of the matrix's cells."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    ConfigStore.instance().store("cell", node={"cell": "???", "matrix": "???"})
    with own_process_state([sys.argv[0], "--multirun", *sweep(folder, cells), *launcher]):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # so that a mistyped launcher arrives here and not as Hydra's own page
        try:
            hydra.main(config_path=None, config_name="cell", version_base="1.3")(run_cell)()
        except HydraException as error:  # of what may be mistyped, only the launcher is left
            hint = (
                "; pip install 'eomt-lora[launchers]' brings joblib and submitit"
                if "hydra/launcher" in str(error)
                else ""
            )
            raise ValueError(explain_config(error) + hint) from error
        except RuntimeError as error:  # a cluster's job that was ended from outside
            fail(error, 1)


def parse_matrix(overrides: Sequence[str], config_name: str) -> tuple[dict[str, Any], list[str]]:
    """The matrix that the command line asks for, and the overrides that are for Hydra's launcher."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    sources, tunes = ([word for word in overrides if word.startswith(key)] for key in ("source=", "tune="))
    overrides = [quote_path(word) for word in overrides if word not in (*sources, *tunes)]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ValueError(explain_config(error)) from error
    facts = {
        "variants": ["none", "head", "lora_r8", "lora_r16", "full"],
        "seeds": [0],
        "images": ["all"],
        "tune": read_grid(" ".join(word.removeprefix("tune=") for word in tunes)),
        "source": read_source(" ".join(word.removeprefix("source=") for word in sources)),
        "anomaly": [],
        "anomaly_root": None,
        "devices": [],
        "config_name": config_name,
        "overrides": [],
    }
    launcher, folder = [], None
    for word, override in zip(overrides, parsed, strict=True):
        key = override.key_or_group
        if key in ("variants", "seeds", "images", "devices", "anomaly"):
            value = override.value()
            value = getattr(value, "list", value)  # 0,1,2 is a sweep to Hydra
            facts[key] = list(dict.fromkeys(value if isinstance(value, (list, tuple)) else [value]))
        elif key == "output_dir":
            folder = path_in(word.partition("=")[2])
        elif key == "anomaly_root":
            path = path_in(word.partition("=")[2])
            facts[key] = path and os.path.abspath(os.path.expanduser(path))
        elif key.startswith("hydra"):
            launcher.append(word)
        elif key.startswith("source."):
            raise ValueError(f"{word}: write {SOURCE}")
        elif key in OWN_KEYS:
            raise ValueError(f"{word}: this is not for a matrix to be told: {OWN_KEYS[key]}")
        else:
            facts["overrides"].append(word)
    facts["tune"] = dict.fromkeys(facts["variants"], facts["tune"]) if facts["tune"] else {}
    folder = folder or Path("outputs", "compare", matrix_name(facts["overrides"], config_name))
    facts["folder"] = os.path.expanduser(folder)
    return facts, launcher


def read_source(text: str) -> list[str]:
    """Reads `experiment=NAME data.root=...`: also in brackets, with commas between, or a name alone.

    Raises:
        ValueError: a word that is none of this.
    """
    text = unquoted(text.strip())  # of quotes within those that the shell took off
    text = re.sub(
        r",\s*(?=[\w./]+=)", " ", text.strip().removeprefix("[").removesuffix("]") if text[:1] == "[" else text
    )
    words = []
    for word in shlex.split(text):
        if "=" not in word:
            groups = [group for group in ("experiment", "data") if (CONFIGS / group / f"{word}.yaml").is_file()]
            if not groups:
                raise ValueError(f'source="{text}": {word} is no data set or experiment; write {SOURCE}')
            word = f"{groups[0]}={word}"
        words.append(word)
    return words


def check_source(words: Sequence[str]) -> None:
    """Raises ValueError where the data that start weights come from cannot be had, as far as is known without torch."""
    try:
        if words:
            check_named_data(words)
    except (ValueError, OSError) as error:
        whole = f'source="{" ".join(words)}"'
        raise ValueError(f"{whole}: {error}; what describes this data stands within its quotes") from error


def continue_matrix(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """A matrix goes on in its folder, with further variants, seeds, benchmarks, and values to try for those named.

    Raises:
        ValueError: anything else is changed.
    """
    if not (folder / "matrix.json").is_file():
        return facts
    before = read_format(folder / "matrix.json", MATRIX)
    before = {"anomaly": [], "anomaly_root": None, "images": ["all"], "tune": {}, "cells": {}} | before
    keys = [word.partition("=")[0] for word in facts["overrides"]]
    if sorted(before["overrides"]) == sorted(facts["overrides"]) and len(set(keys)) == len(keys):
        facts["overrides"] = before["overrides"]  # in which order they stand means nothing
    for key in ("config_name", "overrides", "source"):
        added = key == "source" and not before[key]  # the finished cells are evaluated there, too
        if before[key] != facts[key] and not added:
            raise ValueError(
                f"{folder} holds a matrix with {key} {before[key]}, now it is {facts[key]}: its runs would not be "
                "comparable; give the same, or another output_dir="
            )
    for key in ("variants", "seeds", "images", "anomaly"):
        facts[key] = [*before[key], *(value for value in facts[key] if value not in before[key])]
    facts["anomaly_root"] = facts["anomaly_root"] or before["anomaly_root"]  # which may have moved
    try:
        facts["tune"] = widened(grids(before), facts["tune"])
    except ValueError as error:
        raise ValueError(f"{folder} holds a matrix {error}, or another output_dir=") from error
    return facts | {"cells": before["cells"]}


def check_matrix(facts: dict[str, Any], check: Callable[[Any], None]) -> None:
    """Every variant's configuration composes and passes the checks of a training run, before the first one starts.

    Adds the cells to the facts, each with its overrides: in a cell, Hydra composes nothing else.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if unknown := [name for name in facts["variants"] if name not in VARIANTS]:
        raise ValueError(f"variant {unknown[0]} is not in configs/variant: choose from {', '.join(VARIANTS)}")
    if not facts["variants"] or not all(isinstance(seed, int) for seed in facts["seeds"] or [None]):
        raise ValueError(f"variants {facts['variants']}, seeds {facts['seeds']}: at least one each, seeds are integers")
    if not facts["images"] or not all(n == "all" or (isinstance(n, int) and n > 0) for n in facts["images"]):
        raise ValueError(f"images {facts['images']}: numbers of training images, or all")
    check_grids(facts["tune"])
    configs: dict[str, Any] = {}  # by what they say of the data
    check_source(facts["source"])
    try:
        facts["cells"] = plan(facts)
        for cell in (cell for cell in facts["cells"].values() if cell["seed"] == facts["seeds"][0]):
            config = compose_run([*cell["words"], *fixed(cell, "run")], facts["config_name"])
            if "trial" not in cell:
                check_variant(cell["variant"], config)
            check(config)
            configs[OmegaConf.to_yaml(config.data)] = config
        for config in configs.values():
            build_data(config, "see --help").check_files()
        if facts["source"]:
            open_data(facts["source"], config.model.img_size, batch_size=1)
        check_benchmarks(facts["anomaly"], facts["anomaly_root"])
    except OmegaConfBaseException as error:
        raise ValueError(one_sentence(error)) from error


def plan(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of a matrix by their folders in it, in the order in which they run: first the trials of `tune=`.

    Seeds come outside, so that a matrix that stops early has whole comparisons. What depends on no seed runs once.
    Where a matrix goes on, trials keep their folders.
    """
    words = {variant: overrides_for(variant, facts) for variant in facts["variants"]}
    cells: dict[str, dict[str, Any]] = {}
    once = set()
    for variant in facts["variants"]:
        first, last = ({"variant": variant, "seed": facts["seeds"][k], "images": "all"} for k in (0, -1))
        config = compose_run([*words[variant], *fixed(first, "run")], facts["config_name"])
        if config.trainer.max_steps == 0:
            other = compose_run([*words[variant], *fixed(last, "run")], facts["config_name"])
            once |= {variant} if runs_once(config, other) else set()
        grid, before = facts["tune"].get(variant, {}), trials_of(variant, facts.get("cells", {}))
        for name, settings in name_trials(variant, grid_for(grid, config, alone(variant)), before).items():
            cells[name] = first | {"words": [*words[variant], *trial_words(settings, config)], "trial": settings}
    for seed, images, variant in itertools.product(facts["seeds"], facts["images"], facts["variants"]):
        if variant in once and seed != facts["seeds"][0]:
            continue
        part = [] if images == "all" else [f"images_{images}"]
        subset = [] if images == "all" else [f"data.train_images={images}"]
        cell = {"variant": variant, "seed": seed, "images": images, "words": [*words[variant], *subset]}
        cells["/".join([variant, *part, f"seed_{seed}"])] = cell
    return cells


def trials_of(variant: str, cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Settings]:
    """The settings of a variant's trials among a matrix's cells, by their folders."""
    return {name: cell["trial"] for name, cell in cells.items() if cell.get("variant") == variant and "trial" in cell}


def tell_once(facts: dict[str, Any]) -> None:
    """Says which variants run with the first seed alone."""
    first, *others = facts["seeds"]
    for variant in facts["variants"] if others else ():
        if {cell["seed"] for cell in facts["cells"].values() if cell["variant"] == variant} == {first}:
            print(f"== {variant} depends on no seed, runs with seed {first} alone", flush=True)


def runs_once(config: Any, of_another_seed: Any) -> bool:
    """Whether a run without steps comes out the same whatever its seed: all of its weights are from one file."""
    whole = bool(config.model.ckpt_path) and config.model.load_ckpt_class_head
    return whole and all(config[part] == of_another_seed[part] for part in ("model", "data"))


def check_benchmarks(names: Sequence[str], root: str | None) -> None:
    """Raises ValueError with all that is wrong: a benchmark is unknown, not there, or has labels of another."""
    faults = []
    for name in names:
        try:
            check_benchmark(name, root)
        except (ValueError, OSError) as error:
            faults.append(str(error))
    if faults:
        raise ValueError("; and ".join(faults))


def check_benchmark(name: str, root: str | None) -> None:
    """Raises ValueError or FileNotFoundError where a benchmark is unknown, not there, or has labels of another."""
    from eomt.anomaly.benchmarks import BENCHMARKS
    from eomt.anomaly.datasets import AnomalyDataset

    if name not in BENCHMARKS:
        raise ValueError(f"anomaly={name} is no benchmark; choose from {', '.join(BENCHMARKS)}")
    if name == TOYS:
        return
    if root is None:
        raise ValueError(f"anomaly={name} needs anomaly_root=FOLDER, the folder that holds {name}'s own")
    AnomalyDataset(root, name).check()


def check_variant(variant: str, config: Any) -> None:
    """Raises ValueError where an override makes of a variant something else than its name says."""
    from omegaconf import OmegaConf

    wanted = OmegaConf.merge(config, alone(variant))
    for part in ("model", "trainer", "data"):
        found = OmegaConf.to_container(config[part], resolve=True)
        for key, value in OmegaConf.to_container(wanted[part], resolve=True).items():
            if value != found.get(key):
                raise ValueError(
                    f"{part}.{key}={found.get(key)} makes of variant {variant}, which has {value}, something "
                    "else than its name says: write it as a variant of its own in configs/variant/"
                )


def alone(variant: str) -> Any:
    """Reads the settings in a variant's file."""
    from hydra import compose

    with configurations():
        return compose(overrides=[f"+variant={variant}"])


def overrides_for(variant: str, facts: dict[str, Any]) -> list[str]:
    """The matrix's overrides without those that are nothing to a variant: how it pastes, how long it trains."""
    own = alone(variant)
    pastes_none = own.get("data", {}).get("cut_paste", "the experiment's") is None
    trains_nothing = own.get("trainer", {}).get("max_steps") == 0
    nothing = ("data.cut_paste.",) * pastes_none + ("trainer.max_steps=",) * trains_nothing
    return [word for word in facts["overrides"] if not word.startswith(nothing)]


def sweep(folder: Path, cells: Iterable[str]) -> list[str]:
    """Hydra's overrides."""
    return [
        f"cell={','.join(cells)}",
        f"matrix={quoted(folder.resolve())}",
        f"hydra.sweep.dir={quoted(folder.resolve())}",
        "hydra.sweep.subdir=${cell}",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


def summarise(folder: Path, facts: dict[str, Any], unsettled: Mapping[str, str]) -> int:
    """Says what became of the cells, those without chosen settings too, and what to do next."""
    cells = {name: cell for name, cell in facts["cells"].items() if "trial" not in cell}
    failed = [name for name in cells if cells[name]["variant"] in unsettled or not finished(folder / name, facts)]
    for name in failed:
        cell = read_format(folder / name / "cell.json", CELL, {})
        error = unsettled.get(cells[name]["variant"]) or cell.get("error")
        error = error or next(iter(cell.get("anomaly_errors", {}).values()), "did not end")
        print(f"failed: {title(cells[name])}: {error}")
    tell_choices(folder)
    print(f"{len(cells) - len(failed)} of {len(cells)} cells finished in {folder}")
    print(as_typed(f"next: python scripts/compare.py report {folder}"))
    return 1 if failed else 0


def tell_choices(folder: Path) -> None:
    """Says what was chosen for each variant, and that a better value may lie beyond the edge of what was tried."""
    tunings = read_tuning(folder)
    for tuning in tunings:
        chosen = ", ".join(
            word + edge_words(tuning, key)
            for key, word in zip(tuning["chosen"], setting_words(tuning["chosen"]), strict=True)
        )
        print(f"chosen for {tuning['variant']}, on held-out training images: {chosen}", flush=True)
    if at_edges := ",".join(tuning["variant"] for tuning in tunings if tuning["edges"]):
        words = f'the same command with "variants=[{at_edges}]" and further values in tune= tries them'
        print(f"a better value may lie beyond the edge of what was tried: {words}", flush=True)
