"""The table on the terminal, and as Markdown, CSV and LaTeX."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from eomt.comparison.statistics import Comparison
from eomt.comparison.table import Table
from eomt.comparison.verdicts import headline
from eomt.reporting.markup import markdown_escape, tex_escape

TABLES = (("scores", "costs"), ("anomalies",), ("differences",))  # where there is room for wide ones


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
    """The answer, the table, that of anomalies and their differences apart, and footnotes."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = ["# Comparison", "", *(f"* {markdown_escape(sentence)}" for sentence in headline(comparison)), ""]
    for caption, columns in content.parts(*TABLES):
        titles = [markdown_escape(content.columns[k][0]) for k in columns]
        lines += [markdown_escape(caption), "", line(titles), line(["---"] * len(titles))]
        lines += [*(line([markdown_escape(row[k].text) for k in columns]) for row in content.rows), ""]
    return "\n".join([*lines, *(f"* {markdown_escape(note)}" for note in content.footnotes)]) + "\n"


def write_csv(path: Path, comparison: Comparison, content: Table) -> None:
    """The values behind the table, unrounded, and why a variant is not comparable."""
    reasons = {
        variant.name: "; ".join(
            str(d) for d in comparison.differences if variant.name in d.variants(comparison.baseline)
        )
        for variant in comparison.variants
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [{key: value for cell in row for key, value in cell.values.items()} for row in content.rows]
        writer = csv.DictWriter(file, [*rows[0], "not_comparable"])
        writer.writeheader()
        for row in rows:
            reason = reasons[row["variant"]]
            writer.writerow(row | {"not_comparable": f"† {reason}" if reason else ""})


def latex(content: Table) -> str:
    """Booktabs tables as wide as the page, the last one with the footnotes."""
    tables = [_latex_table(content, *part) for part in content.parts(*TABLES)]
    notes = [r"\par\footnotesize", *(rf"{tex_escape(note)}\par" for note in content.footnotes)]
    lines = [line for table in tables[:-1] for line in (*table, r"\end{table*}")]
    lines += [*tables[-1], *notes, r"\end{table*}"]
    return "\n".join(["% needs \\usepackage{booktabs,graphicx}", *lines, ""])


def _latex_table(content: Table, caption: str, columns: Sequence[int]) -> list[str]:
    """Without its end; the units of a column stand in a second line."""
    titles = [content.columns[k][0].partition(", ")[::2] for k in columns]
    body = [[row[k].text for k in columns] for row in content.rows]
    lines = [" & ".join(map(tex_escape, cells)) + r" \\" for cells in (*zip(*titles, strict=True), *body)]
    return [
        r"\begin{table*}",
        rf"\caption{{{tex_escape(caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
        r"\toprule",
        *lines[:2],
        r"\midrule",
        *lines[2:],
        r"\bottomrule",
        r"\end{tabular}}",
    ]
