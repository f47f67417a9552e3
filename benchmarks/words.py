"""How figures are put into Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from eomt.comparison.table import NONE

Facts = Mapping[str, Any]  # what a JSON file of benchmarks/ holds, or a part of it


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left."""
    first, *others = ("| " + " | ".join(line) + " |" for line in (titles, *rows))
    return "\n".join([first, "|" + "---|" * len(titles), *others])


def span(values: Sequence[float], form: str = ".0f") -> str:
    """`18 to 20`, or `18` where both are the same."""
    return " to ".join(dict.fromkeys(format(end, form) for end in (min(values), max(values))))


def number(value: float | None, form: str, scale: float = 1) -> str:
    return NONE if value is None else format(value * scale, form)
