"""The table on the terminal, and as Markdown, CSV and LaTeX."""

import csv
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from eomt.comparison.facts import fact_lines
from eomt.comparison.statistics import Comparison
from eomt.comparison.table import Part, Table
from eomt.comparison.verdicts import headline
from eomt.reporting.markup import markdown_escape, tex_escape

TABLES = (("scores", "costs"), ("anomalies",), ("differences",))  # where there is room for wide ones


LATEX_TABLES = (("scores",), ("costs",), ("anomalies",), ("differences",))
LATEX_COLUMNS, LATEX_CHARACTERS = 7, 90  # of a table that fits the text of an article, in footnotesize
LATEX_LINE, LATEX_TITLE = 19, 12  # characters of a cell and of a title, from which on they are broken


def print_table(content: Table) -> None:
    """The table, in pieces that fit the terminal."""
    console = Console()
    widths = [
        max(len(text) for text in (*title.split(), *(row[k].text for row in content.rows)))
        for k, (title, _) in enumerate(content.columns)
    ]
    pieces: list[list[int]] = [[0]]
    for k in range(1, len(widths)):
        if len(pieces[-1]) > 1 and sum(widths[j] + 3 for j in (*pieces[-1], k)) + 1 > console.width:
            pieces.append([0])
        pieces[-1].append(k)
    console.print(Text(content.captions["scores"]))
    for piece in pieces:
        printed = ConsoleTable()
        for k in piece:
            printed.add_column(Text(content.columns[k][0]), justify="left" if k == 0 else "right", width=widths[k])
        for row in content.rows:
            printed.add_row(*(Text(row[k].text) for k in piece))
        console.print(printed)
    for note in content.footnotes:
        console.print(Text(note))


def markdown(comparison: Comparison, content: Table) -> str:
    """The answer, the tables, footnotes, and what was compared."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_escape, cells)) + " |"

    lines = ["# Comparison", "", *(f"* {markdown_escape(sentence)}" for sentence in headline(comparison)), ""]
    for part in (*content.parts(*TABLES), *content.beside, content.classes):
        rule = "| " + " | ".join(["---"] * len(part.titles)) + " |"
        lines += [markdown_escape(part.caption), "", line(part.titles), rule, *map(line, part.rows), ""]
    lines += [*(f"* {markdown_escape(note)}" for note in content.footnotes), "", "## What was compared", ""]
    return "\n".join([*lines, *(f"* {markdown_escape(fact)}" for fact in fact_lines(comparison))]) + "\n"


def records(comparison: Comparison, content: Table) -> list[dict[str, Any]]:
    """The values behind the table, unrounded, the IoU of every class, and why a variant is not comparable."""
    found = []
    for row in content.rows:
        values = {key: value for cell in row for key, value in cell.values.items()}
        variant = comparison[values["variant"]]
        for name in (line[0] for line in content.classes.rows):
            score = variant.class_iou(name)
            values[f"iou_percent_{name}"] = None if score is None else round(100 * score.mean, 6)
        marked = [d for d in comparison.differences if variant.name in d.variants(comparison.baseline)]
        values["not_comparable"] = f"† {'; '.join(map(str, marked))}" if marked else ""
        found.append(values)
    return found


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes what `records` returns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def latex(comparison: Comparison, content: Table) -> str:
    """Booktabs tables of up to seven columns, as many as a page of one text column takes, and their footnotes below."""
    tables = (*content.parts(*LATEX_TABLES), *content.beside, content.classes)
    parts = [piece for part in tables for piece in pieces(part)]
    lines = ["% needs \\usepackage{booktabs}", *(line for part in parts for line in _latex_table(part))]
    notes = [*content.footnotes, *fact_lines(comparison)]
    return "\n".join([*lines, r"{\footnotesize", *(rf"{tex_escape(note)}\par" for note in notes), "}", ""])


def pieces(part: Part) -> list[Part]:
    """Cuts a table between columns into as few pieces as fit a page; all begin with the first column."""
    widths = [
        max(map(_width, (*_lines(title, LATEX_TITLE), *(line for text in column for line in _lines(text)))))
        for title, *column in zip(part.titles, *part.rows, strict=True)
    ]

    def fits(columns: Sequence[int]) -> bool:
        return len(columns) <= LATEX_COLUMNS and sum(widths[k] + 2 for k in columns) <= LATEX_CHARACTERS

    for count in range(1, len(part.titles)):
        cut = [[0, *piece] for piece in np.array_split(range(1, len(part.titles)), count)]
        if count == len(part.titles) - 1 or all(map(fits, cut)):
            break
    place = [f" ({k + 1} of {count})" * (count > 1) for k in range(count)]
    rows = [[[row[k] for k in columns] for row in (part.titles, *part.rows)] for columns in cut]
    return [Part(part.caption + where, titles, body) for where, (titles, *body) in zip(place, rows, strict=True)]


def _lines(text: str, length: int = LATEX_LINE) -> list[str]:
    """The lines that a long text of a LaTeX cell is broken into."""
    if len(text) <= length:
        return [text]
    return [
        line
        for piece in re.split(r" (?=\(|over |±)", text)
        for line in textwrap.wrap(piece, length, break_long_words=False)
    ]


def _width(line: str) -> float:
    """About the width in digits; capitals are wider."""
    return len(line) + 0.4 * sum(map(str.isupper, line))


def _latex_table(part: Part) -> list[str]:
    """A float; lines that were broken stand below each other in their cell."""

    def cell(place: str, lines: list[str]) -> str:
        broken = r"\\".join(map(tex_escape, lines))
        return rf"\begin{{tabular}}[{place}]{{@{{}}r@{{}}}}{broken}\end{{tabular}}" if len(lines) > 1 else broken

    def line(texts: Sequence[str], place: str, length: int) -> str:
        return " & ".join([tex_escape(texts[0]), *(cell(place, _lines(text, length)) for text in texts[1:])]) + r" \\"

    return [
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{tex_escape(part.caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(part.titles) - 1)}}}",
        r"\toprule",
        line(part.titles, "b", LATEX_TITLE),
        r"\midrule",
        *(line(row, "t", LATEX_LINE) for row in part.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
