"""The report of a matrix that still runs, as a browser shows it."""

import json
import shutil
import urllib.error
import urllib.request

import pytest
from test_comparison import rewrite, write_failed, write_matrix, write_metrics, write_run

from eomt.comparison import watch
from eomt.comparison.watch import CellState, Watched, cell_states, serving

NAMES = [f"{variant}/seed_{seed}" for seed in (0, 1, 2) for variant in ("none", "lora_r8", "full")]


@pytest.fixture
def finished(tmp_path):
    """What a matrix will have come to."""
    return write_matrix(tmp_path / "finished")


@pytest.fixture
def matrix(tmp_path):
    """A matrix of which no cell has begun."""
    folder = tmp_path / "matrix"
    folder.mkdir()
    facts = {"variants": ["none", "lora_r8", "full"], "seeds": [0, 1, 2], "cells": {name: {} for name in NAMES}}
    (folder / "matrix.json").write_text(json.dumps(facts))
    return folder


def finish(matrix, finished, *names):
    for name in names:
        shutil.copytree(finished / name, matrix / name)
        (matrix / name / "cell.json").write_text('{"status": "finished", "variant": "full", "seed": 0}')
        variant, seed = name.split("/seed_")
        rewrite(matrix / name / "cell.json", variant=variant, seed=int(seed))


def test_each_cell_is_finished_failed_begun_or_waiting(matrix, finished):
    finish(matrix, finished, "none/seed_0")
    write_failed(matrix / "lora_r8" / "seed_0", "lora_r8", 0, "out of memory")
    (matrix / "full" / "seed_0").mkdir(parents=True)
    write_metrics(matrix / "full" / "seed_0" / "metrics.csv", [(50, 0.1), (100, 0.2)])
    write_run(matrix / "none" / "seed_1", "none", 1)  # trained, not evaluated yet
    assert cell_states(matrix)[:5] == [
        CellState("none/seed_0", "finished"),
        CellState("lora_r8/seed_0", "failed", "out of memory"),
        CellState("full/seed_0", "begun", "step 100"),
        CellState("none/seed_1", "begun"),
        CellState("lora_r8/seed_1", "waiting"),
    ]


def test_the_page_says_how_far_it_is_and_has_the_report_once_a_cell_is_finished(matrix, finished):
    watched = Watched(matrix)
    assert watched.look() and not watched.look()
    assert "0 of 9 cells finished" in watched.page and "comes with the first run" in watched.page
    finish(matrix, finished, *NAMES[:6])
    before = watched.state
    assert watched.look() and watched.state != before
    assert "6 of 9 cells finished" in watched.page and "<table" in watched.page and "lora_r8" in watched.report
    assert not (matrix / "report").exists() and not list(matrix.glob("**/*.lock")), "it only reads"


def test_what_keeps_the_report_from_being_made_is_told_on_the_page(matrix, finished):
    finish(matrix, finished, *NAMES[:3])
    watched = Watched(matrix, baseline="no<such>")
    watched.look()
    assert "no report yet: " in watched.page and "no&lt;such&gt;" in watched.page and "no<such>" not in watched.page


def test_only_this_machine_and_no_page_of_another_site_is_answered(matrix):
    watched = Watched(matrix)
    watched.look()
    with serving(watched, 0) as address:
        assert address.startswith("http://127.0.0.1:")
        assert "0 of 9" in urllib.request.urlopen(address).read().decode()
        for path, host, code in (("state", "evil.example:80", 403), ("../matrix.json", "localhost:1", 404)):
            request = urllib.request.Request(address + path, headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError) as answer:
                urllib.request.urlopen(request)
            assert answer.value.code == code
        with pytest.raises(OSError, match=r"cannot be opened .*give another one with --port"):
            serving(watched, int(address.rstrip("/").rpartition(":")[2])).__enter__()


def test_a_folder_without_a_matrix_is_told(call_script, tmp_path):
    code, error = call_script("compare.py", "watch", tmp_path)
    assert code == 1 and "holds no matrix.json: give the output_dir of" in error


@pytest.mark.parametrize("width", [390, 1280])
def test_an_open_page_follows_the_matrix(matrix, finished, browser, monkeypatch, width):
    monkeypatch.setattr(watch, "SECONDS", 0.05)
    finish(matrix, finished, *NAMES[:3])
    watched, problems = Watched(matrix), []
    watched.look()
    with serving(watched, 0) as address:
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        assert "3 of 9 cells finished" in page.locator("#progress").inner_text()
        finish(matrix, finished, *NAMES[3:6])
        watched.look()
        page.get_by_text("6 of 9 cells finished").wait_for(timeout=20_000)
        assert page.locator("table.comparison").count() >= 1
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()
    assert not problems
