"""Five minutes on a CPU: a tiny network learns clear weather, then night and fog, with and without LoRA."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.comparison.demo import run_demo
from eomt.files import check_place
from eomt.flags import add_output_dir, script_parser, script_words


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or the exit code of the run that failed."""
    parser = script_parser(__doc__)
    add_output_dir(parser, "default: outputs/demo/DATE")
    parser.add_argument("overrides", nargs="*", help="passed to every run, for example trainer.max_epochs=1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here, and where it is from")
    args = parser.parse_args(script_words(argv))
    if args.json:
        check_place(args.json, of_file=True)
    output_dir = args.output_dir or Path("outputs/demo") / time.strftime("%Y-%m-%d_%H-%M-%S")
    return run_demo(output_dir, args.overrides, args.json)


if __name__ == "__main__":
    sys.exit(main())
