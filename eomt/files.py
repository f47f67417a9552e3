"""Files and folders that are written as a whole or not at all, JSON, YAML and tensors, and where caches are kept."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from eomt.command_line import one_sentence

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # endings of picture files
logger = logging.getLogger(__name__)
TOO_DEEP = "it is nested too deeply"
REQUIRED: Any = object()  # the default of a reader whose file must be there


def check_room(path: str | Path, needed: int) -> None:
    """Raises OSError where the disk has no room for a file or folder of so many bytes."""
    path = Path(path)
    place = next(folder for folder in path.absolute().parents if folder.is_dir())
    if needed > shutil.disk_usage(place).free:
        raise _no_room(path, f"{_size(needed)} are needed", shutil.disk_usage(place).free)


def check_place(path: str | Path, of_file: bool = False, empty: bool = False) -> None:
    """Raises OSError where a folder or file cannot be written, as far as is known; ValueError if it is not `empty`."""
    path, wanted = Path(path), "file" if of_file else "folder"
    if empty and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise ValueError(f"{path} exists and is not empty: choose a new {wanted}")
    if path.exists() and not (path.is_file() if of_file else path.is_dir()):
        raise OSError(f"{path} is {'a file' if path.is_file() else 'no file'}: name a {wanted}")
    try:
        place = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        with TemporaryFile(dir=place.parent if place.is_file() and of_file else place):  # which has no name
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be written ({why}): choose another place") from error


@contextmanager
def explains_full_disk(path: Path, draft: Path) -> Iterator[None]:
    """Says of an error in the block, if it means that there was no room for `path`, how much is needed and free.

    Raises:
        OSError: with that sentence, whatever class the library's own error had.
    """
    try:
        yield
    except Exception as error:
        if not _means_full_disk(error, draft):
            raise
        written = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        free = shutil.disk_usage(draft).free + written  # the draft will be removed
        raise _no_room(path, f"more than {_size(written)} are needed", free) from error


def _no_room(path: Path, need: str, free: int) -> OSError:
    in_draft = path.parent.name == f".{path.name}.part"  # as `replacing_folder` names it
    path = path.parent.parent / path.name if in_draft else path
    error = OSError(
        f"there is no room for {path}: {need}, {_size(free)} are free there; delete something, or choose a folder on "
        "another disk"
    )
    error.errno = errno.ENOSPC
    return error


def _means_full_disk(error: Exception, draft: Path) -> bool:
    """Torch's and safetensors' writers have errors of their own for it."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the process's limit for a file
    if getattr(error, "errno", None) in codes:
        return getattr(error, "strerror", None) is not None  # not one of ours
    text = str(error)
    in_torch = "inline_container" in text or "PytorchStreamWriter" in text
    return any(f"os error {code})" in text for code in codes) or (in_torch and shutil.disk_usage(draft).free < 2**20)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


@contextmanager
def replacing(path: str | Path, alone: bool = False) -> Iterator[Path]:
    """Yields the path of a draft, which becomes the file `path` when the block ends without an error.

    The draft has the same file name, for libraries that look at the ending. Until it is complete and on the disk, the
    earlier file stays. The only writer of a large file says so with `alone`, and removes the drafts of killed ones.
    """
    path = Path(path)
    if alone:
        for stray in path.parent.glob(f".{glob.escape(path.name)}.*"):
            shutil.rmtree(stray, ignore_errors=True)
    with replacing_files(path.parent, f".{path.name}.", path) as drafts:
        yield drafts / path.name


