"""Runs the doctor on a run's folder with the data that belong to it, and shows or writes its findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yaml import YAMLError

from eomt.command_line import one_sentence, quiet_libraries
from eomt.files import write_json
from eomt.inference.saved import find_weights, run_of
from eomt.settings.compose import check_data_for, data_of_run, names_data, open_data
from eomt.settings.hub import check_ckpt_path

if TYPE_CHECKING:  # mistakes are told before torch is there
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.diagnosis.checks import Finding

COLORS = {"passed": "green", "failed": "bold red", "not checked": "yellow"}


def examine(path: Path, overrides: Sequence[str] = (), ckpt_path: Path | None = None) -> dict[str, Finding]:
    """Runs every check on a run, and returns the findings by name.

    Args:
        path: a run's folder, its adapter/ or model/ folder, a checkpoint, or a file of weights.
        overrides: `data=NAME data.key=value`: other data than the run's, or where they are now.
        ckpt_path: the weights that the run started from, if they have moved.

    Raises:
        ValueError, OSError: there is nothing to look at, or data were named and are not there.
    """
    if not path.exists():
        find_weights(path)  # which says so
    check_ckpt_path(ckpt_path)
    run = run_of(path)
    data, no_data = find_data(run, overrides, path)

    from eomt.diagnosis.doctor import diagnose

    quiet_libraries()
    return diagnose(path, run, data, no_data, ckpt_path)


def find_data(run: Path, overrides: Sequence[str], path: Path) -> tuple[SegmentationDataModule | None, str]:
    """Opens the data that were named, or those of the run; without either None, and why.

    Raises:
        ValueError, OSError: data that were named and are not there.
    """
    if names_data(overrides):
        check_data_for(run, overrides)

        from eomt.diagnosis.inspection import read

        size = read(find_weights(path))[0]["hyper_parameters"].get("img_size")
        if size is None:
            raise ValueError(f"{path} holds weights without a configuration: there is nothing to compare data with")
        return open_data(overrides, size, batch_size=1)[1], ""
    try:
        return data_of_run(run, overrides)[1], ""
    except (ValueError, OSError, AttributeError, TypeError, YAMLError) as error:  # the last three: a broken config.yaml
        known = isinstance(error, (ValueError, OSError))
        why = one_sentence(error) if known else f"{run / 'config.yaml'} does not say them: {one_sentence(error)}"
        if overrides:
            raise ValueError(why) from error
        return None, why


def print_findings(findings: Mapping[str, Finding]) -> None:
    """Prints a line for each check, then how many there are of each kind, and which failed."""
    from rich.console import Console
    from rich.text import Text

    console, width = Console(highlight=False), max(map(len, findings))
    for name, finding in findings.items():
        parts = (f"{finding.result:<13}", COLORS[finding.result]), (f"{name:<{width + 2}}", "bold"), finding.evidence
        console.print(Text.assemble(*parts), soft_wrap=True)
    results = [finding.result for finding in findings.values()]
    counts = ", ".join(f"{results.count(result)} {result}" for result in COLORS)
    failed = [name for name, finding in findings.items() if finding.passed is False]
    print(counts + (f"; failed: {', '.join(failed)}" if failed else ""))


def write_findings(findings: Mapping[str, Finding], path: Path, file: Path) -> None:
    """Writes the findings about `path` as JSON."""
    checks = {name: {"result": f.result, "evidence": f.evidence} for name, f in findings.items()}
    write_json(file, {"schema_version": 1, "path": str(path), "run": str(run_of(path)), "checks": checks})
