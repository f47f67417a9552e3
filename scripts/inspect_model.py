"""Shows what is in a saved network, without building it, and whether an adapter fits its base."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.files import check_place, write_json
from eomt.flags import script_parser
from eomt.inference.saved import find_weights

PLOTS = (".png", ".jpg", ".pdf", ".svg")
EXAMPLES = """examples:
  python scripts/inspect_model.py outputs/lora/adapter
  python scripts/inspect_model.py outputs/lora/checkpoints/best.ckpt --base outputs/source/model
  python scripts/inspect_model.py eomt_large_640/pytorch_model.bin
  python scripts/inspect_model.py outputs/lora --plot updates.png --json adapter.json

The base that an adapter names is checked without --base, if it is there. Exit code 0; 1 if the adapter does not fit, or
after an error."""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if an adapter does not fit its base, or after one sentence."""
    args = parse(argv)
    for path in (args.path, args.base):
        if path:
            find_weights(path)  # before torch is imported
    if args.plot and args.plot.suffix.lower() not in PLOTS:
        raise ValueError(f"--plot {args.plot}: its ending is one of {', '.join(PLOTS)}")
    for file in (args.plot, args.json):
        if file:
            check_place(file, of_file=True)

    from rich.console import Console

    from eomt.diagnosis.inspection import inspect_model
    from eomt.diagnosis.inspection_report import plot_updates, print_facts

    facts = inspect_model(args.path, args.base)
    if args.plot and not facts.get("updates"):
        raise ValueError(f"--plot draws the updates of an adapter, and {args.path} is a {facts['kind']}")
    print_facts(facts, Console(highlight=False, soft_wrap=False))
    if args.plot:
        plot_updates(facts, args.plot)
        print(f"Wrote {args.plot}")
    if args.json:
        write_json(args.json, facts)
    return int((facts.get("fit") or {}).get("fits") is False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("path", metavar="PATH", help="an adapter/ or model/ folder, a run's folder, a .ckpt, .safetensors or .bin file")
    add("--base", help="weights to check the adapter against: a file, or a model/ folder")
    add("--plot", type=Path, metavar="FILE.png", help="draw the size of each layer's update")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
