import json
import os
import subprocess
from pathlib import Path

import pytest
import warm
from PIL import Image

from eomt.data.toy_streets import write_toy_streets

ROOT = Path(__file__).parents[1]


def report(*arguments):
    return subprocess.run(
        [warm.python(), "scripts/dataset_report.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_streets(tmp_path_factory.mktemp("toy"), "clear", 3, 2, (64, 128), 0)


def test_a_report_tells_counts_and_draws_a_grid(toy, tmp_path):
    run = report("data=cityscapes", f"data.root={toy}", "data.num_workers=0", "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "vegetation" in run.stdout and "0 broken" in run.stdout
    train = json.loads((tmp_path / "counts.json").read_text())["splits"]["train"]
    assert train["images"] == 3 and train["sizes"] == {"64x128": 3} and train["broken"] == {}
    assert sum(entry["pixel_share"] for entry in train["classes"]) == pytest.approx(1)
    pixels = sum(entry["pixels"] for entry in train["classes"])
    assert pixels / (1 - train["ignored_share"]) == pytest.approx(3 * 64 * 128)
    assert "| road |" in (tmp_path / "report.md").read_text()
    assert Image.open(tmp_path / "grid.png").size[0] > 500


def test_broken_and_empty_files_are_listed_and_the_exit_code_is_1(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for index in range(count):
            for folder, mode, value in ((split, "RGB", 0), (f"{split}annot", "L", 11 if index == 0 else 3)):
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.new(mode, (12, 8), value).save(tmp_path / folder / f"s_{index}.png")
    (tmp_path / "train" / "s_1.png").write_bytes(b"half")
    (tmp_path / "train" / "._s_1.png").write_bytes(b"")
    run = report(
        "data=camvid", f"data.root={tmp_path}", "data.num_workers=0", "--split", "train", "--out", tmp_path / "o"
    )
    assert run.returncode == 1, run.stderr
    assert "s_1.png cannot be decoded" in run.stdout
    counts = json.loads((tmp_path / "o" / "counts.json").read_text())
    assert counts["left_out"] == {"hidden, or left by a system": 1} and "left out: 1 (hidden, or " in run.stdout
    assert "left out: 1 (hidden, or " in (tmp_path / "o" / "report.md").read_text()
    splits = counts["splits"]
    assert list(splits) == ["train"]
    assert list(splits["train"]["broken"]) == ["s_1"] and splits["train"]["empty"] == ["s_0"]
    assert next(entry for entry in splits["train"]["classes"] if entry["name"] == "road")["pixels"] == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data=nothing",), "choose from camvid, cityscapes, folder, toy_streets"),
        (("data=camvid",), "data.root is required"),
        (
            ("data=camvid", "data.root=/nowhere", "data.sequence=[a]"),
            "data.sequence is not in the configuration; did you mean sequences",
        ),
        (("data.root=/nowhere",), "name a dataset"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_and_exit_code_2(arguments, message, tmp_path):
    run = report(*arguments, "--out", tmp_path)
    assert run.returncode == 2
    assert message in run.stderr and "Traceback" not in run.stderr


def test_help_shows_examples():
    run = report("--help")
    assert run.returncode == 0 and "examples:" in run.stdout
