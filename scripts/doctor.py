"""Looks for the faults that leave a run looking fine, and prints a line for each: passed or failed, with the evidence.

Images and labels are those of the run's own data, as far as they are still there; everything else is read from the
run's folder. Nothing is trained, and no base weights are downloaded.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from _data import data_of_run, open_data, run_of

from eomt.command_line import one_sentence

if TYPE_CHECKING:  # late: --help answers at once
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.diagnosis.checks import Finding

EXAMPLES = """examples:
  python scripts/doctor.py outputs/lora                               # a run, on its own data
  python scripts/doctor.py outputs/lora data.root=/new/place          # which have moved
  python scripts/doctor.py outputs/lora --ckpt_path new/model         # the weights it started from have moved
  python scripts/doctor.py outputs/lora/adapter --json findings.json
  python scripts/doctor.py eomt_model/ data=cityscapes data.root=/data/cityscapes

"not checked" says what is missing, for example the run that a model/ folder comes from. Exit code 0 if nothing failed;
1 if a check failed, which the last line names; 2 if there was no looking: a mistyped command line, or no such folder,
or one that cannot be read."""
COLORS = {"passed": "green", "failed": "bold red", "not checked": "yellow"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN_OR_MODEL", help="a run's folder, its adapter/ or model/ folder, or a checkpoint"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="data=NAME data.key=value", help="other data, or where they are now"
    )
    parser.add_argument("--ckpt_path", type=Path, help="the weights that the run started from, if they have moved")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings to this file")
    args = parser.parse_intermixed_args()
    path = args.path.expanduser()
    if strange := [word for word in args.overrides if not word.startswith(("data=", "data.", "experiment="))]:
        parser.error(f"{strange[0]}: only the data can be chosen here, with data=NAME data.key=value")

    from eomt.command_line import quiet_libraries
    from eomt.diagnosis.doctor import diagnose

    quiet_libraries()
    run = run_of(path)
    try:
        data, no_data = find_data(run, args.overrides, path)
        findings = diagnose(path, run, data, no_data, args.ckpt_path)
        show(findings)
        if args.json:
            write(findings, path, run, args.json)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(any(finding.passed is False for finding in findings.values()))


def find_data(run: Path, overrides: list[str], path: Path) -> "tuple[SegmentationDataModule | None, str]":
    """The data that were named, or those of the run; without either None, and why.

    Raises:
        ValueError, OSError: data that were named and are not there.
    """
    if any(word.startswith(("data=", "experiment=")) for word in overrides):
        from eomt.diagnosis.inspection import choose, read

        size = read(choose(path))[0]["hyper_parameters"].get("img_size")
        if size is None:
            raise ValueError(f"{path} holds weights without a configuration: there is nothing to compare data with")
        return open_data(overrides, size, batch_size=1)[1], ""
    from yaml import YAMLError

    try:
        return data_of_run(run, overrides)[1], ""
    except (ValueError, OSError, AttributeError, TypeError, YAMLError) as error:  # the last three: a broken config.yaml
        known = isinstance(error, (ValueError, OSError))
        why = one_sentence(error) if known else f"{run / 'config.yaml'} does not say them: {one_sentence(error)}"
        if overrides:
            raise ValueError(why) from error
        return None, why


def show(findings: "Mapping[str, Finding]") -> None:
    """A line for each check, then how many there are of each kind, and which failed."""
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


def write(findings: "Mapping[str, Finding]", path: Path, run: Path, file: Path) -> None:
    """The findings as JSON."""
    checks = {name: {"result": f.result, "evidence": f.evidence} for name, f in findings.items()}
    facts = {"schema_version": 1, "path": str(path), "run": str(run), "checks": checks}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
