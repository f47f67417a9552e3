"""Runs a training as a job on Lightning AI: checks its arguments here, then submits it from a Studio's snapshot."""

import argparse
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs from a checkout that is not installed

from eomt.command_line import did_you_mean, translate_flags  # noqa: E402

EXAMPLES = """Everything after -- goes to train_with_lora.py as it is.

examples:
  python scripts/launch_lightning.py --machine L4 --dry-run -- --config-name cityscapes_lora \\
      data.root=/teamspace/studios/this_studio/cityscapes model.lora_rank=16
  python scripts/launch_lightning.py --machine L4 --interruptible --max-runtime 8h -- experiment=toy_source
  python scripts/launch_lightning.py --machine A100 --studio streets --teamspace vision --org acme -- \\
      data.root=/teamspace/studios/this_studio/cityscapes
  python scripts/launch_lightning.py --machine L4 --compare -- experiment=toy_source variants=[head,full] seeds=[0,1]"""

HOME = PurePosixPath("/teamspace/studios/this_studio")  # of every Studio, and of every job started from one
JOBS = PurePosixPath("/teamspace/jobs")  # JOBS/NAME mirrors what job NAME wrote below HOME, read-only
IN_STUDIO = ROOT.is_relative_to(HOME)
NOT_A_RUN = ("--multirun", "-m", "--cfg", "-c", "--help", "-h")
# The two scripts up to where data and networks would be built; files may be missing, unless they are here
CHECK_RUN = """
import train_with_lora
check = train_with_lora.check
def train(cfg, output_dir):
    train_with_lora.absolute_paths(cfg)
    try:
        check(cfg)
    except FileNotFoundError:
        if FILES_ARE_HERE: raise
train_with_lora.train = train
raise SystemExit(train_with_lora.main())
"""
CHECK_MATRIX = """
import sys
sys.path.insert(0, "scripts")
import compare
from eomt.comparison.matrix import check_matrix, parse_matrix
def run_matrix(overrides, config_name, check):
    try:
        check_matrix(parse_matrix(overrides, config_name)[0], check)
    except FileNotFoundError:
        if FILES_ARE_HERE: raise
    return 0
compare.run_matrix = run_matrix
sys.argv.insert(1, "run")
sys.exit(compare.main())
"""


def main() -> int:
    """Exit code 0; 1 with one sentence; 2 for a mistyped command line, that of the training included."""
    own, arguments = split_at_dashes(sys.argv[1:])
    args = parser().parse_args(own)
    try:
        words = translate_flags(arguments)
    except ValueError as error:
        return fail(error, 2)
    try:
        machine = find_machine(args.machine)
        name = args.name or default_name(words, args.compare)
        output_dir = find_output_dir(words)
        studio, job = plan(args, name, machine, output_dir, arguments)
    except (ValueError, ImportError) as error:
        return fail(error, 1)
    if code := check_arguments(arguments, args.compare):
        return code
    show(studio, job, results(name, args.folder, output_dir))
    return 0 if args.dry_run else submit(studio, job)


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own words and, after `--`, those of the training."""
    return (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --machine NAME [options] -- ARGUMENTS OF train_with_lora.py",
    )
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
        default=default_folder(),
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
    return parser


def default_folder() -> str:
    return str(ROOT.relative_to(HOME)) if IN_STUDIO else ROOT.name


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


def lightning_sdk() -> Any:
    """The package, without the look at the package index that its import takes, with no limit of time."""
    os.environ.setdefault("LIGHTNING_DISABLE_VERSION_CHECK", "1")
    try:
        import lightning_sdk
    except ImportError as error:
        raise ImportError("Lightning AI's SDK is needed, also for --dry-run: pip install lightning-sdk") from error
    return lightning_sdk


def find_machine(name: str) -> Any:
    """The SDK's machine of that name, in capitals or not.

    Raises:
        ValueError: there is none.
    """
    kind = lightning_sdk().Machine
    machines = {key: value for key, value in vars(kind).items() if isinstance(value, kind)}
    if name.upper() not in machines:
        guess = did_you_mean(name.upper(), machines) or f"; there are {', '.join(machines)}"
        raise ValueError(f"machine {name} is unknown{guess}")
    return machines[name.upper()]


def default_name(words: Sequence[str], compare: bool) -> str:
    """What is trained, and the time: cityscapes-lora-20260101-120000."""
    named = [value for flag, value in itertools.pairwise(words) if flag in ("--config-name", "-cn")]
    experiment = [word.removeprefix("experiment=") for word in words if word.startswith("experiment=")]
    what = [*["compare"] * compare, *(experiment or named or ["cityscapes"])[-1:]]
    return re.sub("[^a-z0-9]+", "-", "-".join(what).lower()) + time.strftime("-%Y%m%d-%H%M%S")


def find_output_dir(words: Sequence[str]) -> str | None:
    """The folder that the arguments name, or None.

    Raises:
        ValueError: arguments that are not one run, a folder only known later, or one that holds a run.
    """
    if stray := [word for word in words if word in NOT_A_RUN]:
        raise ValueError(f"{stray[0]}: a job is one run; launch one job for each, or a matrix with --compare")
    given = [found[1] for word in words if (found := re.fullmatch(r"\+{0,2}output_dir=(.*)", word))]
    if not given:
        return None
    folder = given[-1].strip("'\"")
    if not folder or "$" in folder:
        raise ValueError(f"output_dir {folder!r}: give a plain path, so that the job finds its checkpoint again")
    resumes = any(word.startswith("resume=") for word in words)
    if (ROOT / folder / "metrics.csv").is_file() and not resumes:
        raise ValueError(f"output_dir {folder} holds a run: choose another folder, or continue it with resume=")
    return folder


def plan(
    args: argparse.Namespace, name: str, machine: Any, output_dir: str | None, arguments: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `lightning_sdk.Studio` and of `lightning_sdk.Job.run`.

    Raises:
        ValueError: the installed SDK does not take them.
    """
    studio = {"name": args.studio, "teamspace": args.teamspace, "user": args.user, "org": args.org, "create_ok": False}
    script = "scripts/compare.py run" if args.compare else "train_with_lora.py"
    job = {
        "name": name,
        "machine": machine,
        "command": shell_command(script, arguments, name, args.folder, output_dir, args.max_runtime),
        "env": dict(args.env),
        "interruptible": args.interruptible,
    }
    sdk = lightning_sdk()
    for call, kwargs in ((sdk.Studio, studio), (sdk.Job.run, job | {"studio": None})):
        try:
            inspect.signature(call).bind(**kwargs)
        except TypeError as error:
            raise ValueError(
                f"lightning-sdk {sdk.__version__} has another {call.__qualname__}: {error}; try another version of it"
            ) from error
    return studio, job


