"""Trains the detector in several ways, from the same base weights and with several seeds, and makes a table."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import morph_checkout  # noqa: F401
from morph.arguments import CONFIG, add_overrides, overrides_in
from morph.settings import VARIANTS, read_settings

from eomt.command_line import quiet_libraries, reports_errors
from eomt.files import write_json, write_text


@reports_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not there yet; writes `results.json` and `results.md`, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG, help="a YAML file; see configs/")
    parser.add_argument("--output", type=Path, default=Path("outputs", "morph", "compare"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["frozen", "lora", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add_overrides(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = overrides_in(args)
    cells = {
        (variant, seed): read_settings(args.config, [*words, *VARIANTS[variant], f"seed={seed}"])
        for variant in args.variants
        for seed in args.seeds
    }
    for settings in cells.values():
        settings.check_files()

    quiet_libraries()
    from morph.comparing import compare, results_table

    results = compare(cells, args.output)
    write_json(args.output / "results.json", results)
    write_text(args.output / "results.md", results_table(results))
    print(results_table(results))


if __name__ == "__main__":
    sys.exit(main())
