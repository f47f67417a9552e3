"""What the configurations beside a plain backbone say: pixel statistics, and timm's names, whoever uploaded it."""

import json
import sys

import pytest
import torch
from backbones import DINOV2, MAE, PLAIN, TINY, refused, save, timm_vit

from eomt.models.vit import ViT
from eomt.settings.backbone_choice import choose_backbone, read_backbone_file
from eomt.settings.backbone_names import name_tensors
from eomt.settings.backbones import LETTERS, SATELLITE, TOLD, recognise
from eomt.settings.compose import compose_run, read_mappings
from eomt.settings.model import ModelSettings
from eomt.settings.pixel_statistics import IMAGENET

LARGE, SAT = "vit_large_patch16_dinov3_qkvb", "vit_large_patch16_dinov3_qkvb.sat493m"
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def write(folder, **files):
    """Writes JSON files named as the arguments, less `.json`."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def processor(mean, std, **further):
    return {"image_mean": list(mean), "image_std": list(std)} | further


def file_of(folder, name, patch=16):
    return save(folder, timm_vit(name, (4 * patch, 4 * patch), patch).backbone.state_dict())


def load(path, name, kwargs=TINY, patch=16):
    return ViT((4 * patch, 4 * patch), patch, name, False, kwargs, weights=path)


def test_satellite_statistics_beside_transformers_dinov3_are_not_taken_for_imagenets(tmp_path):
    path = file_of(tmp_path, LARGE)
    write(tmp_path, config={"model_type": "dinov3_vit"}, preprocessor_config=processor(*SATELLITE))
    message = rf"of mean 0.43, 0.411, 0.296.*{LARGE} has 0.485, 0.456, 0.406.*set model.backbone_name={SAT}"
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            load(place, LARGE)
        assert "preprocessor_config.json" in str(error.value) and "\n" not in str(error.value)
        assert load(place, SAT).pixel_mean.flatten().tolist() == pytest.approx([0.43, 0.411, 0.296])


def test_a_satellite_dinov3_is_named_by_its_statistics(tmp_path, monkeypatch):
    path = file_of(tmp_path, LARGE)
    write(tmp_path, preprocessor_config=processor(*SATELLITE))
    monkeypatch.setitem(LETTERS, (48, 3), "L")
    assert choose_backbone(None, path) == SAT
    (tmp_path / "preprocessor_config.json").unlink()
    assert choose_backbone(None, path) == LARGE


def test_other_statistics_of_a_model_that_shapes_tell_are_refused_without_torch(tmp_path, monkeypatch):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, preprocessor_config=processor(MEAN, STD))
    settings = {"img_size": [56, 56], "num_classes": 3, "patch_size": 14, "backbone_weights": str(path)}
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"of mean 0.1, 0.2, 0.3.*pretrained_cfg_overlay: \{mean: \[0.1, 0.2, 0.3\], std: \[0.4, 0.5, 0.6\]\}"
    monkeypatch.setitem(LETTERS, (48, 3), "S")
    for name in (DINOV2, None):
        with pytest.raises(ValueError, match=message):
            ModelSettings(**settings, backbone_name=name)
    ModelSettings(**settings, backbone_name=DINOV2, backbone_kwargs={"pretrained_cfg_overlay": {}})


def test_statistics_that_no_timm_model_has_are_taken_from_the_setting_that_the_error_names(tmp_path):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, preprocessor_config=processor(MEAN, STD))
    with pytest.raises(ValueError, match="backbone_weights") as error:
        load(path, DINOV2, patch=14)
    overlay = str(error.value).partition("model.backbone_kwargs=")[2].partition(" or")[0].rstrip()
    config = compose_run([f"model.backbone_kwargs={overlay}", "data.root=x"])
    read_mappings(config)
    encoder = load(path, DINOV2, TINY | dict(config.model.backbone_kwargs), patch=14)
    assert encoder.pixel_mean.flatten().tolist() == pytest.approx(MEAN)
    assert encoder.pixel_std.flatten().tolist() == pytest.approx(STD)


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": DINOV2, "pretrained_cfg": {"mean": MEAN, "std": STD}},
        {"architecture": DINOV2, "pretrained_cfg": {"tag": "lvd142m", "mean": MEAN, "std": STD}},
        {"architecture": DINOV2, "mean": MEAN, "std": STD},
    ],
    ids=["untagged", "tagged", "before timm 0.9"],
)
def test_statistics_in_timms_config_are_compared_too(config, tmp_path):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, config=config)
    with pytest.raises(ValueError, match=r"of mean 0.1, 0.2, 0.3, .*as config.json says"):
        load(path, DINOV2, patch=14)


def test_the_same_statistics_in_single_precision_are_the_same(tmp_path):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, preprocessor_config=processor([0.48500001430511475, 0.456, 0.406], IMAGENET[1]))
    load(path, DINOV2, patch=14)


def test_images_that_are_not_normalised_have_statistics_too(tmp_path):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, preprocessor_config=processor(*IMAGENET, do_normalize=False))
    with pytest.raises(ValueError, match=r"of mean 0, 0, 0, deviation 1, 1, 1"):
        load(path, DINOV2, patch=14)


@pytest.mark.parametrize("factor", [1 / 255, 0.003922, None])
def test_the_usual_factor_from_bytes_changes_nothing(factor, tmp_path):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, preprocessor_config=processor(*IMAGENET, rescale_factor=factor))
    load(path, DINOV2, patch=14)


def test_another_factor_from_bytes_is_told_in_the_statistics(tmp_path):
    """With 2/255 and no deviation but 1, (2 x - m) / 1 is (x - m / 2) / 0.5 of images in [0, 1]."""
    path = file_of(tmp_path, DINOV2, 14)
    content = processor([0.97, 0.912, 0.812], [1.0, 1.0, 1.0], rescale_factor=2 / 255)
    write(tmp_path, preprocessor_config=content)
    with pytest.raises(ValueError, match=r"of mean 0.485, 0.456, 0.406, deviation 0.5, 0.5, 0.5, as"):
        load(path, DINOV2, patch=14)
    write(tmp_path, preprocessor_config=processor(*IMAGENET, rescale_factor=2 / 255, do_rescale=False))
    load(path, DINOV2, patch=14)


@pytest.mark.parametrize("factor", [0, -1, float("inf")])
def test_a_factor_that_leaves_no_picture_is_refused_by_its_file(factor, tmp_path):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, preprocessor_config=processor(*IMAGENET, rescale_factor=factor))
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: rescale_factor {factor:g} leaves"):
        read_backbone_file(path)


@pytest.mark.parametrize("prefix", ["encoder.", "network.encoder."])
def test_the_statistics_among_the_tensors_of_an_eomts_encoder_are_compared(prefix, tmp_path):
    state = {f"{prefix}backbone.{key}": t for key, t in timm_vit(DINOV2).backbone.state_dict().items()}
    mean, std, other = (torch.tensor(values).view(1, 3, 1, 1) for values in (*IMAGENET, MEAN))
    said = {f"{prefix}pixel_mean": mean, f"{prefix}pixel_std": std}
    encoder = load(save(tmp_path, state | said), DINOV2, patch=14)
    assert sorted(encoder.report.left_out) == sorted(said)
    path = save(tmp_path, state | said | {f"{prefix}pixel_mean": other})
    with pytest.raises(ValueError, match=r"of mean 0.1, 0.2, 0.3, .*as model.safetensors says"):
        load(path, DINOV2, patch=14)


@pytest.mark.parametrize("value", ["0.5", [0.5, "x", 0.5], {"mean": 0.5}])
def test_statistics_that_are_no_numbers_are_refused_by_their_file(value, tmp_path):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, preprocessor_config={"image_mean": value, "image_std": [1.0, 1.0, 1.0]})
    with pytest.raises(ValueError, match=r"preprocessor_config.json: image_mean"):
        read_backbone_file(path)


def test_a_file_that_says_how_an_mae_saw_pixels_is_not_loaded_as_a_vit_of_imagenet21k(tmp_path):
    path = file_of(tmp_path, MAE)
    write(tmp_path, config={"model_type": "vit"}, preprocessor_config=processor(*IMAGENET))
    with pytest.raises(ValueError, match=rf"{PLAIN} has 0.5, 0.5, 0.5.*set model.backbone_name={PLAIN}\.\w+ "):
        load(path, PLAIN)
    assert load(path, MAE).pixel_mean.flatten().tolist() == pytest.approx(IMAGENET[0])


def test_the_models_that_shapes_tell_have_the_statistics_that_are_assumed_of_them():
    import timm

    for name in TOLD:
        config = timm.get_pretrained_cfg(name)
        assert (config.mean, config.std) == IMAGENET, name
    config = timm.get_pretrained_cfg(SAT)
    assert (config.mean, config.std) == SATELLITE


# timm's tags


@pytest.mark.parametrize("tag", ["mine", "", None])
def test_a_tag_that_timm_lacks_leaves_the_model_that_it_stands_behind(tag, tmp_path):
    path = file_of(tmp_path, PLAIN)
    half = [0.5, 0.5, 0.5]
    write(tmp_path, config={"architecture": PLAIN, "pretrained_cfg": {"tag": tag, "mean": half, "std": half}})
    for name in (None, PLAIN):
        assert choose_backbone(name, path) == PLAIN
        assert load(path, choose_backbone(name, path)).pixel_mean.flatten().tolist() == half


def test_a_tag_that_timm_has_is_taken_with_its_statistics(tmp_path):
    path = file_of(tmp_path, PLAIN)
    write(tmp_path, config={"architecture": PLAIN, "pretrained_cfg": {"tag": "mae"}})
    assert choose_backbone(None, path) == MAE


def test_an_architecture_that_timm_lacks_says_nothing(tmp_path):
    path = file_of(tmp_path, PLAIN)
    write(tmp_path, config={"architecture": "vit_of_ours", "pretrained_cfg": {"tag": "mine"}})
    assert load(path, PLAIN).report is not None
    with pytest.raises(ValueError, match=r"give model\.backbone_name"):
        choose_backbone(None, path)


def test_heads_in_timms_config_are_the_files(tmp_path):
    path = file_of(tmp_path, DINOV2, 14)
    write(tmp_path, config={"architecture": DINOV2, "model_args": {"num_heads": 6}})
    with pytest.raises(ValueError, match="has 6 attention heads"):
        load(path, DINOV2, patch=14)


# What config.json says


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_attention_heads": 6}, "has 6 attention heads"),
        ({"hidden_size": 64}, "says hidden_size 64"),
        ({"num_hidden_layers": 12}, "says num_hidden_layers 12"),
        ({"patch_size": 16}, "says patch_size 16"),
        ({"model_type": "dinov3_vit"}, "says model_type dinov3_vit"),
        ({"hidden_act": "quick_gelu"}, "says hidden_act quick_gelu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_contradicts_the_weights_is_an_error(said, message, tmp_path):
    config = {"model_type": "dinov2", "num_attention_heads": 3, "hidden_size": 48} | said
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, timm_vit(DINOV2).backbone.state_dict(), message)


def test_another_models_pixel_statistics_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": PLAIN, "pretrained_cfg": {"tag": "mae"}}))
    refused(tmp_path, timm_vit(MAE, (64, 64), 16).backbone.state_dict(), rf"set model.backbone_name={MAE}", PLAIN, 16)


def test_a_named_set_of_weights_has_its_own_statistics_where_the_file_tells_only_the_model(tmp_path):
    name = "vit_large_patch16_dinov3_qkvb"
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    path = save(tmp_path, timm_vit(name, (64, 64), 16).backbone.state_dict())
    encoder = timm_vit(f"{name}.sat493m", (64, 64), 16, weights=path)
    assert encoder.pixel_mean.flatten().tolist() == pytest.approx([0.43, 0.411, 0.296])


# Which timm model


def shapes_of(name):
    with torch.device("meta"):
        backbone = ViT((224, 224), 14 if "patch14" in name else 16, name, False).backbone
    return {key: list(tensor.shape) for key, tensor in backbone.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("vit_small_patch14_dinov2", "a DINOv2 ViT-S/14 of 12 blocks"),
        ("vit_base_patch14_reg4_dinov2", "a DINOv2 ViT-B/14 of 12 blocks with 4 registers"),
        ("vit_large_patch14_dinov2", "a DINOv2 ViT-L/14 of 24 blocks"),
        ("vit_giant_patch14_reg4_dinov2", "a DINOv2 ViT-g/14 of 40 blocks with 4 registers"),
        ("vit_small_patch16_dinov3_qkvb", "a DINOv3 ViT-S/16 of 12 blocks with 4 registers"),
        ("vit_small_plus_patch16_dinov3", "a DINOv3 ViT-S+/16 of 12 blocks with 4 registers"),
        ("vit_base_patch16_dinov3", "a DINOv3 ViT-B/16 of 12 blocks with 4 registers"),
        ("vit_large_patch16_dinov3_qkvb", "a DINOv3 ViT-L/16 of 24 blocks with 4 registers"),
        ("vit_huge_plus_patch16_dinov3_qkvb", "a DINOv3 ViT-H+/16 of 32 blocks with 4 registers"),
        ("vit_7b_patch16_dinov3", "a DINOv3 ViT-7B/16 of 40 blocks with 4 registers"),
        ("vit_base_patch16_rope_224", "a ViT-B/16 of 12 blocks with rotary positions"),
        ("vit_medium_patch16_reg4_gap_256", "a ViT 512 wide, patch/16 of 12 blocks with 4 registers"),
        ("deit_small_distilled_patch16_224", "a DeiT ViT-S/16 of 12 blocks"),
        ("vit_base_patch16_224", "a ViT-B/16 of 12 blocks"),
        (
            "vit_betwixt_patch16_rope_reg4_gap_256",
            "a ViT 640 wide, patch/16 of 12 blocks with 4 registers and rotary positions",
        ),
        (
            "vit_base_patch16_rope_reg1_gap_256",
            "a ViT-B/16 of 12 blocks with 1 register and rotary positions",
        ),
    ],
)
def test_names_and_shapes_tell_which_timm_model_it_is(name, described):
    shapes = shapes_of(name)
    backbone = recognise(name_tensors(shapes), shapes)
    assert str(backbone) == described
    assert backbone.timm_name == (None if described.startswith("a ViT") else name)


def test_an_mae_is_told_by_its_decoder_and_a_vit_that_nothing_tells_asks_for_a_name(tmp_path):
    shapes = shapes_of("vit_large_patch16_224") | {"decoder_pos_embed": [1, 197, 512]}
    assert recognise(name_tensors(shapes), shapes).timm_name == "vit_large_patch16_224.mae"
    path = str(save(tmp_path, timm_vit(PLAIN, (64, 64), 16).backbone.state_dict()))
    with pytest.raises(ValueError, match=r"do not tell which timm model.*give model.backbone_name"):
        choose_backbone(None, path)
    assert choose_backbone(PLAIN, path) == PLAIN and choose_backbone(None, None) == "vit_large_patch14_reg4_dinov2"
