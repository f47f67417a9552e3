"""What earlier versions saved opens, and says what it said then: one of each, written at commit 7d5a494."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eomt.comparison.evaluations import evaluate_run
from eomt.comparison.runs import load_runs
from eomt.diagnosis.doctor import diagnose
from eomt.inference.saved import results_of
from eomt.reporting.evaluation_report import evaluate_artefact
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize(
    ("artefact", "expected", "base"),
    [
        ("model", "full", None),
        ("full.ckpt", "full", None),
        ("adapter", "lora", SAVED / "model"),
        ("lora.ckpt", "lora", SAVED / "model"),
    ],
)
def test_an_artefact_of_an_earlier_version_opens_and_predicts_what_it_did(artefact, expected, base):
    then = load_file(SAVED / "expected.safetensors")
    module = MaskClassificationSemantic.from_pretrained(SAVED / artefact, base and str(base))
    with torch.no_grad(), module.network.deployed():
        masks, classes = module.network(then["image"] / 255)
    torch.testing.assert_close(masks[0], then[f"{expected}.masks"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classes[0], then[f"{expected}.classes"], rtol=1e-5, atol=1e-5)


def test_the_folder_of_an_earlier_run_is_opened_reported_and_diagnosed(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(SAVED / "run", run)
    summary = json.loads((run / "summary.json").read_text())
    module = MaskClassificationSemantic.from_pretrained(run)
    assert module.lora is not None and module.hparams.lora_rank == 2
    (read,) = load_runs([run])
    assert read.error is None and read.steps == summary["steps"] == 4 and read.uses_lora
    assert read.start.exact == summary["start_fingerprint"] and read.start.stored is None
    findings = diagnose(run, run)
    failed = [name for name, finding in findings.items() if finding.passed is False]
    assert failed == ["evaluation classes"]  # two images do not show all 19
    assert findings["lora audit"].passed and findings["adapter updates"].passed


def test_settings_that_an_earlier_version_did_not_have_take_their_defaults(tmp_path):
    shutil.copytree(SAVED / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "eomt_config.json"
    config = json.loads(file.read_text())
    kept = ("img_size", "num_classes", "backbone_name", "backbone_kwargs", "num_q", "num_blocks", "use_lora")
    kept += ("lora_rank", "lora_alpha", "ckpt_path", "pretrained", "patch_size")
    config["init"] = {name: value for name, value in config["init"].items() if name in kept}
    file.write_text(json.dumps(config))
    base = str(SAVED / "model")
    old, new = (MaskClassificationSemantic.from_pretrained(path, base) for path in (SAVED / "adapter", file.parent))
    for one, other in zip(old.network.parameters(), new.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_results_of_what_a_run_did_not_ship_have_a_folder_of_their_own(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(SAVED / "run", run)
    for name in ("merged", "model", "alone"):
        shutil.copytree(SAVED / "model", (tmp_path if name == "alone" else run) / name)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    for path, place in (
        (run / "adapter", run / "anomaly"),
        (run / "merged", run / "anomaly" / "merged"),
        (run / "model", run / "anomaly" / "model"),
        (run / "checkpoints" / "last.ckpt", run / "anomaly" / "last"),
        (tmp_path / "alone", tmp_path / "alone" / "anomaly"),
    ):
        assert results_of(path, "anomaly") == place
    shutil.rmtree(run / "model")
    assert results_of(run, "evaluation") == run / "evaluation"


def test_a_run_that_holds_another_network_than_its_summary_tells_of_is_not_scored(tmp_path):
    shutil.copytree(SAVED / "run", tmp_path / "run")
    run = tmp_path / "run"
    for file, artefact_id in ((run / "summary.json", "a" * 64), (run / "adapter" / "eomt_config.json", "b" * 64)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"artefact_id": artefact_id}))
    for score in (evaluate_run, evaluate_artefact):
        with pytest.raises(ValueError, match=r"adapter is another network \(b{12}\) than .*summary.json tells of"):
            score(run)
