"""The report of a matrix while it runs, for a browser on the same machine: it only reads, and writes nothing there."""

import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from eomt.comparison.cells import status
from eomt.comparison.tuning import FOLDER, read_tuning
from eomt.settings.formats import CELL, MATRIX, read_format

SECONDS = 3  # between two looks
WAITING = "the report comes with the first run that is finished"
NAMES = ("127.0.0.1", "localhost", "[::1]")  # a page of another site has no business here
SCRIPT = """<script>
setInterval(async () => {
  try { if (await (await fetch("state")).text() !== document.body.dataset.state) location.reload() } catch {}
}, %d)
</script>"""
PLAIN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Matrix</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 1200px; padding: 0 1rem; }
details summary { cursor: pointer; } td, th { text-align: left; padding: .2rem .8rem .2rem 0; }</style>
</head>
<body></body></html>"""


@dataclass(frozen=True)
class CellState:
    """How far a cell is: "finished", "failed", "begun" or "waiting", with the step it has come to, or its error."""

    name: str
    state: str
    detail: str = ""


def cell_states(matrix: Path) -> list[CellState]:
    """Returns how far each cell of a matrix is, in the matrix's order; trials of `tune=` are cells, too.

    Raises:
        FileNotFoundError: the folder holds no matrix.
    """
    if not (matrix / "matrix.json").is_file():
        raise FileNotFoundError(f"{matrix} holds no matrix.json: give the output_dir of scripts/compare.py run")
    return [cell_state(matrix / name, name) for name in read_format(matrix / "matrix.json", MATRIX)["cells"]]


def cell_state(folder: Path, name: str) -> CellState:
    """Returns how far one cell is. It takes no lock, which a run that starts would find taken."""
    cell = read_format(folder / "cell.json", CELL, {})
    if cell.get("status") == "failed":
        return CellState(name, "failed", cell.get("error") or "")
    if cell.get("status") == "finished" == status(folder):
        return CellState(name, "finished")
    step = last_step(folder / "metrics.csv")
    begun = folder.is_dir()
    return CellState(name, "begun" if begun else "waiting", "" if step is None else f"step {step}")


def last_step(metrics: Path) -> int | None:
    """The last step that a run has logged; None where there is none yet."""
    try:
        with metrics.open(newline="") as file:
            steps = [row.get("step") for row in csv.DictReader(file)]
    except OSError:
        return None
    return next((int(step) for step in reversed(steps) if step and step.isdigit()), None)


def progress_html(states: list[CellState], note: str = "") -> str:
    """A block of HTML: how many cells are done, which are at work, and a list of all."""
    counts = {state: sum(cell.state == state for cell in states) for state in ("finished", "failed", "begun")}
    words = f"{counts['finished']} of {len(states)} cells finished"
    words += f", {counts['failed']} failed" * bool(counts["failed"])
    at_work = ", ".join(f"{cell.name} {cell.detail}".strip() for cell in states if cell.state == "begun")
    rows = "".join(
        f"<tr><td>{escape(cell.name)}</td><td>{cell.state}</td><td>{escape(cell.detail)}</td></tr>" for cell in states
    )
    parts = [f"<strong>{words}</strong>", at_work and f"begun: {escape(at_work)}", escape(note)]
    text = "<br>".join(part for part in parts if part)
    return (
        f'<aside id="progress" style="padding:1rem;max-width:1200px;margin:0 auto">{text}'
        f"<details><summary>all cells</summary><table>{rows}</table></details></aside>"
    )


class Watched:
    """The page of a matrix, made anew when a cell has come further.

    Args:
        matrix: its folder.
        baseline, score: as for the report.
    """

    def __init__(self, matrix: Path, baseline: str | None = None, score: str | None = None) -> None:
        self.matrix, self.options = matrix, {"baseline": baseline, "score": score}
        self.states: list[CellState] | None = None
        self.report, self.note = PLAIN, ""
        self.page = self.state = ""

    def look(self) -> bool:
        """Reads how far the cells are; returns whether the page has changed."""
        states = cell_states(self.matrix)
        if states == self.states:
            return False
        ended = [cell for cell in states if cell.state in ("finished", "failed")]
        if self.states is None or ended != [cell for cell in self.states if cell.state in ("finished", "failed")]:
            runs = [cell for cell in ended if not cell.name.startswith(f"{FOLDER}/")]  # and no trials
            self.report, self.note = self.render(any(cell.state == "finished" for cell in runs))
        self.states, self.state = states, json.dumps([time.time(), len(ended)])
        body = f"<body data-state='{escape(self.state)}'>{progress_html(states, self.note)}"
        self.page = self.report.replace("<body>", body, 1).replace("</body>", f"{SCRIPT % (1000 * SECONDS)}</body>", 1)
        return True

    def render(self, finished: bool) -> tuple[str, str]:
        """Returns the report of what is finished, without pictures of predictions, and why it is missing."""
        if not finished:
            return PLAIN, WAITING
        from eomt.comparison.page import write_report
        from eomt.comparison.runs import load_runs

        with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            try:
                runs = [run for run in load_runs([self.matrix]) if run.error is None or run.cell.get("status")]
                write_report(runs, Path(folder), tunings=list(read_tuning(self.matrix)), **self.options)
                return (Path(folder) / "report.html").read_text(encoding="utf-8"), ""
            except (ValueError, FileNotFoundError) as error:
                return PLAIN, f"no report yet: {error}"


def handler_of(pages: Mapping[str, Callable[[], tuple[str, str]]]) -> type[BaseHTTPRequestHandler]:
    """A handler that answers GET for these paths with (type, text), and says 404 or, to other sites, 403."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("Host", "").rpartition(":")[0] in NAMES
            if not allowed or self.path not in pages:
                return self.send_error(404 if allowed else 403)
            kind, text = pages[self.path]()
            content = text.encode()
            self.send_response(200)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", len(content)),
                ("Cache-Control", "no-store"),
            ):
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Says nothing: a line for every look would hide the address."""

    return Handler


@contextmanager
def serving(watched: Watched, port: int) -> Iterator[str]:
    """Serves the page on 127.0.0.1 in the block; yields its address. Port 0: any that is free.

    Raises:
        OSError: the port is taken.
    """
    pages = {
        "/": lambda: ("text/html; charset=utf-8", watched.page),
        "/state": lambda: ("text/plain", watched.state),
    }
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler_of(pages))
    except OSError as error:
        raise OSError(f"port {port} of 127.0.0.1 cannot be opened ({error}): give another one with --port") from error
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def watch(matrix: Path, port: int, baseline: str | None = None, score: str | None = None) -> None:
    """Serves the report of a matrix until Ctrl-C, and makes it anew as cells finish."""
    watched = Watched(matrix, baseline, score)
    watched.look()
    with serving(watched, port) as address:
        print(f"{address} shows {matrix}; Ctrl-C ends the watching, the matrix goes on", flush=True)
        while True:
            time.sleep(SECONDS)
            watched.look()
