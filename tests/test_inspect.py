"""scripts/inspect_model.py: what the files of a network say, without building it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_pretrained import NAMES, build, open_, save_lightning, trained

from eomt.diagnosis.inspection import by_number, inspect_model
from eomt.fingerprints import fingerprint
from eomt.lora.methods import update_norms

run = partial(run_script, "inspect_model.py")


@pytest.fixture
def call(call_script):
    return partial(call_script, "inspect_model.py")


@pytest.fixture
def base(tmp_path):
    trained(seed=3).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    module = trained(use_lora=True, ckpt_path=base, class_names=NAMES)
    module.save_pretrained(tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter"


OPTIONS = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "alpha_pattern": {"attn.proj": 3}, "rank_pattern": {"blocks.1.attn.qkv": 2}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_norms_equal_those_of_the_loaded_adapter(base, tmp_path, options):
    module = trained(use_lora=True, ckpt_path=base, lora_rank=4, lora_options=options)
    module.save_pretrained(tmp_path / "adapter")
    expected = update_norms(open_(tmp_path / "adapter").backbone)
    for path in (tmp_path / "adapter", save_lightning(module, tmp_path / "best.ckpt")):
        updates = inspect_model(path)["updates"]
        assert {name: update["norm"] for name, update in updates.items()} == pytest.approx(expected, rel=1e-12)
        weights = module.backbone.state_dict()
        for name, update in updates.items():
            norm = weights[f"{name}.base_layer.weight"].norm().item()
            assert update["relative"] == pytest.approx(update["norm"] / norm, rel=1e-5)


def test_the_facts_of_an_adapter_are_those_it_was_built_with(adapter, base):
    facts = inspect_model(adapter.parent)
    assert facts["kind"] == "LoRA adapter" and facts["path"] == str(adapter)
    network = {
        name: facts["network"][name] for name in ("img_size", "patch_size", "num_q", "num_blocks", "num_classes")
    }
    assert list(network.values()) == [[64, 128], 16, 20, 2, 19] and facts["network"]["class_names"] == NAMES
    assert facts["lora"]["rank"] == 16 and facts["updates"]["blocks.0.attn.qkv"]["scaling"] == 2
    assert list(facts["parts"])[:2] == ["adapters", "queries"] and "backbone" not in facts["parts"]
    assert facts["parts"]["adapters"]["parameters"] == 3 * 16 * ((64 + 192) + (64 + 64))
    assert facts["files"]["heads.safetensors"] == (adapter / "heads.safetensors").stat().st_size
    assert facts["fit"]["fits"] is True and facts["base"] == base


def test_the_fingerprint_of_a_base_is_read_from_its_tensors_alone(base, tmp_path):
    module = open_(base)
    expected = fingerprint(module.backbone)
    torch.save(module.network.state_dict(), tmp_path / "pytorch_model.bin")
    for path in (base, save_lightning(module, tmp_path / "best.ckpt"), tmp_path / "pytorch_model.bin"):
        assert inspect_model(path)["backbone_fingerprint"] == expected, path
    facts = inspect_model(tmp_path / "pytorch_model.bin")
    assert facts["kind"] == "bare weights" and facts["network"]["depth"] == 3 and facts["network"]["num_q"] == 20


@pytest.mark.parametrize("img_size", [[64, 64], [128, 64], [128, 128]])
def test_a_base_of_another_image_size_fits_as_it_is_loaded(tmp_path, img_size):
    trained(seed=3, img_size=img_size).save_pretrained(tmp_path / "base")
    trained(use_lora=True, ckpt_path=str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    fit = inspect_model(tmp_path / "adapter")["fit"]
    assert fit["fits"] is True and "position embeddings resampled to 64x128" in fit["why"]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({}, "other weights: fingerprint"),
        ({"img_size": [64, 64]}, "position embeddings resampled"),
        ({"backbone_kwargs": {"embed_dim": 32, "depth": 3, "num_heads": 2}}, "embed_dim 32, the adapter's has 64"),
        ({"patch_size": 8}, "patch_size 8, the adapter's has 16"),
    ],
)
def test_a_base_that_does_not_fit_is_told_why_and_gives_exit_code_1(adapter, tmp_path, other, sentence):
    trained(seed=9, **other).save_pretrained(tmp_path / "other")
    result = run(adapter, "--base", tmp_path / "other")
    assert result.returncode == 1 and "does not fit" in result.stdout, result.stderr
    assert sentence in result.stdout


def test_the_command_shows_tables_and_writes_plot_and_json(adapter, tmp_path):
    result = run(adapter, "--plot", tmp_path / "updates.png", "--json", tmp_path / "out" / "facts.json")
    assert result.returncode == 0, result.stderr
    for word in ("LoRA adapter", "class 18", "64 x 128", "attn.qkv", "0-2", "queries, class head, mask head", "█"):
        assert word in result.stdout, word
    assert Image.open(tmp_path / "updates.png").size[0] > 500
    assert json.loads((tmp_path / "out" / "facts.json").read_text()) == inspect_model(adapter)


def test_a_base_that_is_gone_is_said_and_is_no_misfit(adapter, base, tmp_path):
    Path(base).rename(tmp_path / "moved")
    result = run(adapter)
    assert result.returncode == 0 and "not checked, for the base is not there: give --base" in result.stdout
    assert run(adapter, "--base", tmp_path / "moved").returncode == 0


def test_an_untrained_adapter_is_shown_as_such(base, tmp_path):
    build(use_lora=True, ckpt_path=base).save_pretrained(tmp_path / "adapter")
    assert "has not been trained" in run(tmp_path / "adapter").stdout


def test_what_holds_no_network_is_refused_in_a_sentence(call, adapter, base, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(b"half")
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    for arguments, sentence in [
        ((tmp_path / "half.safetensors",), "cannot be read"),
        ((tmp_path / "empty.ckpt",), "holds no tensors"),
        ((alone,), "give the folder it belongs to"),
        ((adapter.parent / "adaptor",), "did you mean adapter?"),
        ((base, "--base", base), "leave --base out"),
        ((base, "--plot", tmp_path / "plot.png"), "--plot draws the updates of an adapter"),
        ((adapter, "--base", adapter), "is an adapter, not a network"),
    ]:
        code, error = call(*arguments)
        assert code == 1 and error.startswith("error: ") and sentence in error, (arguments, error)
        assert error.count("\n") == 1


def test_a_file_of_an_adapter_stands_for_its_folder(adapter):
    assert inspect_model(adapter / "adapter_model.safetensors")["kind"] == "LoRA adapter"


def test_block_10_stands_behind_block_9():
    names = [f"blocks.{i}.{target}" for i in range(12) for target in ("attn.proj", "attn.qkv")]
    assert sorted(reversed(names), key=by_number) == names


def test_inspecting_builds_nothing_and_needs_no_training_library(adapter):
    code = "import sys\nfor name in ('timm', 'lightning', 'peft', 'hydra', 'matplotlib'): sys.modules[name] = None\n"
    code += (
        f"from eomt.diagnosis.inspection import inspect_model\nassert inspect_model({str(adapter)!r})['fit']['fits']"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("grid", [8, 12, 23])  # one token more is 5 x 13, 5 x 29, 10 x 53
def test_a_base_whose_file_tells_no_size_fits_as_it_is_loaded(tmp_path, grid):
    base = trained(seed=3, img_size=[16 * grid, 16 * grid])
    with torch.no_grad():  # as smooth as those of trained networks
        place = torch.linspace(0, 3, grid)
        waves = torch.sin(place[:, None, None] + torch.cos(place[None, :, None] + torch.arange(64)))
        base.backbone.pos_embed[:, 1:] = waves.reshape(1, -1, 64)
    torch.save(base.network.state_dict(), tmp_path / "base.bin")
    trained(use_lora=True, ckpt_path=str(tmp_path / "base.bin")).save_pretrained(tmp_path / "adapter")
    fit = inspect_model(tmp_path / "adapter")["fit"]
    assert fit["fits"] is True and "position embeddings resampled" in fit["why"]