def shell_command(
    script: str, arguments: Sequence[str], name: str, folder: str, output_dir: str | None, max_runtime: str | None
) -> str:
    """What the job runs, from the Studio's home: the script, which goes on where an interrupted machine left it.

    The machine that replaces it begins with the Studio's snapshot, so the run is first fetched from what the job
    saved. A run of the job's own without a whole checkpoint, which is a zip, starts again.
    """
    out = output_dir or f"outputs/{name}"
    words = [*(["timeout", max_runtime] if max_runtime else []), "python", *script.split(), *arguments]
    words += [] if output_dir else [f"output_dir={out}"]
    saved = results(name, folder, output_dir)
    lines = [
        f"cd {shlex.quote(folder)}",
        'export PATH="$PWD/.venv/bin:$PATH"',
        f"OUT={shlex.quote(out)}",
    ]
    if saved.is_relative_to(JOBS):
        lines += [
            f"SAVED={shlex.quote(str(saved))}",
            'if [ ! -d "$OUT" ] && [ -d "$SAVED" ]; then mkdir -p "$(dirname "$OUT")"; cp -r "$SAVED" "$OUT"; fi',
        ]
    if script != "train_with_lora.py":
        return "\n".join([*lines, shlex.join(words)])  # a matrix finds its finished runs itself
    lines += [
        'LAST="$OUT/checkpoints/last.ckpt"',
        'RESUME=; if python -m zipfile -l "$LAST" >/dev/null 2>&1; then RESUME="resume=\'$LAST\'"; fi',
    ]
    if not output_dir:
        lines.append('if [ -z "$RESUME" ]; then rm -f "$OUT/metrics.csv"; fi')
    return "\n".join([*lines, shlex.join(words) + ' ${RESUME:+"$RESUME"}'])


def results(name: str, folder: str, output_dir: str | None) -> PurePosixPath:
    """Where the run's folder is found when the machine is gone."""
    path = HOME / folder / (output_dir or f"outputs/{name}")
    return JOBS / name / path.relative_to(HOME) if path.is_relative_to(HOME) else path


def check_arguments(arguments: Sequence[str], compare: bool) -> int:
    """The script's own check of everything that needs no data; its exit code, after its sentence."""
    code = f"FILES_ARE_HERE = {IN_STUDIO}" + (CHECK_MATRIX if compare else CHECK_RUN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, *arguments, f"output_dir='{folder}'"]
        return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode


def show(studio: dict[str, Any], job: dict[str, Any], folder: PurePosixPath) -> None:
    """Every argument of the two calls, and where the results will be."""
    name = job["name"]
    for call, kwargs in (("Studio", studio), ("Job.run", job)):
        print(call)
        for key, value in kwargs.items():
            print(f"  {key:<14}{value}".replace("\n", "\n" + 16 * " "))
    print(f"results       {folder}" + ("" if folder.is_relative_to("/teamspace") else "  (lost with the machine)"))
    print(f"log           lightning job logs {name} --follow\nstop it       lightning job stop {name}")
    if folder.is_relative_to(JOBS):
        print(f"copy          lightning cp -r lit:///{folder.relative_to('/teamspace')} ./{name}")


def submit(studio: dict[str, Any], job: dict[str, Any]) -> int:
    """Starts the job; the exit code, after one sentence if that failed."""
    if not logged_in():
        return fail("no Lightning AI account: run `lightning login`, or set LIGHTNING_USER_ID and LIGHTNING_API_KEY", 1)
    sdk = lightning_sdk()
    try:
        submitted = sdk.Job.run(**job, studio=sdk.Studio(**studio))
        print(f"submitted     {submitted.link}")
    except Exception as error:  # whatever the SDK, its HTTP client and the platform raise
        return fail(f"Lightning AI answered: {' '.join(str(error).split()) or type(error).__name__}", 1)
    return 0


def logged_in() -> bool:
    """Whether the SDK will find credentials; without any it opens a browser and waits."""
    saved = os.environ.get("LIGHTNING_CREDENTIAL_PATH", "~/.lightning/credentials.json")
    in_environment = any(os.environ.get(key) for key in ("LIGHTNING_API_KEY", "LIGHTNING_AUTH_TOKEN"))
    return in_environment or Path(saved).expanduser().is_file()


def fail(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
