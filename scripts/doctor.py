"""Looks for the faults that leave a run looking fine, and prints a line for each: passed or failed, with the evidence.

Images and labels are those of the run's own data, as far as they are still there; everything else is read from the
run's folder. Nothing is trained, and no base weights are downloaded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.diagnosis.report import examine, print_findings, write_findings
from eomt.files import check_place
from eomt.flags import script_parser

EXAMPLES = """examples:
  python scripts/doctor.py outputs/lora                               # a run, on its own data
  python scripts/doctor.py outputs/lora data.root=/new/place          # which have moved
  python scripts/doctor.py outputs/lora --ckpt_path new/model         # the weights it started from have moved
  python scripts/doctor.py outputs/lora/adapter --json findings.json
  python scripts/doctor.py eomt_model/ data=cityscapes data.root=/data/cityscapes

"not checked" says what is missing, for example the run that a model/ folder comes from. Exit code 0 if nothing failed;
1 if a check failed, which the last line names; 2 if there was no looking: a mistyped command line, or no such folder,
or one that cannot be read."""


@reports_errors(2)
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a check failed; 2 with one sentence."""
    args = parse(argv)
    path = args.path.expanduser()
    if args.json:
        check_place(args.json, of_file=True)
    findings = examine(path, args.overrides, args.ckpt_path)
    print_findings(findings)
    if args.json:
        write_findings(findings, path, args.json)
    return int(any(finding.passed is False for finding in findings.values()))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, in which only the data can be chosen."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "path", type=Path, metavar="RUN_OR_MODEL", help="a run's folder, its adapter/ or model/ folder, or a checkpoint"
    )
    add(
        "overrides", nargs="*", default=[], metavar="data=NAME data.key=value", help="other data, or where they are now"
    )
    add(
        *("--ckpt_path", "--backbone_weights"),
        type=Path,
        help="the weights that the run started from, if they have moved: an EoMT, or a plain backbone",
    )
    add("--json", type=Path, metavar="FILE", help="also write the findings to this file")
    args = parser.parse_intermixed_args(argv)
    if strange := [word for word in args.overrides if not word.startswith(("data=", "data.", "experiment="))]:
        parser.error(f"{strange[0]}: only the data can be chosen here, with data=NAME data.key=value")
    return args


if __name__ == "__main__":
    sys.exit(main())
