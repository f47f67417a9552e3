"""A folder of bona fide and morphed pictures: labels, splits and persons by a CSV file or by the folders' names."""

from __future__ import annotations

import csv
import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image

from eomt.data.listing import list_pictures
from eomt.data.overlap import shared_images
from eomt.data.pictures import decode_picture, to_rgb, upright
from eomt.data.sources import Sample, Source
from lora_config import listed
from morph.faces import BONA_FIDE, MORPH
from morph.settings import Settings

log = logging.getLogger(__name__)

LABELS = {"bonafide": BONA_FIDE, "genuine": BONA_FIDE, "real": BONA_FIDE, "0": BONA_FIDE}
LABELS |= {"morph": MORPH, "morphs": MORPH, "morphed": MORPH, "attack": MORPH, "1": MORPH}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test", "eval": "test"}
CSV_FILE = "labels.csv"
COLUMNS = ("file", "label", "split", "identity")
TRAINED = 0.6  # share of identities to train with, where a folder has no splits
VALIDATED = 0.7  # up to this share: to validate with; above: to test


@dataclass(frozen=True)
class Picture:
    """A file, its label (1: morph), its split ("" where none is given) and the persons in it, as far as known."""

    path: Path
    label: int
    split: str = ""
    identities: tuple[str, ...] = ()


def read_folder(settings: Settings) -> dict[str, list[Picture]]:
    """The pictures of a folder by split: train, val and test.

    With a `labels.csv` its columns `file` and `label` count, and `split` and `identity` (of a morph: two, joined by
    `;` or `+`) where there are such; else the names of the folders, such as `train/bona_fide`. Without splits, persons
    are told apart by a hash of their names. Without a split `val`, `settings.val_share` of the training is held out.

    Raises:
        ValueError: a label is unknown or contradictory, there are no splits and no identities, or persons or files of
            the training are in another split, or a file is no whole picture. FileNotFoundError: a file is not there.
    """
    root = Path(settings.data)
    pictures = read_csv(root / CSV_FILE) if (root / CSV_FILE).is_file() else read_names(root)
    if not pictures:
        raise ValueError(f"data {root} holds no pictures: give a folder of them, with {CSV_FILE} or folders by label")
    if not any(picture.split for picture in pictures):
        pictures = split_by_identity(pictures, root)
    if lost := [str(picture.path) for picture in pictures if not picture.split]:
        raise ValueError(f"data {root}: {listed(lost, 3)} in no split, and others are: name train, val or test for all")
    for picture in pictures:
        Source(str(picture.path)).check_complete()
    splits = {name: [picture for picture in pictures if picture.split == name] for name in ("train", "val", "test")}
    check_apart(splits, root)
    if not splits["val"]:
        splits["train"], splits["val"] = hold_out(splits["train"], settings.val_share)
        check_apart({name: splits[name] for name in ("train", "val")}, root)
    return splits


