"""The processes of a run end together: when one is gone, the others do not wait for it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from eomt.command_line import RunError, fail

GRACE = 10  # seconds in which a process may notice by itself, and write its summary
REMEDY = (
    "its error stands above (one that was killed, also for want of memory, leaves none); the same command with "
    "resume=auto goes on from the last checkpoint"
)


class EndTogether(Callback):
    """Ends this process when another one of the run on this machine is gone, even if it waits for it in a collective.

    The processes that Lightning started are watched in place of its own observer, which kills without a word.
    """

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        launcher = trainer.strategy.launcher
        if stage != "fit" or trainer.world_size == 1 or launcher is None:
            return
        started = list(getattr(launcher, "procs", ()))
        if started:
            launcher.procs.clear()  # what the observer watches
        is_started = not started and not trainer.strategy.cluster_environment.creates_processes_externally
        threading.Thread(target=watch, args=(started, os.getppid() if is_started else None), daemon=True).start()


def watch(started: Sequence[subprocess.Popen], parent: int | None) -> None:
    """Returns when the started processes have ended well; ends this process when one failed, or the parent is gone."""
    while True:
        codes = [process.poll() for process in started]
        failed = next((code for code in codes if code), None)
        orphaned = parent is not None and os.getppid() != parent
        if failed or orphaned:
            time.sleep(GRACE)  # the main thread ends by itself, unless it hangs
            for process in started:
                process.kill()
            how = f"exit code {failed}" if failed else "no exit code"
            fail(f"another process of this run ended ({how}): {REMEDY}", 1)
            sys.stderr.flush()
            os._exit(1)
        if started and all(code == 0 for code in codes):
            return
        time.sleep(0.5)


@contextmanager
def lost_process_explained() -> Iterator[None]:
    """Turns an error of communication, which means that another process is gone, into a RunError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):
            raise RunError(f"another process of this run ended: {REMEDY}") from error
        raise
