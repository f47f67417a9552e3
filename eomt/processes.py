"""The processes of a run: which one is the first, and the signals that ask them to end."""

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from eomt.command_line import plain_word, quoted
from eomt.places import INSTALLED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RANKS = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")  # a process's number, by who started it
PASSED_ON = signal.SIGUSR2  # by a process that was asked to end, to those that it started; it is no second signal


def is_first_process() -> bool:
    """Whether this is the one of several processes that touches the folder, however they were started."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def count_processes() -> int:
    """Counts the processes of this run that were started together, as whoever started them says in the environment.

    Raises:
        ValueError: a variable is no number: no process would take itself for the first one.
    """
    in_slurm = "SLURM_PROCID" in os.environ
    numbers = {name: os.environ.get(name, "0") for name in (*RANKS, "WORLD_SIZE", *["SLURM_NTASKS"] * in_slurm)}
    for name, text in numbers.items():
        if not re.fullmatch("[0-9]+", text):
            raise ValueError(f"{name}={text} in the environment: a number of processes is meant; unset it")
    return max(1, int(numbers["WORLD_SIZE"]), int(numbers.get("SLURM_NTASKS", 1)))


def check_one_folder(words: Sequence[str]) -> None:
    """Raises ValueError where several processes that were started from outside would each choose a folder."""
    count = count_processes()
    if count > 1 and not any(word.lstrip("+").startswith(("output_dir=", "hydra.run.dir=")) for word in words):
        raise ValueError(f"{count} processes were started for this run: give output_dir=FOLDER, so that they share one")


def check_sweep(trainer: Mapping[str, Any]) -> None:
    """Raises ValueError where a run of a sweep would start processes: each would begin the whole sweep.

    Args:
        trainer: settings of Lightning's trainer.
    """
    count = count_devices(trainer) * (trainer.get("num_nodes") or 1)
    if max(count, count_processes()) > 1:
        raise ValueError(
            f"--multirun with several processes a run (trainer.devices {trainer.get('devices')}, trainer.num_nodes "
            f"{trainer.get('num_nodes', 1)}): each would begin the whole sweep; give trainer.devices=1, or start each "
            "run by itself, without --multirun"
        )


def count_devices(trainer: Mapping[str, Any]) -> int:
    """Counts the devices on each machine that settings of Lightning's trainer ask for."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, str) and "," in devices.strip(","):
        devices = devices.split(",")
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices).isdigit():
        return int(devices)
    import torch

    return 1 if trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())  # all of them


class Interrupted(BaseException):
    """A signal ended the work. It is no `Exception`, so that nothing takes it for an error on its way.

    `code` is the exit code, as a shell would report it; `command` goes on with the work, where it is known; `together`
    says that all processes of a run end by it, `passed_on` that whoever started this one asked it to, and reports it.
    """

    def __init__(self, signum: int, passed_on: bool = False) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.passed_on = passed_on
        self.code = 128 + signum
        self.command: str | None = None
        self.together = False


class Interruption:
    """Receives the signals in its block.

    Where somebody promised to look at `signum` soon (`deferred`), the first signal is only remembered; elsewhere it
    raises `Interrupted` on the spot. The second one ends the process as if nothing had received it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.passed_on = False
        self.deferred = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.before = {signum: signal.getsignal(signum) for signum in (*SIGNALS, PASSED_ON)}
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        if _in_main_thread():
            for signum, handler in self.before.items():
                signal.signal(signum, handler)

    def install(self) -> None:
        """Takes the signals over, also from a library that has received them meanwhile.

        Those that were ignored before, as nohup ignores SIGHUP, stay ignored.
        """
        if _in_main_thread():  # the only one that may
            for signum in (*SIGNALS, PASSED_ON):
                if self.before[signum] != signal.SIG_IGN:
                    signal.signal(signum, self.receive)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Lets a signal wait until the end of the block; `check` raises it afterwards."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False

    def check(self) -> None:
        """Raises `Interrupted` where a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum, self.passed_on)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Handles a signal; raises `Interrupted` unless that is deferred."""
        if signum == PASSED_ON:
            if self.signum is not None:
                return  # who passes it on may not be the only one to have received it
            signum, self.passed_on = signal.SIGTERM, True
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        if not self.deferred:
            raise Interrupted(signum, self.passed_on)


def heed_parent_alone(*_: object) -> None:
    """Lets a process that works for another one end when that one says so, and not with what a whole group receives."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def command_to_continue(words: Sequence[str], output_dir: Path) -> str:
    """Returns the command that goes on in the folder of a run that was started with these words."""
    kept = [word for word in words if not word.lstrip("+").startswith(("output_dir=", "resume=", "hydra.sweep.dir="))]
    program = ["eomt", "train"] if INSTALLED else ["python", sys.argv[0]]
    return shlex.join([*program, *map(plain_word, kept), plain_word(f"output_dir={quoted(output_dir)}"), "resume=auto"])


def report_interruption(stopped: Interrupted) -> int:
    """Prints that the work was interrupted and how it goes on, once for all processes; returns the exit code."""
    if stopped.together and not is_first_process():
        return 0  # a failure would end the first one, which is still writing its summary
    if not stopped.passed_on:
        print(f"{stopped}; go on with: {stopped.command}" if stopped.command else stopped, file=sys.stderr)
    return stopped.code


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
