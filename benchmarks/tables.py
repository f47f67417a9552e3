"""Writes the tables and sentences of README and docs that show figures, from the JSON files of benchmarks/.

A table stands between `<!-- table NAME: benchmarks/FILE.json -->` and `<!-- end of table -->`, a paragraph with figures
between `<!-- figures NAME: benchmarks/FILE.json -->` and `<!-- end of figures -->`. NAME is a function in one of
benchmarks/*figures.py, which makes Markdown of what the JSON file holds.

    python benchmarks/tables.py
"""

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import camvid_figures, exchange_figures, figures, speed_figures  # noqa: E402
from eomt.command_line import reports_errors  # noqa: E402
from eomt.files import read_json, write_text  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<start><!-- (?P<kind>table|figures) (?P<name>\w+): (?P<file>benchmarks/\S+\.json) -->\n)"
    r"(?P<text>.*?)(?P<end><!-- end of (?P=kind) -->)",
    re.DOTALL,
)


RENDERERS = {
    name: function
    for module in (figures, speed_figures, exchange_figures, camvid_figures)
    for name, function in vars(module).items()
    if getattr(function, "__module__", None) == module.__name__
}


@reports_errors()
def main() -> int:
    """Writes every page whose figures are not those of the JSON files; returns 0, or 1 with one sentence."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = BLOCK.sub(lambda block: block["start"] + rendered(block) + block["end"], text)
        if filled != text:
            write_text(page, filled)
            print(f"{page.name} is written")
    return 0


def rendered(block: re.Match[str]) -> str:
    """What has to stand between the marks of a block; sentences are broken into lines.

    Raises:
        ValueError: there is no such function. FileNotFoundError: there is no such file.
    """
    render = RENDERERS.get(block["name"])
    if render is None:
        raise ValueError(f"{block['start'].strip()} names no function of benchmarks/*figures.py")
    text = render(read_json(ROOT / block["file"]))
    return (text if block["kind"] == "table" else "\n".join(map(broken, paragraphs(text)))) + "\n"


def paragraphs(text: str) -> list[str]:
    """Its points, where it is a list, or all of it."""
    return [part for part in re.split(r"\n\s*(?=\* )", text) if part.strip()]


def broken(text: str) -> str:
    """A sentence, or a point of a list, in lines of up to 120 characters."""
    words = " ".join(text.split())
    indent = "  " * words.startswith("* ")
    return textwrap.fill(words, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
