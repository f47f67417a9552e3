"""Reads every file of a data set and reports what is in it, and all that is wrong."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import path_in, reports_errors
from eomt.files import check_place
from eomt.flags import add_output_dir, script_parser, script_words
from eomt.settings.compose import datasets_known, open_data_with_faults
from eomt.suggestions import did_you_mean

EXAMPLES = """examples:
  python scripts/dataset_report.py data=toy_streets --split val
  python scripts/dataset_report.py data=cityscapes data.root=/data/cityscapes \\
      data.num_workers=8
  python scripts/dataset_report.py --init photos/ masks/ > classes.yaml
  python scripts/dataset_report.py --init photos/ masks/ \\
      "data.mask_template={name}_mask.png" > classes.yaml
  python scripts/dataset_report.py data=folder data.images=photos/ \\
      data.masks=masks/ data.classes=classes.yaml --fix-exif

Writes report.md, counts.json and grid.png. --init writes nothing but a class
file, to standard output. Exit code 1 if a file is wrong or has no partner, 2 if
the data set cannot be read at all.

--fix-exif writes images that are stored turned (EXIF) anew, as PNG, so that no
pixel changes: turned, where the mask has the size of the image as it is seen;
without the tag alone, where it has the size of the image as it is stored. Where
both sizes are the same it leaves them alone: look, and say upright or stored.
The original stays beside each as NAME.orig; nothing is deleted."""


@reports_errors(2)
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a file is wrong, or 2 with one sentence."""
    args = parse(argv)
    if args.init:
        return init(*args.init, args.overrides)
    if args.output_dir:
        check_place(args.output_dir)
    name, datamodule, lonely = open_data_with_faults(args.overrides)
    if args.fix_exif and datamodule and fix(datamodule, args.fix_exif):
        name, datamodule, lonely = open_data_with_faults(args.overrides)

    from eomt.reporting.dataset_report import print_faults, report_dataset

    if datamodule is None:
        print_faults({"pairs": lonely}, {})
        return 1
    out = args.output_dir or Path("outputs", "dataset_report", name)
    splits = ("train", "val") if args.split == "all" else (args.split,)
    whole = report_dataset(name, datamodule, out, splits, lonely)
    print(f"Wrote report.md, counts.json and grid.png to {out}")
    return 0 if whole else 1


def init(images: Path, masks: Path, overrides: Sequence[str]) -> int:
    """Prints a class file for these masks, and to standard error what is wrong with them."""
    from rich.console import Console
    from rich.progress import track

    from eomt.data.class_file import class_file, collect_values, pairs_to_describe

    screen = Console(stderr=True)
    quiet = not screen.is_terminal
    pairs, faults = pairs_to_describe(images, masks, **templates(overrides))
    found = collect_values(track(pairs, description="Reading masks", console=screen, transient=True, disable=quiet))
    print(class_file(found), end="")
    wrong = faults | ({"masks that cannot be read": found.wrong} if found.wrong else {})
    for kind, names in wrong.items():
        print(f"{len(names):,} {kind}, the first: {next(iter(names.values()))}", file=sys.stderr)
    return 1 if wrong else 0


def templates(overrides: Sequence[str]) -> Mapping[str, str]:
    """How files are called, from `data.mask_template=...`; raises ValueError for anything else."""
    found = {}
    for word in overrides:
        key, _, value = word.removeprefix("data.").partition("=")
        if key not in ("image_template", "mask_template"):
            known = ("data.image_template", "data.mask_template")
            raise ValueError(f"--init knows {' and '.join(known)}, not {word}{did_you_mean(word, known)}")
        found[key] = path_in(value)
    return found


def fix(datamodule, view: str) -> bool:  # noqa: ANN001
    """Writes turned images anew and tells which; returns whether there are any."""
    from eomt.data.upright import turn_images

    done = turn_images([*datamodule.train_set.samples, *datamodule.val_set.samples], view)
    for path in done.written:
        print(f"wrote {path}, upright and without EXIF turn; the original is beside it, as .orig")
    for name, reason in done.left.items():
        print(f"left {name} alone: {reason}")
    return bool(done.written)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, which names a data set."""
    parser = script_parser(__doc__, EXAMPLES, usage="dataset_report.py data=NAME [data.key=value ...] [options]")
    add = parser.add_argument
    add("overrides", nargs="*", metavar="data=NAME data.key=value", help="as for train_with_lora.py")
    add_output_dir(parser, "folder to write to (default: outputs/dataset_report/NAME)")
    add("--split", choices=("train", "val", "all"), default="all")
    metavar = ("IMAGES", "MASKS")
    add("--init", nargs=2, type=Path, metavar=metavar, help="write a class file from the values in the masks")
    views = ("auto", "upright", "stored")
    help = "write images that are stored turned anew; see below (auto where no word follows)"
    add("--fix-exif", nargs="?", choices=views, const="auto", help=help)
    args = parser.parse_intermixed_args(script_words(argv))
    if not args.init and not any(override.startswith(("data=", "experiment=")) for override in args.overrides):
        known = ", data=".join(datasets_known())
        parser.error(
            f"name a dataset: data={known}; two folders of your own are data=folder data.images=... "
            "data.masks=... data.classes=..., or --init IMAGES MASKS for a class file"
        )
    if args.fix_exif and (args.init or "data=folder" not in args.overrides):
        parser.error("--fix-exif goes with data=folder")
    ending = [word for word in args.overrides if word.startswith("data.image_template=") and "." in word.split("=")[1]]
    if args.fix_exif and ending:
        parser.error(f"--fix-exif writes PNG, which {ending[0]} would not find: leave the ending out")
    return args


if __name__ == "__main__":
    sys.exit(main())
