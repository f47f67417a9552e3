"""What the command lines have in common."""

import argparse
from pathlib import Path

from morph.settings import ADAPTER, Settings

CONFIG = Path(__file__).parents[2] / "configs" / "drawn.yaml"


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`--override NAME=VALUE ...`, also several times, and short flags for what an adapter carries."""
    parser.add_argument(
        "--override", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="for example lora_r=8"
    )
    for name in ADAPTER:
        parser.add_argument(f"--{name}", metavar="VALUE", help=f"the same as --override {name}=VALUE")


def overrides_in(args: argparse.Namespace) -> list[str]:
    """All overrides of a command line, the short flags last."""
    short = {name: getattr(args, name) for name in ADAPTER}
    return args.override + [f"{name}={value}" for name, value in short.items() if value is not None]


def count(settings: Settings) -> int:
    """Training images, for preset=auto."""
    from morph.data import count_training_images

    settings.check_files()
    return count_training_images(settings)
