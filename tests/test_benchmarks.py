"""Benchmarks that no quick run of the project uses: for a GPU, on the CPU, and of starting with many images."""

import argparse
import json
import sys

import pytest

from benchmarks import gpu, startup_many
from benchmarks.step import Task

SMALL = Task("small", 64)


def test_steps_validation_and_inference_are_measured_eager_and_compiled():
    names = [line.name for line in gpu.lines(SMALL, "cpu")]
    eager = [name for name in names if not name.endswith(gpu.COMPILED)]
    assert len(set(names)) == len(names)
    for name in (
        "transformers' full step",
        "full step",
        "lora step",
        "lora, last 4 step",
        "lora, last 4 step, trunk cache",
        "transformers' inference",
        "inference",
        "inference, adapters unmerged",
        "inference, adapters merged",
        "validation of a 128x64 image",
    ):
        assert name in eager and name + gpu.COMPILED in names


def test_what_is_eager_is_measured_for_all_sizes_before_compilers_take_the_time():
    work = gpu.work_of(argparse.Namespace(sizes="small,large", side=64, batch=2, rounds=1, device="cpu"))
    names = [getattr(row.args[0], "name", "16-mixed") for _, row in work]
    first = next(k for k, name in enumerate(names) if name.endswith(gpu.COMPILED))
    assert {size for size, _ in work[:first]} == {size for size, _ in work[first:]} == {"small", "large"}
    assert all(name.endswith(gpu.COMPILED) for name in names[first:]) and names[:first].count("16-mixed") == 2


def test_a_compiled_line_has_the_rate_of_the_operations_that_were_counted_eagerly(monkeypatch):
    monkeypatch.setattr(gpu, "matrix_rate", lambda device: 1000)
    eager = gpu.with_rate({"what": "full step", "seconds": 2, "flops": 800}, [], "cpu")
    assert eager["flops_per_second"] == 400 and eager["share_of_matrix_rate"] == 0.4
    row = {"what": "full step, compiled", "seconds": 1, "flops": None}
    assert gpu.with_rate(row, [eager], "cpu")["share_of_matrix_rate"] == 0.8
    assert "flops_per_second" not in gpu.with_rate(row, [], "cpu")
    failed = {"what": "full step, compiled", "error": "no compiler"}
    assert gpu.with_rate(failed, [eager], "cpu") == failed


def test_a_line_that_fails_leaves_its_error():
    def fail():
        raise RuntimeError("out of memory")

    row = gpu.tried(gpu.partial(gpu.measure, gpu.Line("full step", fail), SMALL, "cpu", 1))
    assert row == {"what": "full step", "error": "RuntimeError: out of memory"}


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_all_of_it_runs_on_a_cpu_and_every_line_is_written(tmp_path, monkeypatch):
    out = tmp_path / "trial.json"
    words = ["gpu.py", "--device", "cpu", "--side", "64", "--sizes", "small", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "20"])
    assert gpu.main() == 0
    rows = json.loads(out.read_text())["sizes"]["small"]
    assert [row for row in rows if "error" in row] == []
    assert [row["what"] for row in rows if row["what"] != "20 steps in 16-mixed"] == [
        line.name for line in sorted(gpu.lines(SMALL, "cpu"), key=lambda line: line.name.endswith(gpu.COMPILED))
    ]
    (fit,) = (row for row in rows if row["what"] == "20 steps in 16-mixed")
    assert fit["steps"] == 20 and fit["losses"][1] < fit["losses"][0]


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_starting_with_many_images_tells_the_first_step_apart_from_the_end(tmp_path, monkeypatch):
    out = tmp_path / "startup.json"
    monkeypatch.setattr(sys, "argv", ["startup_many.py", "--images", "16", "--rounds", "1", "--out", str(out)])
    assert startup_many.main() == 0
    runs = json.loads(out.read_text())["runs"]
    assert [run["images"] for run in runs] == [8, 16]
    for run in runs:
        assert 0 < run["seconds_to_first_step"] < run["seconds"]
        assert 0 < run["mib_at_first_step"] <= run["peak_mib"]
