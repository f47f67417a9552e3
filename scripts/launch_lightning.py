"""Runs a training as a job on Lightning AI: checks its arguments here, then submits it from a Studio's snapshot."""

import argparse
import re
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from eomt.command_line import fail, reports_errors
from eomt.flags import script_parser, translate_flags
from eomt.launch.arguments import (
    check_training,
    check_training_matrix,
    compose_training,
    default_name,
    find_output_dir,
    read_matrix,
)
from eomt.launch.job import FOLDER, HOME, MATRIX, Job, find_machine, print_job, sdk_arguments, submit
from train_with_lora import check_composed

EXAMPLES = """Everything after -- goes to train_with_lora.py as it is.

examples:
  python scripts/launch_lightning.py --machine L4 --dry-run -- --config-name cityscapes_lora \\
      data.root=/teamspace/studios/this_studio/cityscapes model.lora_rank=16
  python scripts/launch_lightning.py --machine L4 --interruptible --max-runtime 8h -- experiment=toy_source
  python scripts/launch_lightning.py --machine A100 --studio streets --teamspace vision --org acme -- \\
      data.root=/teamspace/studios/this_studio/cityscapes
  python scripts/launch_lightning.py --machine L4 --compare -- experiment=toy_source variants=[head,full] seeds=[0,1]"""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 with one sentence; 2 for a mistyped command line, that of the training included."""
    own, arguments = split_at_dashes(sys.argv[1:] if argv is None else argv)
    args = parse(own)
    try:
        words = translate_flags(arguments)
    except ValueError as error:
        return fail(error, 2)
    output_dir = find_output_dir(words)
    try:
        asked = read_matrix(arguments) if args.compare else compose_training(words)
    except ValueError as error:
        return fail(error, 2)
    job = Job(
        name=args.name or default_name(asked, args.compare),
        script=MATRIX if args.compare else "train_with_lora.py",
        arguments=arguments,
        folder=args.folder,
        output_dir=output_dir,
        max_runtime=args.max_runtime,
        environment=dict(args.env),
        interruptible=args.interruptible,
    )
    studio = {"name": args.studio, "teamspace": args.teamspace, "user": args.user, "org": args.org}
    calls = sdk_arguments(job, find_machine(args.machine), studio)
    (check_training_matrix if args.compare else check_training)(asked, check_composed)
    print_job(*calls, job.results)
    if not args.dry_run:
        print(f"submitted     {submit(*calls)}")
    return 0


def split_at_dashes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the launcher's own words and, after `--`, those of the training."""
    words = list(words)
    return (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Reads the launcher's own words."""
    parser = script_parser(__doc__, EXAMPLES, usage="%(prog)s --machine NAME [options] -- ARGUMENTS")
    parser.add_argument(
        "--machine", required=True, help="T4, L4, L40S, A100, H100_X_8, ... (see `lightning machine list`)"
    )
    parser.add_argument("--name", type=job_name, help="of the job (default: the configuration and the time)")
    parser.add_argument("--studio", help="whose files and packages the job gets (default: the Studio this runs in)")
    parser.add_argument("--teamspace", help="that of the Studio (default: this Studio's, or `lightning config`)")
    owner = parser.add_mutually_exclusive_group()
    owner.add_argument("--user", help="who owns the teamspace")
    owner.add_argument("--org", help="the organisation that owns the teamspace")
    parser.add_argument(
        "--folder",
        type=below_home,
        default=FOLDER,
        help="of this repository below the Studio's home (%(default)s)",
    )
    parser.add_argument("--interruptible", action="store_true", help="a spot machine: cheaper, may be taken away")
    parser.add_argument("--max-runtime", type=duration, metavar="8h", help="end the training after 90m, 8h, 2d")
    parser.add_argument(
        "--env", type=key_value, action="append", default=[], metavar="KEY=VALUE", help="may be repeated"
    )
    parser.add_argument(
        "--compare", action="store_true", help="run `scripts/compare.py run ARGUMENTS`, a matrix of runs"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the job and submit nothing; needs no account")
    return parser.parse_args(words)


def job_name(text: str) -> str:
    return matching(r"[A-Za-z0-9][A-Za-z0-9_-]*", text, "use letters, digits, - and _")  # it becomes a folder


def duration(text: str) -> str:
    return matching(r"[1-9]\d*[smhd]", text, "use a number and s, m, h or d, as in 8h")


def below_home(text: str) -> str:
    return matching(r"(?!/|~).+", text, f"give it relative to {HOME}")


def key_value(text: str) -> tuple[str, str]:
    key, _, value = matching(r"[A-Za-z_]\w*=.*", text, "use KEY=VALUE").partition("=")
    return key, value


def matching(pattern: str, text: str, remedy: str) -> str:
    if not re.fullmatch(pattern, text):
        raise argparse.ArgumentTypeError(f"{text!r}: {remedy}")
    return text


if __name__ == "__main__":
    sys.exit(main())
