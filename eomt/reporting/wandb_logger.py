"""Weights & Biases without surprises: no account, no key or no network means offline, never a question."""

import logging
import netrc
import os
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

logger = logging.getLogger(__name__)


class WandbRun(WandbLogger):
    """One run of wandb, which ends with `finish`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # which Lightning passes on, and of which wandb warns

    def finish(self, ended_well: bool = True) -> None:
        """Ends the run of wandb, if one was begun; wandb shows it as finished or as failed."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(not ended_well))


def wandb_logger(
    project: str = "eomt-lora",
    name: str | None = None,
    job: str | None = None,
    tags: Sequence[str | None] = (),
    **options: Any,
) -> WandbRun:
    """A logger that goes offline, with one warning, where it cannot log in.

    Args:
        project, name, options: see `WandbLogger`.
        job: what tells the run from others of its group, added to its name.
        tags: without those that are None.
    """
    if "WANDB_MODE" not in os.environ and (reason := offline_reason()):
        logger.warning("wandb is offline (%s): upload the run later with `wandb sync`", reason)
        os.environ["WANDB_MODE"] = "offline"
    name = " ".join(filter(None, (name, job)))
    return WandbRun(project=project, name=name or None, tags=[tag for tag in tags if tag], **options)


def offline_reason() -> str | None:
    """Says why logging in would fail or ask; None if it would not."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    if not os.environ.get("WANDB_API_KEY") and not netrc_has(host):
        return "no API key: set WANDB_API_KEY or run `wandb login`"
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return f"{host} cannot be reached"
    return None


def netrc_has(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