@contextmanager
def replacing_files(folder: str | Path, prefix: str = ".draft.", target: Path | None = None) -> Iterator[Path]:
    """Yields an empty draft folder, whose files go to `folder` when the block ends without an error.

    They replace those of their names once all are complete and on the disk; other files stay. An error for want of
    room names `target`, or the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=prefix, dir=folder) as drafts:
        with explains_full_disk(target or folder, Path(drafts)):
            mode = _usual_mode(Path(drafts))
            yield Path(drafts)
            _to_disk(Path(drafts), mode)
        for file in sorted(Path(drafts).iterdir()):
            os.replace(file, folder / file.name)
        _sync(folder)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty draft folder, which becomes the folder `path` when the block ends without an error.

    Until it is complete and on the disk, the earlier folder stays; between two renames there is none. The draft of a
    writer that was killed is removed by the next one. Two writers of one folder at a time need a lock.
    """
    path = restored(path)
    work = _work_folder(path)
    draft, earlier = work / path.name, work / "earlier"
    shutil.rmtree(work, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        with explains_full_disk(path, draft):
            mode = _usual_mode(work)
            yield draft
            _to_disk(draft, mode)
        if path.exists():
            path.rename(earlier)
        draft.rename(path)
        _sync(path.parent)
    finally:
        restored(path)  # an error, or a signal, between the renames
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Holds a folder against other processes until the block ends, or this process does.

    Processes that it starts hold nothing. Where the file system knows no locks, nothing is held.

    Raises:
        ValueError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{folder} is in use by another process: wait for its end, or choose another folder"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def in_use(folder: str | Path) -> bool:
    """Whether another process holds a folder."""
    try:
        with claimed(folder):
            return False
    except ValueError:
        return True


def restored(path: str | Path) -> Path:
    """Returns the path of a folder, after putting it back where a writer was killed between its renames."""
    path = Path(path)
    if not path.exists() and (earlier := _work_folder(path) / "earlier").exists():
        earlier.rename(path)
    return path


def _work_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty draft folder, which becomes the folder `path` unless another process was faster."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        draft, mode = Path(work, path.name), _usual_mode(Path(work))
        draft.mkdir()
        with explains_full_disk(path, draft):
            yield draft
            _to_disk(draft, mode)
        try:
            draft.rename(path)
            _sync(path.parent)
        except OSError:
            if not path.is_dir():
                raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, as a whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON for people to read, as a whole or not at all; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path, default: Any = REQUIRED) -> dict[str, Any]:
    """Returns the mapping that a JSON file holds, or the default if there is no file.

    Raises:
        ValueError: the file is no JSON, or no mapping. FileNotFoundError: there is no file, and no default was given.
    """
    return _read(Path(path), "JSON", parse_json, default)


def read_yaml(path: str | Path, default: Any = REQUIRED) -> dict[str, Any]:
    """Returns the mapping that a YAML file holds, or the default if there is no file; raises as `read_json` does."""
    return _read(Path(path), "valid YAML", lambda text: yaml.load(text, _Loader) or {}, default)


def parse_json(text: str | bytes) -> Any:
    """Returns what JSON says; raises ValueError where it is none, is nested too deeply, or says a name twice."""
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it says {twice!r} twice")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with a name twice, of which YAML's own loader takes the last one."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [(name.tag, name.value) for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.YAMLError(f"it says {twice[1]!r} twice{node.start_mark}")
        return node


class Tolerated:
    """A context for writing what a run can do without: OSErrors are passed over, the first with a warning.

    Args:
        what: is written.
    """

    def __init__(self, what: str) -> None:
        self.what, self.warned = what, False

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self.warned:
            self.warned = True
            logger.warning("%s cannot be written, the run goes on without: %s", self.what, error)
        return True


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a `.safetensors` file, mapped from the disk, and its metadata.

    Raises:
        ValueError: it is cut off, or no such file. FileNotFoundError: there is no file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder is incomplete, fetch it again")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors ({one_sentence(error)}): it may be half-written or half-downloaded, "
            "fetch it again"
        ) from error


def read_pickle(path: Path) -> Any:
    """Returns what `torch.save` wrote, tensors mapped from the disk; pickled code is never run.

    Raises:
        ValueError: it cannot be read, or holds more than tensors and plain values.
    """
    import torch

    try:
        return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as tensors ({type(error).__name__}): it may be half-downloaded, or hold pickled "
            "objects, which are never loaded: save its state_dict alone with torch.save"
        ) from error


def cache_folder(name: str) -> Path:
    """Returns the folder for caches of one kind, `$EOMT_CACHE/NAME` or else `~/.cache/eomt/NAME`."""
    return Path(os.environ.get("EOMT_CACHE") or Path.home() / ".cache" / "eomt") / name


def _read(path: Path, language: str, parse: Callable[[str], Any], default: Any) -> dict[str, Any]:
    if not path.is_file():
        if default is REQUIRED:
            raise FileNotFoundError(f"{path} is missing")
        return default
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} cannot be read: it is no text in UTF-8 ({one_sentence(error)}); save it in UTF-8 or write it again"
        ) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        why = TOO_DEEP if isinstance(error, RecursionError) else one_sentence(error)
        raise ValueError(
            f"{path} cannot be read: it is no {language} ({why}); it may be half-written: write it again or leave it "
            "out"
        ) from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, where names and values should be: look at it")
    return content


def _usual_mode(folder: Path) -> int:
    """The mode that the umask gives to new files; libraries that write through temporary files take another one."""
    probe = folder / "mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def _to_disk(draft: Path, mode: int) -> None:
    """Waits until a folder's files are on the disk, so that a machine that dies after the rename has all of them."""
    for file in draft.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            with file.open("rb") as content:
                os.fsync(content.fileno())


def _sync(folder: Path) -> None:
    """Waits until renames in a folder are on the disk, where the system can say so."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
