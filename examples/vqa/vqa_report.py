"""What is told about the data and the answers: counts, and pictures of both."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from vqa_data import MEAN, STD, Questions
from vqa_module import answer_all
from vqa_questions import TYPES, Question

from eomt.files import replacing

COMMON = 8  # answers of each type that are shown
SAMPLES = 8  # pictures of a page


def count_answers(questions: Sequence[Question]) -> dict[str, Counter]:
    """How often each answer is given, by type."""
    counts = {name: Counter() for name in TYPES}
    for question in questions:
        counts[TYPES[question.type]][question.answer] += 1
    return counts


def describe(questions: Sequence[Question]) -> str:
    """The counts by type, and what always saying the most common answer would score."""
    lines = [f"{len(questions)} questions about {len({q.img_id for q in questions})} pictures"]
    for name, answers in count_answers(questions).items():
        if not answers:
            lines.append(f"  {name}: none")
            continue
        common = ", ".join(f"{answer} {count}" for answer, count in answers.most_common(COMMON))
        top = 100 * answers.most_common(1)[0][1] / answers.total()
        rest = f" and {len(answers) - COMMON} more" if len(answers) > COMMON else ""
        lines.append(f"  {name}: {answers.total()} questions, {len(answers)} answers: {common}{rest}")
        lines.append(f"    always the most common answer: {top:.1f} % exact match")
    return "\n".join(lines)


def draw_analysis(questions: Sequence[Question], path: Path) -> None:
    """Writes a picture of the counts: of the types, and of the most common answers of each."""
    import matplotlib.pyplot as plt

    counts = count_answers(questions)
    figure, axes = plt.subplots(1, len(TYPES) + 1, figsize=(16, 3.5), layout="constrained")
    charts = {"questions by type": Counter({name: each.total() for name, each in counts.items()}), **counts}
    for axis, (title, chart) in zip(axes, charts.items(), strict=True):
        names, values = zip(*chart.most_common(COMMON), strict=True) if chart else ((), ())
        axis.barh(names, values)
        axis.invert_yaxis()
        axis.set_title(title)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=100)
    plt.close(figure)


def draw_samples(items: Sequence[tuple[Tensor, Question, float]], said: Sequence[str], path: Path) -> None:
    """Writes a page of pictures with question, answer and prediction; the items are those of `Questions`."""
    import matplotlib.pyplot as plt

    rows = -(-len(said) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(14, 3.8 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (pixels, question, _), prediction in zip(axes.flat, items, said, strict=False):
        picture = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(f"{question.question}?\nanswer: {question.answer}\npredicted: {prediction or '(nothing)'}")
    with replacing(path) as draft:
        figure.savefig(draft, dpi=80)
    plt.close(figure)


class Samples(Callback):
    """Draws what the network answers to a few validation questions, the same ones every few epochs.

    Args:
        dataset: of the validation. collate: of its batches.
        folder: for `epoch_N.png`.
        every: how many epochs lie between.
    """

    def __init__(self, dataset: Questions, collate: Any, folder: Path, every: int) -> None:
        self.dataset, self.collate, self.folder, self.every = dataset, collate, folder, every

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.sanity_checking or epoch % self.every:
            return
        chosen = random.Random(0).sample(range(len(self.dataset)), min(SAMPLES, len(self.dataset)))
        items = [self.dataset[index] for index in chosen]
        rows = answer_all(module.network, module.tokenizer, [self.collate(items)])
        draw_samples(items, [row.prediction for row in rows], self.folder / f"epoch_{epoch}.png")
