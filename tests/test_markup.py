"""Class names and errors stand in Markdown and LaTeX as they are."""

import html
import re

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from eomt.reporting.markup import markdown_escape, tex_escape

SPECIAL = "|\\`*_<>&%$#{}~^[]()!-+=.:\"'1a \n"
TEXTS = st.text(st.sampled_from(SPECIAL), max_size=20) | st.text(max_size=20)
RENDER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(markup):
    """What a reader sees: the text without tags, spaces as one."""
    return " ".join(html.unescape(re.sub(r"</?(p|ul|li|table|thead|tbody|tr|t[hd])>", " ", markup)).split())


def words(text):
    return " ".join(text.replace("\0", "\N{REPLACEMENT CHARACTER}").split())


@given(TEXTS)
def test_markdown_shows_any_text_as_it_stands(text):
    escaped = markdown_escape(text)
    assert shown(RENDER.render(f"* {escaped}\n")) in (words(text), "* " + words(text))
    table = RENDER.render(f"| a | b |\n| --- | --- |\n| {escaped} | end |\n")
    assert shown(table) == f"a b {words(text)} end".replace("  ", " ")
    assert "$" not in escaped.replace("\\$", "")


@given(TEXTS)
def test_latex_has_no_character_with_a_meaning_left(text):
    escaped = tex_escape(text)
    plain = re.sub(r"\\text\w+\{\}|\\[&%$#_{}]|\$[-]\$|\$\\(pm|dagger)\$", "", escaped)
    assert not re.search(r"[\\&%$#_{}~^<>|`\n\r]", plain), escaped


def test_the_characters_that_matter():
    assert tex_escape("a_b\n<&%$#{}~^\\|") == (
        r"a\_b \textless{}\&\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textbar{}"
    )
    assert markdown_escape("a|b\n*c* `d`") == r"a\|b \*c\* \`d\`"
