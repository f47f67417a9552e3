"""Publishes a saved network on the Hugging Face hub: its files, a card with base, data, classes and scores, a picture.

Nothing of this machine is sent: no path, no image of the data, no log. Scores are those that scripts/evaluate.py left
in the run's folder, with intervals, and else the one of the training.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.exchange.publishing import check_login, check_picture, check_repo, data_name, stage, upload
from eomt.flags import script_parser
from eomt.inference.saved import check_artefact, run_of
from eomt.settings.hub import hub_place, named_on_hub, pinned

EXAMPLES = """examples:
  python scripts/publish.py outputs/lora/adapter user/eomt-night --dry-run
  python scripts/publish.py outputs/lora/adapter user/eomt-night --licence mit --base hf://user/eomt-day

The login is your own, of `hf auth login` or HF_TOKEN; none is taken on the command line. --dry-run needs neither a
login nor a network."""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse(argv)
    check_repo(args.repo)
    if args.base and not hub_place(args.base):
        raise ValueError(f"--base {args.base}: where others find it is meant, hf://user/name@revision/file")
    if place := named_on_hub(args.artefact):
        raise ValueError(f"{place} is on the hub already: give a folder")
    check_picture(args.picture)
    artefact = check_artefact(args.artefact)
    if not artefact.is_dir():
        raise ValueError(f"{artefact} is a checkpoint: give the adapter/ or model/ folder of its run")
    if not args.dry_run:
        check_login()

    from eomt.comparison.card_scores import known_scores

    base = args.base if args.dry_run else pinned(args.base)
    scores = known_scores(artefact, data_name(run_of(artefact)))
    with TemporaryDirectory() as folder:
        draft = Path(folder)
        facts = stage(artefact, draft, args.repo, scores, base, args.licence, args.picture)
        if facts.is_adapter and facts.base.setting:
            print(
                "warning: others have to find the base by themselves; give --base hf://user/name/file", file=sys.stderr
            )
        if args.licence == "unknown":
            print("warning: no licence, so that nobody may use it; give --licence, for example mit", file=sys.stderr)
        if args.dry_run:
            show(draft, args.repo)
            return 0
        if args.base:
            check_opens(draft)
        print(f"published: {upload(draft, args.repo, args.private)}")
    return 0


def show(draft: Path, repo: str) -> None:
    """Prints what would be sent."""
    print((draft / "README.md").read_text(encoding="utf-8"))
    for file in sorted(draft.iterdir()):
        print(f"{file.stat().st_size:>12,}  {file.name}")
    print(f"nothing was sent to {repo}: without --dry-run these files are")


def check_opens(draft: Path) -> None:
    """Opens what will be published as others will, on the base that it names; raises what they would be told."""
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    MaskClassificationSemantic.from_pretrained(draft)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("artefact", metavar="ADAPTER", type=Path, help="an adapter/ or model/ folder, or a run's folder")
    add("repo", metavar="user/name", help="the repository; it is made if it is not there")
    add("--dry-run", action="store_true", help="show the card and the files, and send nothing")
    add("--base", metavar="hf://…", help="where others find an adapter's base; it is opened on it before it is sent")
    add("--licence", "--license", default="unknown", help="the hub's name of the licence that you choose (%(default)s)")
    add("--picture", type=Path, metavar="FILE", help="a picture of your own in the place of the chart of the classes")
    add("--private", action="store_true", help="for nobody else, if the repository is new")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
