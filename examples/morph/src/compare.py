"""Trains the detector in several ways, from the same base weights and with several seeds, and makes a table."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import morph_checkout  # noqa: F401
from morph.arguments import CONFIG, add_overrides, count, overrides_in
from morph.settings import VARIANTS, read_variants

from eomt.command_line import quiet_libraries, reports_errors
from eomt.flags import script_parser


@reports_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not there yet; writes `results.json` and `results.md`, and prints the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--config", default=CONFIG, help="a YAML file; see configs/")
    parser.add_argument("--output", type=Path, default=Path("outputs", "morph", "compare"))
    default = ["frozen", "lora", "full"]
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=default, metavar="NAME", help=f"among {', '.join(VARIANTS)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of the trainings")
    add_overrides(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cells = read_variants(args.variants, args.seeds, args.config, overrides_in(args), count)
    for settings in cells.values():
        settings.check_files()

    quiet_libraries()
    from morph.comparing import compare

    print(compare(cells, args.output))


if __name__ == "__main__":
    sys.exit(main())
