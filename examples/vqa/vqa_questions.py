"""Questions in ViVQA's CSV (`,question,answer,img_id,type`) and where their pictures are; needs no torch."""

from __future__ import annotations

import csv
import math
import random
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eomt.files import PICTURES

COLUMNS = ("question", "answer", "img_id", "type")
TYPES = ("object", "number", "colour", "location")  # 0 to 3


def plain(text: str) -> str:
    """Text in NFC with single spaces: a letter with its tone is one character, however it was typed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class Question(NamedTuple):
    """A question about a picture; `type` is an index of `TYPES`."""

    question: str
    answer: str
    img_id: str
    type: int


class Data(NamedTuple):
    """Questions for training and validation, the folder of their pictures, and weights of answers if there are any."""

    train: list[Question]
    val: list[Question]
    pictures: Path
    weights: dict[str, float] | None


def read_questions(path: str | Path) -> list[Question]:
    """The rows of a CSV; texts are in NFC.

    Raises:
        ValueError: a column or a value is missing, or a type is none of 0 to 3. FileNotFoundError: there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a CSV with the columns {', '.join(COLUMNS)}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path} has no column {missing[0]}: its first line must name {', '.join(COLUMNS)}")
            questions = [_question(row, f"{path}, line {reader.line_num}") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV in UTF-8 ({error}): save it so") from error
    if not questions:
        raise ValueError(f"{path} holds no question: give a CSV with rows")
    return questions


def _question(row: dict[str, str | None], place: str) -> Question:
    values = {name: plain(row[name] or "") for name in COLUMNS}
    if empty := [name for name, value in values.items() if not value]:
        raise ValueError(f"{place}: {empty[0]} is empty; fill it in, or delete the line")
    if values["type"] not in ("0", "1", "2", "3"):
        raise ValueError(f"{place}: type {values['type']}: it must be 0, 1, 2 or 3 ({', '.join(TYPES)})")
    return Question(values["question"], values["answer"], values["img_id"], int(values["type"]))


def find_pictures(questions: Sequence[Question], folder: str | Path) -> dict[str, Path]:
    """The file of each picture that is asked about: named by its `img_id`, with or without zeros or a name before it.

    Raises:
        ValueError: some are missing, or an id could mean two files. NotADirectoryError: there is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: give the one with the pictures as --image_dir")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    exact, numbered = {}, {}
    for file in files:
        exact.setdefault(file.stem, []).append(file)
        if number := re.search(r"0*(\d+)$", file.stem):
            numbered.setdefault(number[1], []).append(file)
    found, missing = {}, []
    for name in dict.fromkeys(question.img_id for question in questions):
        meant = exact.get(name) or exact.get(Path(name).stem) or numbered.get(name, [])
        if len(meant) > 1:
            raise ValueError(f"img_id {name}: {meant[0]} and {meant[1]} could both be meant; keep one of them")
        if meant:
            found[name] = meant[0]
        else:
            missing.append(name)
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} pictures that are asked about, such as img_id {missing[0]}")
    return found


def split(questions: Sequence[Question], share: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Questions for training and for validation; all those about one picture are on one side.

    Raises:
        ValueError: the share is not between 0 and 1, or leaves a side without pictures.
    """
    pictures = sorted({question.img_id for question in questions})
    held_out = round(len(pictures) * share) if 0 < share < 1 else 0
    if len(pictures) == 1:
        raise ValueError(f"--val_split {share:g}: there is one picture alone, which cannot be on both sides")
    if not 0 < held_out < len(pictures):
        least = math.ceil(100 / len(pictures)) / 100
        raise ValueError(
            f"--val_split {share:g}: of {len(pictures)} pictures it must leave some on both sides: give a share from "
            f"{least:g} to {1 - least:g}"
        )
    chosen = set(random.Random(seed).sample(pictures, held_out))
    return [q for q in questions if q.img_id not in chosen], [q for q in questions if q.img_id in chosen]
