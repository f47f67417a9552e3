"""A training as a job on Lightning AI: its command, the arguments of the SDK, and its submission."""

import inspect
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from eomt.command_line import RunError
from eomt.places import ROOT
from eomt.suggestions import did_you_mean

HOME = PurePosixPath("/teamspace/studios/this_studio")  # of every Studio, and of every job started from one
JOBS = PurePosixPath("/teamspace/jobs")  # JOBS/NAME mirrors what job NAME wrote below HOME, read-only
IN_STUDIO = ROOT.is_relative_to(HOME)
FOLDER = str(ROOT.relative_to(HOME)) if IN_STUDIO else ROOT.name  # of this repository below HOME
MATRIX = "scripts/compare.py run"


@dataclass(frozen=True)
class Job:
    """A script that runs on a rented machine.

    Args:
        name: of the job; letters, digits, - and _.
        script: `train_with_lora.py`, or `MATRIX`.
        arguments: of the script, as they are.
        folder: of this repository, below the Studio's home.
        output_dir: that the arguments name; None: `outputs/NAME`.
        max_runtime: after which the training ends, for example 8h; None: never.
        environment: variables of the job.
        interruptible: a cheaper machine, which may be taken away.
    """

    name: str
    script: str
    arguments: Sequence[str]
    folder: str = FOLDER
    output_dir: str | None = None
    max_runtime: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    interruptible: bool = False

    @property
    def results(self) -> PurePosixPath:
        """The place where the run's folder is found when the machine is gone."""
        path = HOME / self.folder / (self.output_dir or f"outputs/{self.name}")
        return JOBS / self.name / path.relative_to(HOME) if path.is_relative_to(HOME) else path

    @property
    def command(self) -> str:
        """Shell commands, run from the Studio's home; the script goes on where an interrupted machine left it.

        The machine that replaces it begins with the Studio's snapshot, so the run is first fetched from what the job
        saved.
        """
        out = self.output_dir or f"outputs/{self.name}"
        words = [
            *(["timeout", self.max_runtime] if self.max_runtime else []),
            "python",
            *self.script.split(),
            *self.arguments,
        ]
        words += [] if self.output_dir else [f"output_dir={out}"]
        saved = self.results
        lines = [
            f"cd {shlex.quote(self.folder)}",
            'export PATH="$PWD/.venv/bin:$PATH"',
            f"OUT={shlex.quote(out)}",
        ]
        if saved.is_relative_to(JOBS):
            lines += [
                f"SAVED={shlex.quote(str(saved))}",
                'if [ ! -d "$OUT" ] && [ -d "$SAVED" ]; then mkdir -p "$(dirname "$OUT")"; cp -r "$SAVED" "$OUT"; fi',
            ]
        if self.script == "train_with_lora.py" and not any("resume=" in word for word in self.arguments):
            words.append("resume=auto")  # a matrix finds its runs itself
        return "\n".join([*lines, shlex.join(words)])


def lightning_sdk() -> Any:
    """Imports the SDK without its look at the package index, which has no limit of time.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("LIGHTNING_DISABLE_VERSION_CHECK", "1")
    try:
        import lightning_sdk
    except ImportError as error:
        raise ImportError("Lightning AI's SDK is needed, also for --dry-run: pip install lightning-sdk") from error
    return lightning_sdk


def find_machine(name: str) -> Any:
    """Returns the SDK's machine of that name, in capitals or not.

    Raises:
        ValueError: there is none.
    """
    kind = lightning_sdk().Machine
    machines = {key: value for key, value in vars(kind).items() if isinstance(value, kind)}
    if name.upper() not in machines:
        guess = did_you_mean(name.upper(), machines) or f"; there are {', '.join(machines)}"
        raise ValueError(f"machine {name} is unknown{guess}")
    return machines[name.upper()]


def sdk_arguments(job: Job, machine: Any, studio: Mapping[str, str | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments of `lightning_sdk.Studio` and of `lightning_sdk.Job.run`.

    Args:
        job: to run.
        machine: from `find_machine`.
        studio: whose snapshot the job gets: its name, teamspace, and user or org; None: as the SDK finds out.

    Raises:
        ValueError: the installed SDK does not take them.
    """
    sdk = lightning_sdk()
    of_studio = {**studio, "create_ok": False}
    of_job = {
        "name": job.name,
        "machine": machine,
        "command": job.command,
        "env": dict(job.environment),
        "interruptible": job.interruptible,
    }
    for call, kwargs in ((sdk.Studio, of_studio), (sdk.Job.run, of_job | {"studio": None})):
        try:
            inspect.signature(call).bind(**kwargs)
        except TypeError as error:
            raise ValueError(
                f"lightning-sdk {sdk.__version__} has another {call.__qualname__}: {error}; try another version of it"
            ) from error
    return of_studio, of_job


def print_job(of_studio: Mapping[str, Any], of_job: Mapping[str, Any], results: PurePosixPath) -> None:
    """Prints every argument of the two calls, and where the results will be."""
    name = of_job["name"]
    for call, kwargs in (("Studio", of_studio), ("Job.run", of_job)):
        print(call)
        for key, value in kwargs.items():
            print(f"  {key:<14}{value}".replace("\n", "\n" + 16 * " "))
    print(f"results       {results}" + ("" if results.is_relative_to("/teamspace") else "  (lost with the machine)"))
    print(f"log           lightning job logs {name} --follow\nstop it       lightning job stop {name}")
    if results.is_relative_to(JOBS):
        print(f"copy          lightning cp -r lit:///{results.relative_to('/teamspace')} ./{name}")


def submit(of_studio: Mapping[str, Any], of_job: Mapping[str, Any]) -> str:
    """Starts the job, and returns its link.

    Raises:
        RunError: there is no account here, or the platform refuses.
    """
    if not logged_in():
        raise RunError("no Lightning AI account: run `lightning login`, or set LIGHTNING_USER_ID and LIGHTNING_API_KEY")
    sdk = lightning_sdk()
    try:
        return sdk.Job.run(**of_job, studio=sdk.Studio(**of_studio)).link
    except Exception as error:  # whatever the SDK, its HTTP client and the platform raise
        raise RunError(f"Lightning AI answered: {str(error) or type(error).__name__}") from error


def logged_in() -> bool:
    """Tells whether the SDK will find credentials; without any it opens a browser and waits."""
    saved = os.environ.get("LIGHTNING_CREDENTIAL_PATH", "~/.lightning/credentials.json")
    in_environment = any(os.environ.get(key) for key in ("LIGHTNING_API_KEY", "LIGHTNING_AUTH_TOKEN"))
    return in_environment or Path(saved).expanduser().is_file()
