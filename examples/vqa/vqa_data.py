"""Questions in ViVQA's CSV (`,question,answer,img_id,type`) and their pictures in a folder."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from vqa_tokens import encode_answers, plain

from eomt.data.pictures import decode_picture, to_rgb
from eomt.files import PICTURES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("question", "answer", "img_id", "type")
TYPES = ("object", "number", "colour", "location")  # 0 to 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of DINOv2's training


class Question(NamedTuple):
    """A question about a picture; `type` is an index of `TYPES`."""

    question: str
    answer: str
    img_id: str
    type: int


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
    if not 0 < held_out < len(pictures):
        raise ValueError(
            f"--val_split {share:g}: of {len(pictures)} pictures it must leave some on both sides, for example 0.1"
        )
    chosen = set(random.Random(seed).sample(pictures, held_out))
    return [q for q in questions if q.img_id not in chosen], [q for q in questions if q.img_id in chosen]


def read_picture(path: Path, size: int) -> Tensor:
    """A picture as float32 [3, size, size], normalised for DINOv2; 0 is its mean colour."""
    picture = to_rgb(decode_picture(path.read_bytes(), str(path)), str(path))
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(picture, dtype=np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)


class Questions(Dataset):
    """Pictures, questions and answers; each item is one question.

    Args:
        questions: what is asked.
        folder: with the pictures.
        size: in pixels, that pictures are resized to.
        weights: of answers in the loss; None: all 1.

    Raises:
        ValueError: pictures are missing, or an answer has no weight.
    """

    def __init__(
        self, questions: Sequence[Question], folder: str | Path, size: int, weights: dict[str, float] | None = None
    ) -> None:
        self.questions, self.size = list(questions), size
        self.pictures = find_pictures(questions, folder)
        lacking = sorted({q.answer for q in questions if weights is not None and q.answer not in weights})
        if lacking:
            raise ValueError(
                f"--answer_weights has no weight for {len(lacking)} answers, such as {lacking[0]!r}: run "
                "compute_answer_weights.py on the CSV that is trained on"
            )
        self.weights = [1.0 if weights is None else weights[q.answer] for q in questions]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[Tensor, Question, float]:
        question = self.questions[index]
        return read_picture(self.pictures[question.img_id], self.size), question, self.weights[index]


class Collate:
    """Makes a batch of items: what `DeterministicVQA.forward` takes, by name, and the questions themselves.

    Args:
        tokenizer: of questions and answers.
        longest: tokens that the text encoder takes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        self.tokenizer, self.longest = tokenizer, longest

    def __call__(self, items: Sequence[tuple[Tensor, Question, float]]) -> dict[str, Any]:
        pictures, questions, weights = zip(*items, strict=True)
        text = self.tokenizer([q.question for q in questions], padding=True, return_tensors="pt")
        answers = encode_answers(self.tokenizer, [q.answer for q in questions])
        labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in answers], True, -100)
        longest = max(text["input_ids"].shape[1], labels.shape[1])
        if longest > self.longest:
            raise ValueError(
                f"a question or answer has {longest} tokens, and the network takes {self.longest}: raise "
                "text.max_position_embeddings in the configuration"
            )
        return {
            "pixel_values": torch.stack(pictures),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "labels": labels,
            "types": torch.tensor([q.type for q in questions]),
            "weights": torch.tensor(weights),
            "questions": questions,
        }


def loader(dataset: Questions, collate: Collate, batch_size: int, shuffle: bool, num_workers: int = 0) -> DataLoader:
    """Batches of a data set; the order is drawn from torch's own seed."""
    return DataLoader(
        dataset, batch_size, shuffle, num_workers=num_workers, collate_fn=collate, persistent_workers=num_workers > 0
    )
