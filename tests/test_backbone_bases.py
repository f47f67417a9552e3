"""What was trained from a plain backbone in a file knows that file: opened, moved, resumed, merged, checked."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrained import build, open_, outputs, save_lightning, trained

from eomt.cost.training_cost import build_without_weights
from eomt.diagnosis.extraction import extract
from eomt.diagnosis.facts import NothingToCheck, RunFacts
from eomt.diagnosis.inspection import inspect_model
from eomt.diagnosis.report import examine
from eomt.exchange.opening import open_merged, recognised
from eomt.flags import translate_flags
from eomt.inference.artefacts import merge_adapter
from eomt.models.vit import ViT
from eomt.settings.compose import absolute_paths, compose_run, name_backbone
from eomt.settings.model import ModelSettings, check_same_settings
from eomt.training.run_folder import check_resume

KWARGS = {"embed_dim": 64, "depth": 3, "num_heads": 2}
DINOV2 = {"backbone_name": "vit_small_patch14_dinov2", "backbone_kwargs": KWARGS}


def backbone(seed=5):
    """Weights of a pretrained backbone at 4x4 patches of 14 pixels; norms are off 1, as training leaves them."""
    torch.manual_seed(seed)
    state = ViT((56, 56), 14, DINOV2["backbone_name"], False, KWARGS).backbone.state_dict()
    return {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in state.items()}


@pytest.fixture
def file(tmp_path):
    save_file(backbone(), tmp_path / "dinov2.safetensors")
    return tmp_path / "dinov2.safetensors"


@pytest.fixture
def settings(file):
    return DINOV2 | {"backbone_weights": str(file), "pretrained": True}  # as in the usual YAML


@pytest.fixture
def adapter(settings, tmp_path):
    module = trained(use_lora=True, **settings)
    module.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", module


def test_an_adapter_names_the_file_and_holds_no_copy_of_it(adapter, file):
    folder, module = adapter
    init = json.loads((folder / "eomt_config.json").read_text())["init"]
    assert init["backbone_weights"] == str(file) and init["backbone_name"] == DINOV2["backbone_name"]
    assert not (folder / "base.safetensors").exists()
    assert torch.equal(outputs(open_(folder)), outputs(module))


def test_a_checkpoint_opens_on_the_file(settings, tmp_path):
    module = trained(use_lora=True, **settings)
    assert torch.equal(outputs(open_(save_lightning(module, tmp_path / "last.ckpt"))), outputs(module))


@pytest.mark.parametrize("form", ["adapter", "last.ckpt"])
def test_a_file_that_has_moved_is_asked_for_and_found_where_it_is_said_to_be(adapter, file, form, tmp_path):
    folder, module = adapter
    path = folder if form == "adapter" else save_lightning(module, tmp_path / form)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(file, tmp_path / "elsewhere" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"trained from {file}, which is not there.*with backbone_weights"):
        open_(path)
    opened = open_(path, backbone_weights=moved)
    assert torch.equal(outputs(opened), outputs(module)) and opened.hparams.backbone_weights == str(moved)
    assert torch.equal(outputs(open_(path, backbone_weights=tmp_path / "elsewhere")), outputs(module))


def test_other_weights_in_the_files_place_are_refused(adapter, file):
    save_file(backbone(seed=6), file)
    with pytest.raises(ValueError, match=r"base weights that this backbone does not have.*backbone_weights"):
        open_(adapter[0])


def test_the_places_of_files_are_no_part_of_an_artefacts_identity(adapter, file, tmp_path):
    moved = shutil.copy(file, tmp_path / "copy.safetensors")
    opened = open_(adapter[0], backbone_weights=moved)
    assert opened.save_pretrained(tmp_path / "again") == adapter[1].artefact_id


def test_a_whole_network_needs_the_file_no_more(settings, file, tmp_path):
    module = trained(**settings)
    module.save_pretrained(tmp_path / "model")
    file.unlink()
    assert torch.equal(outputs(open_(tmp_path / "model")), outputs(module))
    with pytest.raises(ValueError, match=r"backbone_weights .* is for adapters, and .* holds a whole network"):
        open_(tmp_path / "model", backbone_weights=file)


def test_a_merged_network_needs_the_file_no_more(adapter, file, tmp_path):
    opened = open_(adapter[0])
    merge_adapter(opened)
    opened.save_pretrained(tmp_path / "merged")
    file.unlink()
    merged = open_(tmp_path / "merged")
    assert merged.hparams.backbone_weights is None
    torch.testing.assert_close(outputs(merged), outputs(adapter[1]), atol=1e-4, rtol=1e-4)


# Beside other settings


def test_the_file_takes_the_place_of_timms_download_and_masks_fade_as_from_it(settings):
    module = build(**settings)
    assert module.backbone.resampled.keys() == {"pos_embed", "patch_embed.proj.weight"} and module.anneals
    assert not [name for name in module.network.drawn if name.startswith("encoder.")]


def test_a_file_beside_a_whole_checkpoint_is_refused(settings, tmp_path):
    trained(**settings).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds every weight, and backbone_weights .* loaded for nothing: leave one"):
        build(**settings, ckpt_path=str(tmp_path / "model"))


def test_a_checkpoint_of_differences_is_added_to_the_file(settings, tmp_path):
    start, end = build(**settings), trained(**settings)
    before = start.network.state_dict()
    state = {
        f"network.{k}": t - before[k] if k.startswith("encoder.") else t for k, t in end.network.state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    path = str(tmp_path / "pytorch_model.bin")
    module = trained(use_lora=True, **settings, ckpt_path=path)
    loaded = build(**settings, ckpt_path=path).eval()
    loaded.network.attn_mask_probs.copy_(end.network.attn_mask_probs)
    torch.testing.assert_close(outputs(loaded), outputs(end), atol=1e-4, rtol=1e-4)
    module.save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(open_(tmp_path / "adapter")), outputs(module))
    shutil.move(settings["backbone_weights"], tmp_path / "new.safetensors")
    with pytest.raises(FileNotFoundError, match="with backbone_weights"):
        open_(tmp_path / "adapter")
    shutil.move(path, tmp_path / "new.bin")
    opened = open_(tmp_path / "adapter", tmp_path / "new.bin", tmp_path / "new.safetensors")
    assert torch.equal(outputs(opened), outputs(module))


def test_a_file_beside_an_encoder_of_ones_own_is_refused(settings):
    with pytest.raises(ValueError, match=r"backbone_weights .* model.encoder puts another one in their place"):
        build(**settings, encoder=torch.nn.Identity())


def test_an_overlay_with_another_file_is_refused(settings):
    kwargs = {**KWARGS, "pretrained_cfg_overlay": {"file": "other.safetensors"}}
    with pytest.raises(ValueError, match=r"backbone_weights .* pretrained_cfg_overlay.file: leave one out"):
        build(**settings | {"backbone_kwargs": kwargs})


# Command lines and records


def test_a_relative_place_becomes_absolute_and_the_run_records_which_model_it_is(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    words = translate_flags(["--backbone_weights", file.name])
    config = compose_run([*words, "model.backbone_name=vit_small_patch14_dinov2"])
    absolute_paths(config)
    name_backbone(config)
    assert config.model.backbone_weights == str(file)
    config = compose_run([])
    name_backbone(config)
    assert config.model.backbone_name == "vit_large_patch14_reg4_dinov2"


def test_a_run_goes_on_with_the_file_at_another_place(settings, tmp_path):
    module = trained(use_lora=True, **settings)
    path = save_lightning(module, tmp_path / "last.ckpt")
    check_same_settings(dict(module.hparams), {**module.hparams, "backbone_weights": "/elsewhere"})
    check_resume(path, {**module.hparams, "backbone_weights": "/elsewhere", "backbone_name": None})
    with pytest.raises(ValueError, match="resume: the checkpoint was trained with backbone_name"):
        check_resume(path, {**module.hparams, "backbone_name": "vit_base_patch14_dinov2"})


def test_the_cost_of_a_run_is_estimated_without_reading_a_weight(settings):
    module = build_without_weights(dict(build(**settings).hparams))
    assert module.backbone.pos_embed.is_meta and module.hparams.backbone_name == DINOV2["backbone_name"]


# A plain backbone where a saved network is expected


PLAIN = r"dinov2\S* holds a DINOv2 ViT 64 wide, patch/14 of 3 blocks, a plain backbone.*model\.backbone_weights"


@pytest.fixture(params=["dinov2.safetensors", "dinov2.pth", "dinov2.ckpt", "dinov2", "dinov2_odd", "dinov2_said"])
def plain(request, tmp_path):
    """A plain backbone as a file of each kind, as a folder, one with a name of its own, and one wrongly described."""
    path, state = tmp_path / request.param, backbone()
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix:
        torch.save(state, path)
    else:
        path.mkdir()
        save_file(state, path / ("dinov2_vits14.safetensors" if path.name == "dinov2_odd" else "model.safetensors"))
    if path.name == "dinov2_said":
        (path / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_size": 999}))
    return path


@pytest.mark.parametrize(
    "take",
    [
        open_,
        open_merged,
        lambda path: extract(path, "timm", path.parent / "out", 1, scores=False),
        examine,
        recognised,
    ],
    ids=["open", "merge or export", "extract", "doctor", "convert"],
)
def test_a_plain_backbone_in_the_place_of_a_network_is_named_with_the_key_that_takes_it(take, plain):
    with pytest.raises((ValueError, FileNotFoundError), match=PLAIN) as error:
        take(plain)
    assert "ckpt_path" not in str(error.value) and "\n" not in str(error.value)


def test_a_plain_backbone_to_resume_from_is_named_with_the_key_that_takes_it(plain):
    if plain.is_file():
        with pytest.raises(ValueError, match=rf"resume \S*{PLAIN}") as error:
            check_resume(plain, {})
        assert "ckpt_path" not in str(error.value)


def test_inspection_shows_a_plain_backbone_as_what_it_is(plain):
    facts = inspect_model(plain)
    assert re.search(
        "^a DINOv2 ViT 64 wide, patch/14 of 3 blocks: a plain backbone.*model.backbone_weights", facts["kind"]
    )
    assert facts["parts"].keys() == {"backbone"} and facts["parts"]["backbone"]["tensors"] == len(backbone())
    assert facts["network"]["depth"] == 3 and facts["network"]["patch_size"] == 14


def test_a_plain_backbone_in_ckpt_path_is_named_whatever_its_file_is_called(plain):
    if plain.suffix in ("", ".safetensors"):  # of others torch tells, later
        with pytest.raises(ValueError, match=rf"ckpt_path \S*{PLAIN}"):
            ModelSettings(img_size=[56, 56], num_classes=3, patch_size=14, ckpt_path=str(plain))
    with pytest.raises(ValueError, match=rf"ckpt_path \S*{PLAIN}"):
        build(ckpt_path=str(plain))


# Inspection and doctor


def test_inspection_checks_an_adapter_against_the_file(adapter, file):
    facts = inspect_model(adapter[0])
    assert facts["base"] == str(file) and facts["fit"]["fits"] is True
    assert all(update["relative"] > 0 for update in facts["updates"].values())
    state = load_file(file)
    state["blocks.0.norm1.bias"] += 1e-3
    save_file(state, file)
    assert inspect_model(adapter[0])["fit"]["fits"] is False
    save_file({key: tensor for key, tensor in state.items() if "blocks.2" not in key}, file)
    assert "of 2 blocks" in inspect_model(adapter[0])["fit"]["why"]


def test_the_doctor_compares_trained_weights_with_the_file(settings, file, tmp_path):
    module = trained(**settings)
    module.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"status": "finished", "steps": 3}))
    facts = RunFacts(tmp_path / "run" / "model", tmp_path / "run", None, "none", None)
    trainable, unchanged = facts.trained_weights()
    assert unchanged and trainable and not any(unchanged.values())
    assert all(name.startswith("encoder.backbone.") for name in unchanged)
    assert facts.keys()[0]["the start weights"][0].keys() == facts.keys()[0]["the start weights"][1].keys()
    file.unlink()
    with pytest.raises(NothingToCheck, match="not there"):
        _ = RunFacts(tmp_path / "run" / "model", tmp_path / "run", None, "none", None).start
