"""Questions and pictures as batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from vqa_questions import Question, find_pictures
from vqa_tokens import encode_answers

from eomt.data.pictures import decode_picture, to_rgb, upright

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of DINOv2's training


def read_picture(path: Path, size: int) -> Tensor:
    """A picture as it is to be seen, as float32 [3, size, size], normalised for DINOv2; 0 is its mean colour."""
    picture = to_rgb(upright(decode_picture(path.read_bytes(), str(path))), str(path))
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
        weights: of all answers in the loss; None: 1.

    Raises:
        ValueError: pictures are missing.
    """

    def __init__(
        self, questions: Sequence[Question], folder: str | Path, size: int, weights: dict[str, float] | None = None
    ) -> None:
        self.questions, self.size = list(questions), size
        self.pictures = find_pictures(questions, folder)
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


class EpochOrder(Sampler[int]):
    """An order for each epoch, which is the same in a run that goes on from there.

    Args:
        length: how many there are to order.
        seed: of all orders.
        epoch: says which one begins.
    """

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length, self.seed, self.epoch = length, seed, epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng((self.seed, self.epoch())).permutation(self.length).tolist())


def loader(
    dataset: Questions, collate: Collate, batch_size: int, order: Sampler[int] | None = None, num_workers: int = 0
) -> DataLoader:
    """Batches of a data set, in its own order or another."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=order,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # its own: torch's draws are those of dropout
    )
