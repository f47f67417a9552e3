"""Places on the Hugging Face hub, `hf://user/name@revision/file`: pinned to a commit, fetched into the hub's own cache.

A branch or a tag may mean other files tomorrow, so a place without a commit is given the one that it has now, and that
is what records hold. Needs no torch, and huggingface_hub only where something is fetched.
"""

from __future__ import annotations

import functools
import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from eomt.command_line import one_sentence
from eomt.suggestions import not_found

log = logging.getLogger(__name__)

NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # of a repository
PLACE = re.compile(rf"(?P<repo>{NAME})(?:@(?P<revision>[^/@\s]+))?(?:/(?P<file>[^\s@]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 5  # for the hub to answer
WANTED = ("*.json", "*.safetensors", "pytorch_model*.bin")  # of a folder; nothing else is ever opened


class HubPlace(NamedTuple):
    """A file on the hub, or a folder (`file` without an ending, or None for the whole repository)."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision, file = (f"@{self.revision}" if self.revision else ""), (f"/{self.file}" if self.file else "")
        return f"hf://{self.repo}{revision}{file}"

    @property
    def is_file(self) -> bool:
        return bool(self.file and PurePosixPath(self.file).suffix)


def hub_place(place: str | Path | None) -> HubPlace | None:
    """Returns what `hf://user/name@revision/file` says; None for a path.

    Raises:
        ValueError: it begins with hf: and is no such place.
    """
    text = str(place or "")
    if not text.startswith("hf:"):
        return None
    found = PLACE.fullmatch(re.sub(r"^hf:/{1,2}", "", text))  # a `Path` has made one stroke of two
    parts = (found["file"] or "").split("/") if found else []
    if not found or {".", ".."} & set(parts) or (found["file"] and "" in parts):
        raise ValueError(
            f"{text} is no place on the hub: hf://user/name@revision/file is meant, without the file for all"
        )
    return HubPlace(found["repo"], found["revision"], found["file"])


def named_on_hub(path: str | Path) -> HubPlace | None:
    """Returns the repository that a saved network is named by: `user/name`, `user/name@revision` or `hf://…`.

    What exists here, or lies in a folder that exists here, is a path, and so is everything else: None.
    """
    place, local = hub_place(path), Path(path).expanduser()
    if place or local.exists() or local.parent.exists() or local.is_absolute():
        return place
    found = PLACE.fullmatch(str(path))
    return HubPlace(found["repo"], found["revision"]) if found and not found["file"] else None


def pinned(place: str | Path | None) -> Any:
    """Returns a place on the hub with the commit that its revision is now; any other path as it is.

    Raises:
        ConnectionError: the hub does not say it.
    """
    found = hub_place(place)
    if found is None or COMMIT.fullmatch(found.revision or ""):
        return str(found) if found else place
    return str(found._replace(revision=_commit(found._replace(file=None))))


def local_path(place: str | Path) -> Path:
    """Returns where a file or folder lies on this machine; what is on the hub is fetched, once.

    With a file comes the JSON beside it, as config.json, which says what its tensors do not.

    Raises:
        ConnectionError: the hub does not give it. ValueError: see `hub_place`.
    """
    found = hub_place(pinned(place))
    return _fetched(found) if found else Path(place).expanduser()


def check_ckpt_path(ckpt_path: str | Path | None) -> None:
    """Raises FileNotFoundError where weights are named that are not there."""
    if ckpt_path and not (path := local_path(ckpt_path)).exists():
        raise FileNotFoundError(f"ckpt_path {not_found(path)}")


def here(path: str | Path) -> Path:
    """Returns where a saved network lies on this machine: the path itself, or the repository that it names, fetched.

    Raises:
        FileNotFoundError: `user/name` is neither. ConnectionError: the hub does not give `hf://…`.
    """
    place = named_on_hub(path)
    if place is None:
        return Path(path).expanduser()
    try:
        return local_path(str(place))
    except ConnectionError as error:
        raise error if hub_place(path) else FileNotFoundError(f"{path}: no such file or folder, and {error}") from error


@functools.cache  # one process sees one commit
def _commit(place: HubPlace) -> str:
    from huggingface_hub import HfApi

    commit = _asked(place, lambda: HfApi().repo_info(place.repo, revision=place.revision).sha)
    log.info("%s is commit %s", place, commit)
    return commit


@functools.cache  # asking again for a folder asks the hub
def _fetched(place: HubPlace) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    folder, wanted = PurePosixPath(place.file or ""), WANTED
    if place.is_file:
        _asked(place, lambda: hf_hub_download(place.repo, place.file, revision=place.revision))
        is_index = folder.suffix == ".json"  # of parts, which are meant, too
        folder, wanted = folder.parent, WANTED if is_index else ("*.json",)
    patterns = [str(folder / pattern) for pattern in wanted]
    root = _asked(place, lambda: snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns))
    return Path(root, place.file or "")


@contextmanager
def given_up_soon() -> Iterator[bool]:
    """Keeps the hub's client offline in the block where the hub does not answer within 5 seconds.

    It would retry for a minute, in 45 lines; what was fetched before is found without it. Yields whether it answers.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    answers = not before and _answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not answers
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    """Whether a server can be reached; behind a proxy only its client can tell, so yes."""
    place = urlsplit(address)
    if place.scheme in getproxies() and not proxy_bypass(place.hostname or ""):
        return True
    reached: list[bool] = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection((place.hostname, place.port or 443), SECONDS):
            reached.append(True)

    looking = Thread(target=connect, daemon=True)  # looking up a name has no limit of its own
    looking.start()
    looking.join(SECONDS)
    return bool(reached)


def _asked(place: HubPlace, ask: Callable[[], str]) -> str:
    try:
        with given_up_soon():
            return ask()
    except Exception as error:  # of the hub, of the network, of the disk
        raise ConnectionError(
            f"{place} could not be had from the hub ({type(error).__name__}: {one_sentence(error)}); look at the name, "
            "log in with `hf auth login` if it is not public, or fetch it where there is a network: what was fetched "
            "once is found by its commit, hf://user/name@COMMIT"
        ) from error
