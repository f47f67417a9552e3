"""JSON that is read later says its schema and the version that wrote it; one to come is answered with a sentence."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY

from eomt import __version__
from eomt.comparison.cells import status
from eomt.comparison.matrix import continue_matrix
from eomt.comparison.runs import load_runs
from eomt.diagnosis.doctor import diagnose
from eomt.diagnosis.inspection import inspect_model
from eomt.settings.formats import EVALUATION, read_format, stamped
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SAVED = Path(__file__).parent / "saved"
open_ = MaskClassificationSemantic.from_pretrained
SENTENCE = r"{} has schema\w* 99, written by eomt-lora 9\.9; this is .*, which reads up to 1: install the version"


def edit(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


@pytest.fixture
def run(tmp_path):
    shutil.copytree(SAVED / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("adapter/eomt_config.json", (open_, inspect_model, lambda run: diagnose(run, run))),
        ("summary.json", (lambda run: load_runs([run]), status)),
        ("cell.json", (lambda run: load_runs([run]),)),
        ("evaluation/target.json", (lambda run: load_runs([run]),)),
        ("anomaly/toy_anomalies.json", (lambda run: load_runs([run]),)),
        ("matrix.json", (lambda run: load_runs([run]), lambda run: continue_matrix(run, {}))),
    ],
)
def test_a_file_of_a_version_to_come_is_named_with_the_version_that_wrote_it(run, name, uses):
    (run / name).parent.mkdir(exist_ok=True)
    edit(run / name, eomt_lora="9.9", **{"schema" if "config" in name else "schema_version": 99})
    for use in uses:
        with pytest.raises(ValueError, match=SENTENCE.format(name)):
            use(run)


@pytest.mark.parametrize("number", ["one", 0, -1, True, None, 1.5])
def test_a_schema_that_is_no_number_is_refused(tmp_path, number):
    edit(tmp_path / "a.json", schema_version=number)
    with pytest.raises(ValueError, match=r"schema_version .*: a number from 1 to 1"):
        read_format(tmp_path / "a.json", EVALUATION)


@pytest.mark.parametrize("name", ["miou", "class_iou", "classes", "images"])
def test_an_evaluation_that_lost_an_entry_is_named(run, name):
    facts = {"miou": 0.5, "class_iou": {"road": 0.5}, "classes": ["road"], "images": ["a"]}
    (run / "evaluation").mkdir()
    edit(run / "evaluation" / "target.json", **(facts | {name: None}))
    with pytest.raises(ValueError, match=rf"target\.json has no {name} as it was written"):
        load_runs([run])


def test_what_is_written_now_says_its_schema_and_version(tmp_path):
    MaskClassificationSemantic(**TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "eomt_config.json").read_text())
    assert config["schema"] == 1 and config["eomt_lora"] == __version__
    assert stamped(EVALUATION, {"a": 2}) == {"schema_version": 1, "eomt_lora": __version__, "a": 2}
