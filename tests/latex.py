"""Setting a report's LaTeX tables, to see that they fit a page."""

import shutil
import subprocess

import pytest

PAGE = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{report.tex}\end{document}"
needs_latex = pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no LaTeX to set the tables with")


def assert_fits_the_page(report):
    (report / "page.tex").write_text(PAGE)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    result = subprocess.run(command, cwd=report, capture_output=True, text=True, errors="replace")
    assert result.returncode == 0, result.stdout[-2000:]
    assert "Overfull" not in result.stdout and "Float too large" not in result.stdout
