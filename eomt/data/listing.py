"""Listing pictures. All who look for them in folders come here: the same files are found, and left out, by all."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from eomt.files import PICTURES

# Names that systems and programs give to folders and files of their own, besides those that begin with a dot; in small
# letters: macOS in archives, Synology, QNAP, Windows, Linux, Jupyter.
OF_SYSTEMS = {"__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler"}
OF_SYSTEMS |= {"system volume information", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
OF_SYSTEMS |= {"lost+found", "__pycache__", "thumbnails", "thumbs"}

# Reasons for which files are left out; each counts files, or folders that are not looked into.
LEFT_BY_SYSTEMS = "hidden, or left by a system"
OTHER_KINDS = "no pictures by their ending"
LISTED_ALREADY = "links to folders that are listed already"
LONELY = "masks without an image"
OTHER_NAMES = "called otherwise than the template"


SHOWN = 6  # names or values in a sentence


@dataclass
class Listing:
    """The pictures below a folder, each as the parts of its path there, in order; and what was left out, by reason."""

    root: Path
    pictures: list[tuple[str, ...]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def names(self) -> list[str]:
        """The pictures in the folder itself."""
        return [parts[0] for parts in self.pictures if len(parts) == 1]

    @property
    def paths(self) -> list[Path]:
        return [self.root.joinpath(*parts) for parts in self.pictures]


def is_left_by_system(parts: Iterable[str]) -> bool:
    """Whether a path below a data set's folder is hidden, or has a name that systems give to files of their own."""
    return any(part.startswith(".") or part.lower() in OF_SYSTEMS for part in parts)


def list_pictures(root: str | Path, endings: tuple[str, ...] = PICTURES, deep: bool = True) -> Listing:
    """Lists the pictures in a folder and, if `deep`, in those below it.

    Links are followed. A folder that can be reached in several ways is listed once, by the way without links if there
    is one: so loops end, and no picture is listed twice. Links to nothing are listed, for their reader to name.

    Raises:
        OSError: a folder is missing, or cannot be read.
    """
    listing, seen = Listing(Path(root)), set()
    folders: list[tuple[str, ...]] = [()]
    links: list[tuple[str, ...]] = []
    while folders or links:
        parts = folders.pop() if folders else links.pop(0)
        facts = os.stat(os.path.join(root, *parts))
        if (facts.st_dev, facts.st_ino) in seen:
            listing.left_out[LISTED_ALREADY] += 1
            continue
        seen.add((facts.st_dev, facts.st_ino))
        with os.scandir(os.path.join(root, *parts)) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        for entry in inside:
            if is_left_by_system([entry.name]):
                listing.left_out[LEFT_BY_SYSTEMS] += 1
            elif _is_folder(entry):
                (links if entry.is_symlink() else folders).append((*parts, entry.name))
            elif os.path.splitext(entry.name)[1].lower() in endings and _is_file(entry):
                listing.pictures.append((*parts, entry.name))
            else:
                listing.left_out[OTHER_KINDS] += 1
        if not deep:
            break
    listing.pictures.sort()
    return listing


def match_pictures(pattern: Path, endings: tuple[str, ...] = PICTURES) -> Listing:
    """Lists the pictures that a pattern like `photos/**/*.png` matches, each once, below the folder that it names.

    Files that systems leave are left out, unless they stand in the pattern.
    """
    root = Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    listing, seen = Listing(root), set()
    matches = [Path(name) for name in glob.iglob(str(pattern), recursive=True)]
    for path in sorted(matches, key=lambda path: (len(path.parts), path)):  # of several ways the shortest
        parts, place = path.relative_to(root).parts, (os.path.realpath(path.parent), path.name)
        if path.suffix.lower() not in endings or place in seen or os.path.isdir(path):
            continue
        seen.add(place)
        if is_left_by_system(parts):
            listing.left_out[LEFT_BY_SYSTEMS] += 1
        elif path.is_file() or not path.exists():
            listing.pictures.append(parts)
    listing.pictures.sort()
    return listing


def _is_folder(entry: os.DirEntry) -> bool:
    """Asks the disk for links alone; one to itself is no folder."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry) -> bool:
    """Whether it is a file or a link to nothing: reading a pipe or a device would never end."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def by_number(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts frame_9 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)], name


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
