"""What each rank keeps of a full fine-tune: of the change of its weights, and of its mIoU.

python benchmarks/extraction.py outputs/toy_night_full outputs/toy_source/model benchmarks/extraction.json \
    --name "toy night, full fine-tune" --plot docs/images/extraction.png

A file keeps what it has of other names.
"""

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

from eomt.diagnosis.extraction import PLOT, extract
from eomt.files import read_json, write_json
from eomt.reporting.run_summary import provenance


def main() -> None:
    """Extracts an adapter, keeps what is told of it, and adds it to the file."""
    args = parse()
    about = provenance([0])
    with TemporaryDirectory() as folder:
        found = extract(args.full, args.base, Path(folder, "out"), args.rank, overrides=args.overrides)
        if args.plot:
            shutil.copyfile(Path(folder, "out", PLOT), args.plot)
    about |= {name: found[name] for name in ("kept", "miou", "left_out", "left_out_share")}
    about["layers"] = len(found["layers"])
    parts = read_json(args.out, {"parts": {}})["parts"]
    write_json(args.out, {"what": __doc__.splitlines()[0], "parts": parts | {args.name: about}})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("full", type=Path)
    add("base")
    add("out", type=Path)
    add("overrides", nargs="*", default=[], metavar="data.key=value")
    add("--name", required=True, help="of the network in the table")
    add("--rank", type=int, default=16)
    add("--plot", type=Path)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
