"""Turns an export of COCO, Label Studio or CVAT into masks and a class file."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.files import check_place
from eomt.flags import add_output_dir, output_dir, script_parser, script_words

EXAMPLES = """examples:
  python scripts/import_masks.py instances.json photos/ labels/
  python scripts/import_masks.py label_studio.json photos/ labels/ \\
      --unannotated background
  python scripts/import_masks.py annotations.xml frames/ labels/ --on-top later

Writes OUT/masks/, a PNG of ids for each image, and OUT/classes.yaml. Then:
  python train_with_lora.py --use_lora --images photos/ \\
      --masks labels/masks/ --classes labels/classes.yaml

EXPORT is the JSON of COCO, the JSON or JSON-MIN of Label Studio, or the XML of
'CVAT for images 1.1'. Polygons and run lengths become masks, drawn by
pycocotools: pip install 'eomt-lora[import]'. Boxes and ellipses outline
nothing: their areas are ignored (255), as those of crowds are. 0 is what no
annotation covers. Of several annotations of one task the first one counts.
Exit code 1 if a picture got no mask for a fault, which is named."""

TURN = "scripts/dataset_report.py --fix-exif turns them"


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where something is wrong."""
    args = parse(argv)
    check_place(args.out)

    from rich.console import Console
    from rich.progress import track

    from eomt.data.annotations import read_export
    from eomt.data.import_masks import import_masks

    export = read_export(args.export)
    screen = Console(stderr=True)
    bar = partial(track, description="Drawing masks", console=screen, transient=True, disable=not screen.is_terminal)
    found = import_masks(export, args.images, args.out, args.unannotated, args.on_top, bar)
    tell(found, args)
    return 1 if found.faults else 0


def tell(found, args: argparse.Namespace) -> None:  # noqa: ANN001
    """Prints what was written, and what a reader of the masks must know."""
    from eomt.data.listing import SHOWN, listed

    counts = found.counts
    print(f"Wrote {found.masks:,} masks with annotations to {args.out / 'masks'}, and {args.out / 'classes.yaml'}")
    notes = [
        (len(found.empty), f"pictures without an annotation ({args.unannotated}): {listed(found.empty)}"),
        (len(found.overlaps), f"with overlapping classes, the {args.on_top} on top: {listed(found.overlaps)}"),
        (counts["boxes"], "boxes and ellipses, which outline nothing: their areas are ignored"),
        (counts["crowds"], "crowds: their areas are ignored"),
        (counts["dropped"], "shapes without an area, such as points and lines: left out"),
        (len(found.turned), f"images stored turned, which a run refuses: {listed(found.turned)}; {TURN}"),
    ]
    for count, text in notes:
        if count:
            print(f"{count:,} {text}")
    if found.faults:
        print(f"{len(found.faults):,} pictures of the export without a mask:", file=sys.stderr)
        for name, sentence in list(found.faults.items())[:SHOWN]:
            print(f"  {name}: {sentence}", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("export", type=Path, metavar="EXPORT", help="file that was exported, .json or .xml")
    add("images", type=Path, metavar="IMAGES", help="folder of the images, with its subfolders")
    add_output_dir(parser, "folder to write; it must not be there", instead_of="OUT")
    help = "pictures without an annotation become ignored (default) or background, or get no mask"
    add("--unannotated", choices=("ignore", "background", "leave"), default="ignore", help=help)
    help = "which of two areas that overlap is seen: the smaller (default), or the later in the export"
    add("--on-top", choices=("smaller", "later"), default="smaller", help=help)
    args = parser.parse_args(script_words(argv))
    args.out = output_dir(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