def read_csv(file: Path) -> list[Picture]:
    """The pictures that a CSV file names, beside it; raises ValueError for a row that is not understood."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as content:
            reader = csv.DictReader(content)
            columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8 ({error}): save it as one") from error
    if missing := [name for name in COLUMNS[:2] if name not in columns]:
        raise ValueError(f"{file} has no column {' and '.join(missing)}, only {', '.join(columns) or 'none'}: add it")
    pictures = []
    for number, row in enumerate(rows, 2):
        label, split = LABELS.get(_key(row["label"])), SPLITS.get(_key(row.get("split")), "")
        if label is None:
            raise ValueError(f"{file}, line {number}: label {row['label']!r} is none; write bona_fide or morph")
        if row.get("split") and not split:
            raise ValueError(f"{file}, line {number}: split {row['split']!r} is none; write train, val or test")
        path = file.parent / (row["file"] or "")
        if not path.is_file():
            raise FileNotFoundError(f"{file}, line {number}: {path} is not there; mend the name, or leave out the line")
        pictures.append(Picture(path, label, split, _identities(row.get("identity"))))
    if len({picture.path for picture in pictures}) < len(pictures):
        raise ValueError(f"{file} names a picture twice: leave one line out")
    return pictures


def read_names(root: Path) -> list[Picture]:
    """The pictures below a folder, labelled and split by the names of the folders that they lie in."""
    found = []
    for parts in list_pictures(root).pictures:
        labels = {LABELS[key] for part in parts[:-1] if (key := _key(part)) in LABELS and not key.isdigit()}
        splits = {SPLITS[key] for part in parts[:-1] if (key := _key(part)) in SPLITS}
        if len(labels) != 1 or len(splits) > 1:
            raise ValueError(
                f"{root.joinpath(*parts)} lies in no folder that says what it is, or in several: put it below "
                f"bona_fide or morph, and those below train, val or test, or write {CSV_FILE}"
            )
        found.append(Picture(root.joinpath(*parts), labels.pop(), "".join(splits)))
    return found


def split_by_identity(pictures: Sequence[Picture], root: Path) -> list[Picture]:
    """Gives each person a split by a hash of the name; morphs of persons in two splits are left out, with a warning."""
    if not all(picture.identities for picture in pictures):
        raise ValueError(
            f"data {root} has neither splits nor identities, so that a person may be in training and test: put the "
            f"pictures below train and test, or give {CSV_FILE} a column split or identity"
        )
    placed = []
    for picture in pictures:
        splits = {_split_of(identity) for identity in picture.identities}
        placed += [replace(picture, split=splits.pop())] if len(splits) == 1 else []
    if left_out := len(pictures) - len(placed):
        log.warning("data %s: %d morphs of persons in two splits are left out", root, left_out)
    return placed


def hold_out(train: Sequence[Picture], share: float) -> tuple[list[Picture], list[Picture]]:
    """Training pictures apart from those to validate with: persons where they are known, else evenly spread ones."""
    identities = sorted({identity for picture in train for identity in picture.identities})
    if not identities or not all(picture.identities for picture in train):
        log.warning("the identities are not known: validation pictures may show persons of the training")
        chosen = [ceil((n + 1) * share) > ceil(n * share) for n in range(len(train))]
        return list(compress(train, (not own for own in chosen))), list(compress(train, chosen))
    count = min(max(1, round(share * len(identities))), len(identities) - 1)
    held = {*sorted(identities, key=lambda name: _share_of(name, "val"))[:count]}
    kept = [picture for picture in train if not held & {*picture.identities}]
    val = [picture for picture in train if held >= {*picture.identities}]
    if left_out := len(train) - len(kept) - len(val):
        log.warning("%d morphs of a person to train and one to validate with are left out", left_out)
    return kept, val


def check_apart(splits: Mapping[str, Sequence[Picture]], root: Path) -> None:
    """Raises ValueError where a person or a file of one split is in another, too."""
    names = list(splits)
    for first, second in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        one, other = ({name for p in splits[split] for name in p.identities} for split in (first, second))
        if both := sorted(one & other):
            raise ValueError(
                f"data {root}: identity {listed(both, 3)} in {first} and in {second}, so that the score would be of "
                "known persons: put each person, and all morphs of it, into one split"
            )
        samples = [_samples(splits[split]) for split in (first, second)]
        if all(samples) and (same := shared_images(*samples)):
            raise ValueError(
                f"data {root}: {listed(sorted(same), 3)} in {second} is a picture of {first}, too: leave it out of one"
            )


def load_picture(path: Path, size: int) -> np.ndarray:
    """A picture's middle square at a size: uint8 [size, size, 3]; ValueError where it cannot be decoded."""
    picture = to_rgb(upright(decode_picture(path.read_bytes(), str(path))), str(path))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box))


def _samples(pictures: Iterable[Picture]) -> list[Sample]:
    sources = ((str(picture.path), Source(str(picture.path))) for picture in pictures)
    return [Sample(name, source, source) for name, source in sources]


def _key(text: str | None) -> str:
    return re.sub(r"[\s_-]", "", (text or "").lower())


def _identities(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in re.split("[;+]", text or "") if name.strip())


def _share_of(identity: str, purpose: str) -> float:
    return int(hashlib.sha256(f"{purpose} {identity}".encode()).hexdigest()[:8], 16) / 2**32


def _split_of(identity: str) -> str:
    share = _share_of(identity, "split")
    return "train" if share < TRAINED else "val" if share < VALIDATED else "test"
