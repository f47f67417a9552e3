"""Exact match and token F1 of answers, with intervals over questions, beside those of a blank picture.

torchmetrics' SQuAD is not used: it drops English articles, which makes "toàn" of "an toàn", and takes letters that were
typed in parts for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from vqa_questions import TYPES, plain

from eomt.comparison.bootstrap import resample

COLUMNS = ("questions", "EM", "95 %", "F1", "blank EM", "blank F1", "EM - blank", "95 %")


@dataclass(frozen=True)
class Answered:
    """A question of a type, its answer, and what the network says with the picture and with a blank one.

    `type_told` is the type that the network takes the question for; None where it was not trained to tell.
    """

    question: str
    type: int
    answer: str
    prediction: str
    blank: str
    type_told: int | None = None


@dataclass(frozen=True)
class Score:
    """Means over questions in percent, with 95 % intervals; `gain` is EM less that of the blank picture."""

    questions: int
    em: float
    em_interval: tuple[float, float]
    f1: float
    blank_em: float
    blank_f1: float
    gain: float
    gain_interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


def normalise(text: str) -> str:
    """Text in NFC and lower case with single spaces."""
    return plain(plain(text).lower())


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same text, else 0."""
    return float(normalise(prediction) == normalise(answer))


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the words that both have, each as often as it occurs; 1 where neither has any."""
    ours, theirs = Counter(normalise(prediction).split()), Counter(normalise(answer).split())
    if not ours and not theirs:
        return 1.0
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of values [N], by drawing questions again."""
    means = values[resample(len(values))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def score(rows: Sequence[Answered]) -> Score:
    """The scores of some questions; ValueError if there are none."""
    if not rows:
        raise ValueError("there are no questions to score: give some")
    em = 100 * np.array([exact_match(row.prediction, row.answer) for row in rows])
    blank = 100 * np.array([exact_match(row.blank, row.answer) for row in rows])
    return Score(
        questions=len(rows),
        em=float(em.mean()),
        em_interval=interval(em),
        f1=100 * float(np.mean([token_f1(row.prediction, row.answer) for row in rows])),
        blank_em=float(blank.mean()),
        blank_f1=100 * float(np.mean([token_f1(row.blank, row.answer) for row in rows])),
        gain=float((em - blank).mean()),
        gain_interval=interval(em - blank),
    )


def scores_by_type(rows: Sequence[Answered]) -> dict[str, Score]:
    """The scores of all questions and of each type that there is."""
    groups = {name: [row for row in rows if row.type == kind] for kind, name in enumerate(TYPES)}
    return {name: score(group) for name, group in {"all": rows, **groups}.items() if group}


def type_accuracy(rows: Sequence[Answered]) -> float | None:
    """How many questions' types were told, in percent; None where the network does not tell."""
    told = [row.type_told == row.type for row in rows if row.type_told is not None]
    return 100 * sum(told) / len(told) if told else None


def type_line(accuracy: float | None) -> str:
    """A line for it, if there is something to say."""
    return "" if accuracy is None else f"\nThe question's type is told in {accuracy:.1f} %.\n"


def table(scores: Mapping[str, Score]) -> str:
    """The scores in Markdown, and whether the picture was of use."""
    lines = [f"| type | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, one in scores.items():
        cells = [f"{one.questions}", f"{one.em:.1f}", span(one.em_interval), f"{one.f1:.1f}", f"{one.blank_em:.1f}"]
        cells += [f"{one.blank_f1:.1f}", f"{one.gain:+.1f}", span(one.gain_interval)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", reading(scores["all"])])


def span(ends: tuple[float, float]) -> str:
    """`54.0 to 67.5`"""
    return f"{ends[0]:.1f} to {ends[1]:.1f}"


def reading(one: Score) -> str:
    """What the difference to a blank picture says."""
    if one.gain_interval[0] > 0:
        return f"The picture is worth {one.gain:.1f} points of exact match ({span(one.gain_interval)})."
    return (
        f"With a blank picture the network answers {one.blank_em:.1f} % as well: no use of the picture can be measured "
        f"(a difference of {span(one.gain_interval)})."
    )
