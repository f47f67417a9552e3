"""A matrix of fair runs: what the command line asks for, its checks, and the sweep over its cells."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eomt.command_line import fail, one_sentence, own_process_state, path_in, quote_path, quoted
from eomt.comparison.cells import TOYS, finished, fixed, run_cell
from eomt.files import write_json
from eomt.settings.compose import ROOT, build_data, compose_run, configurations, open_data
from eomt.settings.formats import CELL, MATRIX, read_format, stamped

VARIANTS = sorted(path.stem for path in (ROOT / "configs" / "variant").glob("*.yaml") if path.stem != "base")
OWN_KEYS = {  # what a matrix sets itself, or what would make its runs unequal
    "variant": "give variants=[...]",
    "seed": "give seeds=[...]",
    "resume": "the same command again continues a matrix",
    "callbacks.save_best.keep": "a matrix keeps the network of the last step",
    "patience": "runs must have equally many steps",
    "trainer.max_time": "runs must have equally many steps",
    "trainer.fast_dev_run": "runs must be whole",
    "trainer.limit_val_batches": "runs are scored on all images",
}


def run_matrix(overrides: Sequence[str], config_name: str, check: Callable[[Any], None]) -> int:
    """Checks everything, writes `matrix.json`, and lets Hydra's launcher run the cells; returns an exit code.

    `check` raises ValueError or OSError where a training run would refuse its configuration.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    facts, launcher = parse_matrix(overrides, config_name)
    folder = Path(facts.pop("folder"))
    facts = continue_matrix(folder, facts)
    check_matrix(facts, check)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "matrix.json", stamped(MATRIX, facts))

    ConfigStore.instance().store("cell", node={"variant": "???", "seed": "???", "matrix": "???"})
    with own_process_state([sys.argv[0], "--multirun", *sweep(folder, facts), *launcher]):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # so that a mistyped launcher arrives here and not as Hydra's own page
        try:
            hydra.main(config_path=None, config_name="cell", version_base="1.3")(run_cell)()
        except HydraException as error:  # of what may be mistyped, only the launcher is left
            hint = "; pip install -e .[launchers] brings joblib and submitit" if "hydra/launcher" in str(error) else ""
            raise ValueError(one_sentence(error) + hint) from error
        except RuntimeError as error:  # a cluster's job that was ended from outside
            fail(error, 1)
    return summarise(folder, facts)


