"""Tests a saved detector of morphed faces: D-EER, MACER at fixed BPCER, and a DET curve."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import morph_checkout  # noqa: F401
from morph.arguments import add_overrides, overrides_in
from morph.saved import saved_settings

from eomt.command_line import reports_errors
from eomt.flags import script_parser


@reports_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Everything but where the data are comes from the saved detector; what contradicts it is an error."""
    parser = script_parser(__doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="the folder model/ of a training")
    parser.add_argument(
        "--output", type=Path, help="for scores.csv, metrics.json and det.png; default: test/ beside it"
    )
    add_overrides(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = saved_settings(args.model_path, overrides_in(args))
    settings.check_files()

    from morph.metrics import metrics_table
    from morph.running import test

    output = args.output or args.model_path.absolute().parent / "test"
    print(metrics_table(test(args.model_path, settings, output)))
    print(f"scores, metrics and DET curve: {output}")


if __name__ == "__main__":
    sys.exit(main())
