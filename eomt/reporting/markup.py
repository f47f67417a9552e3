"""Text from elsewhere, class names and errors among it, as Markdown and LaTeX show it: as it stands."""

import re

MARKDOWN = re.compile(r"([\\`*_\[\]<>&|#~$!])")
START = re.compile(r"^(\d*)([-+=.)])")  # of a list, a rule or a heading
BREAKS = re.compile(r"[\r\n\t\v\f\x1c-\x1e\x85\u2028\u2029]+")  # whatever some reader takes for the end of a line
TEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "±": r"$\pm$",
    "†": r"$\dagger$",
}


def markdown_escape(text: str) -> str:
    """Returns text in one line in which Markdown, tables and formulas of GitHub included, finds nothing to mark up."""
    return START.sub(r"\1\\\2", MARKDOWN.sub(r"\\\1", BREAKS.sub(" ", text).strip()))


def tex_escape(text: str) -> str:
    """Returns text in one line in which LaTeX finds no command."""
    return "".join(TEX.get(character, character) for character in BREAKS.sub(" ", text))