def parse_matrix(overrides: Sequence[str], config_name: str) -> tuple[dict[str, Any], list[str]]:
    """The matrix that the command line asks for, and the overrides that are for Hydra's launcher."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    sources = [word for word in overrides if word.startswith("source=")]
    overrides = [quote_path(word) for word in overrides if word not in sources]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ValueError(one_sentence(error)) from error
    facts = {
        "variants": ["none", "head", "lora_r8", "lora_r16", "full"],
        "seeds": [0],
        "source": shlex.split(sources[-1].removeprefix("source=")) if sources else [],
        "anomaly": [],
        "anomaly_root": None,
        "devices": [],
        "config_name": config_name,
        "overrides": [],
    }
    launcher, folder = [], None
    for word, override in zip(overrides, parsed, strict=True):
        key = override.key_or_group
        if key in ("variants", "seeds", "devices", "anomaly"):
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
        elif key in OWN_KEYS:
            raise ValueError(f"{word}: this is not for a matrix to be told: {OWN_KEYS[key]}")
        else:
            facts["overrides"].append(word)
    named = [word.split("=")[1] for word in facts["overrides"] if word.startswith("experiment=")]
    facts["folder"] = os.path.expanduser(folder or Path("outputs", "compare", *(named or [config_name])))
    return facts, launcher


def continue_matrix(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """A matrix goes on in its folder, with further variants, seeds and benchmarks, but with nothing else changed."""
    if not (folder / "matrix.json").is_file():
        return facts
    before = read_format(folder / "matrix.json", MATRIX)
    for key in ("config_name", "overrides", "source"):
        added = key == "source" and not before[key]  # the finished cells are evaluated there, too
        if before[key] != facts[key] and not added:
            raise ValueError(
                f"{folder} holds a matrix with {key} {before[key]}, now it is {facts[key]}: its runs would not be "
                "comparable; give the same, or another output_dir="
            )
    before = {"anomaly": [], "anomaly_root": None} | before
    for key in ("variants", "seeds", "anomaly"):
        facts[key] = [*before[key], *(value for value in facts[key] if value not in before[key])]
    facts["anomaly_root"] = facts["anomaly_root"] or before["anomaly_root"]  # which may have moved
    return facts


def check_matrix(facts: dict[str, Any], check: Callable[[Any], None]) -> None:
    """Every variant's configuration composes and passes the checks of a training run, before the first one starts.

    Adds to the facts what the overrides are for each variant: in a cell, Hydra composes nothing else.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if unknown := [name for name in facts["variants"] if name not in VARIANTS]:
        raise ValueError(f"variant {unknown[0]} is not in configs/variant: choose from {', '.join(VARIANTS)}")
    if not facts["variants"] or not all(isinstance(seed, int) for seed in facts["seeds"] or [None]):
        raise ValueError(f"variants {facts['variants']}, seeds {facts['seeds']}: at least one each, seeds are integers")
    configs: dict[str, Any] = {}  # by what they say of the data
    try:
        facts["overrides_of"] = {variant: overrides_for(variant, facts) for variant in facts["variants"]}
        for variant in facts["variants"]:
            words = [*facts["overrides_of"][variant], *fixed(variant, facts["seeds"][0], "run")]
            config = compose_run(words, facts["config_name"])
            check_variant(variant, config)
            check(config)
            configs[OmegaConf.to_yaml(config.data)] = config
        for config in configs.values():
            build_data(config, "see --help").check_files()
        if facts["source"]:
            open_data(facts["source"], config.model.img_size, batch_size=1)
        check_benchmarks(facts["anomaly"], facts["anomaly_root"])
    except OmegaConfBaseException as error:
        raise ValueError(one_sentence(error)) from error


def check_benchmarks(names: Sequence[str], root: str | None) -> None:
    """Raises ValueError or FileNotFoundError where a benchmark is unknown, not there, or has labels of another."""
    from eomt.anomaly.benchmarks import BENCHMARKS
    from eomt.anomaly.datasets import AnomalyDataset

    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"anomaly={name} is no benchmark; choose from {', '.join(BENCHMARKS)}")
        if name != TOYS and root is None:
            raise ValueError(f"anomaly={name} needs anomaly_root=FOLDER, the folder that holds {name}'s own")
        if name != TOYS:
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
    """The matrix's overrides; how objects are pasted is nothing to a variant that pastes none."""
    pastes_none = alone(variant).get("data", {}).get("cut_paste", "the experiment's") is None
    return [word for word in facts["overrides"] if not (pastes_none and word.startswith("data.cut_paste."))]


def sweep(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Hydra's overrides: seeds outside, so that a matrix that stops early has whole comparisons."""
    return [
        f"seed={','.join(map(str, facts['seeds']))}",
        f"variant={','.join(facts['variants'])}",
        f"matrix={quoted(folder.resolve())}",
        f"hydra.sweep.dir={quoted(folder.resolve())}",
        "hydra.sweep.subdir=${variant}/seed_${seed}",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


def summarise(folder: Path, facts: dict[str, Any]) -> int:
    """Says what became of the cells, and what to do next."""
    cells = [(variant, seed) for seed in facts["seeds"] for variant in facts["variants"]]
    failed = [cell for cell in cells if not finished(folder / cell[0] / f"seed_{cell[1]}", facts)]
    for variant, seed in failed:
        cell = read_format(folder / variant / f"seed_{seed}" / "cell.json", CELL, {})
        error = cell.get("error") or next(iter(cell.get("anomaly_errors", {}).values()), "did not end")
        print(f"failed: {variant}, seed {seed}: {error}")
    print(f"{len(cells) - len(failed)} of {len(cells)} cells finished in {folder}")
    print(f"next: python scripts/compare.py report {folder}")
    return 1 if failed else 0
