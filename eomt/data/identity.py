"""Which files two runs saw: SHA-256 of their content, computed once for a file that stays as it is."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from rich.progress import track

from eomt.data.sources import Source, open_archive
from eomt.files import cache_folder, read_json, write_text

log = logging.getLogger(__name__)

OF_CONTENT = "sha256:"  # begins fingerprints of plain files; earlier versions knew those by their size
SETTLED = 2e9  # nanoseconds after a change, within which some file systems give the next one the same time
THREADS = 8


def fingerprint(files: Sequence[tuple[str, Sequence[Source]]], hashing: bool = True) -> str | None:
    """SHA-256 over names and contents: whether two runs saw the same files, in whatever order.

    Args:
        files: for each name, the pictures that belong to it.
        hashing: whether files may be read; if not, and some would have to be, there is no fingerprint.

    Raises:
        OSError: a file is gone or cannot be read.
    """
    sources = [source for _, parts in files for source in parts]
    plain = [source.path for source in sources if source.member is None]
    hashes = file_hashes(plain, hashing)
    if hashes is None:
        return None
    found, members = iter(hashes), (_of_member(source) for source in sources if source.member is not None)
    lines = sorted(
        " ".join([name, *(next(found) if part.member is None else next(members) for part in parts)])
        for name, parts in files
    )
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return OF_CONTENT + digest if plain else digest


def same_files(one: str | None, other: str | None) -> bool | None:
    """Whether two fingerprints are of the same files; None where that is not known."""
    if one is None or other is None or one.startswith(OF_CONTENT) != other.startswith(OF_CONTENT):
        return None
    return one == other


def file_hashes(paths: Iterable[str | Path], hashing: bool = True) -> list[str] | None:
    """SHA-256 of each file, remembered in `$EOMT_CACHE/hashes` for as long as its size and times stay.

    Returns:
        The hashes, or None where `hashing` is forbidden and needed.
    """
    paths = [os.path.abspath(path) for path in paths]
    if not paths:
        return []
    root = os.path.commonpath({os.path.dirname(path) for path in paths})
    memory = cache_folder("hashes") / f"{hashlib.sha256(root.encode()).hexdigest()[:24]}.json"
    known, new = _recall(memory), {}
    with ThreadPool(THREADS) as pool:
        states = pool.map(_state, paths)
        missing = [k for k, path in enumerate(paths) if not _is_hash_of(known.get(path), states[k])]
        if missing and not hashing:
            return None
        digests = pool.imap(_sha256, [paths[k] for k in missing], chunksize=16)
        shown = track(digests, "Hashing the data", len(missing), transient=True, disable=not sys.stderr.isatty())
        try:
            for k, digest in zip(missing, shown, strict=True):
                new[paths[k]] = f"{states[k]} {digest}"
        finally:  # what was hashed before an interruption is remembered, too
            if new:
                _remember(memory, new)
    return [(new.get(path) or known[path]).rpartition(" ")[2] for path in paths]


def _of_member(source: Source) -> str:
    entry = open_archive(source.path).getinfo(source.member)
    return f"{entry.file_size}:{entry.CRC:08x}"


def _state(path: str) -> str:
    """Size and times of a file: the second one follows every change, also where the first one is set back."""
    facts = os.stat(path)
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"


def _is_hash_of(record: str | None, state: str) -> bool:
    return isinstance(record, str) and record.rpartition(" ")[0] == state


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _recall(memory: Path) -> dict[str, str]:
    try:
        return read_json(memory, {})
    except (ValueError, OSError):  # it is made again
        return {}


def _remember(memory: Path, new: dict[str, str]) -> None:
    """Adds to what is remembered, by this run or another; files that have just changed are left out."""
    now = time.time_ns()
    settled = {path: record for path, record in new.items() if now - int(record.split(" ")[2]) > SETTLED}
    try:
        write_text(memory, json.dumps(_recall(memory) | settled))
    except OSError as error:
        log.warning("hashes of the data cannot be kept for the next run: %s", error)
