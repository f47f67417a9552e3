"""scripts/merge_lora.py: a full network that predicts as its adapter did, checked before it is written."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import backbone_kwargs, run_script
from PIL import Image
from safetensors.torch import load_file
from test_pretrained import build, open_, outputs, save_lightning, trained

from eomt.inference.artefacts import merge_adapter
from eomt.reporting.evaluation_report import evaluate_artefact
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SAVED = Path(__file__).parent / "saved"
run = partial(run_script, "merge_lora.py")


@pytest.fixture
def call(call_script):
    return partial(call_script, "merge_lora.py")


@pytest.fixture
def base(tmp_path):
    trained(seed=3).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    trained(use_lora=True, ckpt_path=base).save_pretrained(tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter"


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(6):
        noise = torch.randint(0, 256, (80, 200, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_merged_network_predicts_as_its_adapter_did(base, tmp_path, options):
    module = trained(use_lora=True, ckpt_path=base, lora_options=options, delta_weights=False)
    expected = outputs(module)
    merge_adapter(module)
    module.save_pretrained(tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "eomt_config.json").read_text())["init"]
    assert settings["use_lora"] is False and settings["ckpt_path"] is None
    for merged in (open_(tmp_path / "merged"), build(seed=4, ckpt_path=str(tmp_path / "merged")).eval()):
        assert (outputs(merged) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.allclose(expected, outputs(open_(base)), atol=1e-2)


def test_the_keys_of_a_merged_network_are_those_of_the_published_one(reference, tmp_path):
    tensors, facts = reference
    sizes = {"img_size": facts["img_size"], "num_classes": facts["num_classes"], "num_q": facts["num_queries"]}
    network = {"backbone_name": facts["backbone"], "backbone_kwargs": backbone_kwargs(facts)}
    module = trained(use_lora=True, num_blocks=facts["num_blocks"], **sizes, **network)
    merge_adapter(module)
    module.save_pretrained(tmp_path / "merged")
    published = {key.replace("state.", "network."): t.shape for key, t in tensors.items() if key.startswith("state.")}
    assert {key: t.shape for key, t in load_file(tmp_path / "merged" / "model.safetensors").items()} == published


def test_the_command_compares_on_the_runs_own_validation_images(adapter, toy_cache, tmp_path):
    config = f"""data:
  _target_: eomt.data.toy_streets.toy_streets
  root: {toy_cache}
  num_train: 8
  num_val: 3
  size: [64, 128]
  img_size: [64, 128]
  batch_size: 2
  num_workers: 0
"""
    (adapter.parent / "config.yaml").write_text(config)
    result = run(adapter.parent, tmp_path / "merged")
    assert result.returncode == 0, result.stderr
    assert "Merged 6 layers" in result.stdout and "on 3 crops" in result.stdout
    assert f"scripts/evaluate.py {tmp_path / 'merged'} data=NAME data.key=value" in result.stdout
    assert f"scripts/predict.py {tmp_path / 'merged'} photos/ predictions/" in result.stdout
    expected, merged = outputs(open_(adapter)), outputs(open_(tmp_path / "merged"))
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_command_compares_on_given_images_and_takes_a_checkpoint(base, images, tmp_path):
    path = save_lightning(trained(use_lora=True, ckpt_path=base), tmp_path / "best.ckpt")
    Path(base).rename(tmp_path / "moved")
    result = run(path, tmp_path / "merged", "--images", images / "*.png", "--ckpt_path", tmp_path / "moved")
    assert result.returncode == 0, result.stderr
    assert "on 4 crops" in result.stdout and "class logits  differ by" in result.stdout
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_networks_that_disagree_are_not_written(call, adapter, images, tmp_path):
    code, error = call(adapter, tmp_path / "merged", "--images", images, "--tolerance", "0")
    assert code == 1 and not (tmp_path / "merged").exists()
    assert "logits differ by" in error and "more than --tolerance 0: nothing was written" in error


@pytest.mark.parametrize("known", [True, False], ids=["", "of an earlier version"])
def test_a_merged_network_in_the_folder_of_its_run_leaves_the_scores_of_the_adapter(toy_cache, tmp_path, known):
    run, data = tmp_path / "run", [f"data.root={toy_cache}"]
    shutil.copytree(SAVED / "run", run)
    if known:
        summary = json.loads((run / "summary.json").read_text()) | {"artefact_id": "a" * 64}
        (run / "summary.json").write_text(json.dumps(summary))
    scores = evaluate_artefact(run / "adapter", data)
    before = scores.read_bytes()
    module = MaskClassificationSemantic.from_pretrained(run)
    merge_adapter(module)
    module.save_pretrained(run / "merged")
    merged = evaluate_artefact(run / "merged", data)
    assert (scores.parent, merged.parent) == (run / "evaluation", run / "evaluation" / "merged")
    assert scores.read_bytes() == before
    facts, merged_facts = json.loads(before), json.loads(merged.read_text())
    assert merged_facts["miou"] == pytest.approx(facts["miou"], abs=1e-3)
    evaluate_artefact(run, data)
    with pytest.raises(ValueError, match=r"toy_streets\.json holds scores of another network: give another folder"):
        evaluate_artefact(run / "merged", data, output=run / "evaluation")


def test_what_cannot_be_merged_is_refused_in_a_sentence(call, adapter, base, images, tmp_path):
    for arguments, sentence in [
        ((base, tmp_path / "out", "--images", images), "is a whole network, not an adapter"),
        ((adapter, images, "--images", images), "exists and is not empty"),
        ((adapter, tmp_path / "out"), "give --images"),
        ((adapter, tmp_path / "out", "--images", tmp_path / "none*"), "no pictures there"),
        ((adapter.parent / "adaptor", tmp_path / "out"), "did you mean adapter?"),
    ]:
        code, error = call(*arguments)
        assert code == 1 and error.startswith("error: ") and sentence in error, (arguments, error)
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_help_says_why_the_difference_is_not_zero():
    result = run("--help")
    assert result.returncode == 0 and "rounded at other places" in result.stdout
