"""Every configuration composes, agrees with the signatures, and builds what it names."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from eomt.comparison.matrix import parse_matrix
from eomt.data.datamodule import SegmentationDataModule
from eomt.data.toy_streets import write_toy_streets
from eomt.settings.compose import absolute_paths, compose_run, name_backbone, saved_yaml
from eomt.settings.config_check import check_config
from eomt.settings.model import ModelSettings
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from lora_config import preset_for

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = "{embed_dim: 96, depth: 5, num_heads: 2}"


def choices(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml") if path.stem != "base")


def composed(name="cityscapes", overrides=()):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(name, ["output_dir=run", "name=test", *overrides])
    cfg.variant = None  # Hydra's own main fills it in
    return cfg


def checked(cfg):
    """The configuration as a plain mapping that has passed the check, its required values filled in."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain["model"]["num_classes"] = plain["model"]["num_classes"] or 19
    check_config(plain)
    return plain


def model_settings(group, name):
    """The keys of `model` that a file and those it builds on set; the base of the models sets all of them."""
    content = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
    parents = [parent for parent in content.get("defaults", []) if parent not in ("base", "_self_")]
    own = content.get("model", {}) if group == "variant" else content
    return set(own).union(*(model_settings(group, parent) for parent in parents)) - {"defaults"}


def test_models_and_variants_set_different_keys_so_that_what_composes_with_one_composes_with_all():
    for model in choices("model"):
        checked(composed("cityscapes_lora", ["variant=lora_r16", f"model={model}"]))
        for variant in choices("variant"):
            assert not model_settings("model", model) & model_settings("variant", variant), (model, variant)


@pytest.mark.parametrize("variant", choices("variant"))
def test_every_variant_composes_and_overrules_the_experiment(variant):
    checked(composed("cityscapes_lora", [f"variant={variant}", "model=tiny"]))
    plain = checked(composed("cityscapes", ["experiment=toy_night", f"variant={variant}"]))
    settings = {key: value for key, value in plain["model"].items() if key != "_target_"}
    MaskClassificationSemantic(**settings | {"ckpt_path": None})


@pytest.mark.parametrize("name", ["cityscapes", "cityscapes_lora"])
@pytest.mark.parametrize("experiment", ["none", *choices("experiment")])
def test_every_experiment_composes_and_passes_the_check(name, experiment):
    plain = checked(composed(name, [] if experiment == "none" else [f"experiment={experiment}"]))
    assert experiment != "none" or plain["model"]["use_lora"] == (name == "cityscapes_lora")


def test_the_baseline_is_the_published_recipe():
    cfg = composed()
    name_backbone(cfg)
    assert cfg.model.backbone_name == "vit_large_patch14_reg4_dinov2" and cfg.model.patch_size == 16
    assert list(cfg.model.img_size) == list(cfg.data.img_size) == [1024, 1024]
    assert (cfg.model.num_q, cfg.model.num_blocks, cfg.data.batch_size, cfg.trainer.max_epochs) == (100, 4, 16, 107)
    assert (cfg.model.lr, cfg.model.llrd, cfg.model.weight_decay) == (1e-4, 0.8, 0.05)
    assert [round(share * 19902) for share in cfg.model.warmup_steps] == pytest.approx([500, 1000], abs=5)


def test_the_lora_variant_states_only_what_differs():
    full, lora = OmegaConf.to_container(composed()), OmegaConf.to_container(composed("cityscapes_lora"))
    assert {key for key in full if full[key] != lora[key]} == {"model"}
    assert {key for key in full["model"] if full["model"][key] != lora["model"][key]} == {"use_lora"}


def test_an_experiment_overrules_the_configuration_it_is_used_with():
    assert composed("cityscapes_lora", ["experiment=toy_night"]).model.lora_lr == 2e-3


@pytest.mark.parametrize("experiment", [None, "toy_night", "camvid_dusk"])
def test_a_variant_has_the_last_word_on_what_trains(experiment):
    chosen = [f"experiment={experiment}"] if experiment else []
    model = composed("cityscapes_lora", [*chosen, "variant=full"]).model
    assert not model.use_lora and model.freeze == [] and model.unfreeze_last_n is None
    model = composed("cityscapes", [*chosen, "variant=lora_r8"]).model
    assert (model.use_lora, model.lora_rank, model.lora_alpha) == (True, 8, 16)


def test_auto_takes_the_preset_for_the_number_of_images():
    found = [preset_for(images).name for images in (1, 1999, 2000, 5000, 5001)]
    assert found == ["small", "small", "medium", "medium", "large"]


@pytest.mark.parametrize(
    ("preset", "rank", "dropout", "rate"),
    [("small", 4, 0.1, 5e-4), ("medium", 8, 0.05, 5e-4), ("large", 16, 0.05, 3e-4)],
)
def test_presets_set_rank_dropout_and_rate_and_the_command_line_still_overrules_them(preset, rank, dropout, rate):
    model = composed("cityscapes", [f"lora={preset}"]).model
    assert model.use_lora and model.lora_alpha == 32
    assert (model.lora_rank, model.lora_dropout, model.lora_lr) == (rank, dropout, rate)
    assert composed("cityscapes", [f"lora={preset}", "model.lora_rank=2"]).model.lora_rank == 2
    assert composed("cityscapes", ["lora=large"]) == composed("cityscapes_lora")


def test_the_model_yaml_and_the_signature_agree_on_every_default():
    yaml = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / "base.yaml"))
    settings = {field.name: field.default for field in dataclasses.fields(ModelSettings)}
    from_data = {"num_classes", "class_weights", "class_names", "class_colors"}
    assert set(settings) - from_data == set(yaml) - {"_target_", "num_classes"}
    for name, default in settings.items():
        if name in yaml and default is not dataclasses.MISSING:
            default = list(default) if isinstance(default, tuple) else default
            assert yaml[name] == default, name


@pytest.mark.parametrize("model", choices("model"))
def test_every_model_is_built(model):
    overrides = ["model.img_size=[64,96]", "model.pretrained=false", f"model.backbone_kwargs={TINY}"]
    cfg = composed(overrides=[f"model={model}", *overrides])
    name_backbone(cfg)
    module = instantiate(cfg.model, num_classes=5, _convert_="all")
    assert module.network.num_classes == 5 and module.hparams.backbone_name == cfg.model.backbone_name
    assert type(module.hparams.backbone_kwargs) is dict  # a DictConfig would make checkpoints unreadable


@pytest.mark.parametrize("data", choices("data"))
def test_every_data_set_is_opened(data, toy_cache, tmp_path, request):
    toy = ["data.num_train=8", "data.num_val=3", "data.size=[64,128]"]
    if data == "toy_streets":
        overrides = [f"data.root={toy_cache}", *toy]
    elif data == "cityscapes":
        overrides = [f"data.root={write_toy_streets(toy_cache, 'clear', 8, 3, (64, 128), 0)}"]
    elif data == "folder":
        overrides = folder_data(tmp_path)
    else:
        overrides = [f"data.root={request.getfixturevalue('camvid_root')}"]
    cfg = composed(overrides=[f"data={data}", "model.img_size=[64,64]", "data.batch_size=2", *overrides])
    checked(cfg)
    module = instantiate(cfg.data, _convert_="all")
    assert isinstance(module, SegmentationDataModule) and module.num_classes > 1


def folder_data(folder):
    import numpy as np
    from PIL import Image

    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(5):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(np.full((64, 64), i % 2, np.uint8)).save(folder / "masks" / f"{i}.png")
    (folder / "classes.yaml").write_text(
        "classes:\n  - {name: a, color: [1, 2, 3], ids: [0]}\n  - {name: b, color: [4, 5, 6], ids: [1]}\n"
    )
    return [f"data.{key}={folder / name}" for key, name in (("images", "images"), ("masks", "masks"))] + [
        f"data.classes={folder / 'classes.yaml'}"
    ]


@pytest.mark.parametrize("logger", choices("logger"))
def test_every_logger_and_callback_is_built(logger, tmp_path):
    cfg = composed(overrides=[f"logger={logger}", f"output_dir={tmp_path}"])
    checked(cfg)
    loggers = [instantiate(node) for node in cfg.logger.values()]
    assert type(loggers[0]).__name__ == "MetricsFile" and len(loggers) == (1 if logger == "csv" else 2)
    assert all(instantiate(node) for node in cfg.callbacks.values())


def test_the_guides_yaml_works_as_it_stands(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        """defaults: [cityscapes, _self_]
model:
  _target_: eomt.training.mask_classification_semantic.MaskClassificationSemantic
  img_size: [640, 640]
  num_classes: 19
  lr: 1e-4
  use_lora: true
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.05
"""
    )
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("cityscapes", [f"hydra.searchpath=[file://{tmp_path}]"])
        cfg = OmegaConf.merge(cfg, {"model": OmegaConf.load(tmp_path / "mine.yaml").model})
    tiny = {"pretrained": False, "backbone_kwargs": {"embed_dim": 64, "depth": 4, "num_heads": 2}}
    module = instantiate(cfg.model, **tiny, _convert_="all")
    assert module.lora is not None and module.lora_settings.rank == 16 and module.network.encoder.img_size == (640, 640)


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"_target_": "eomt.nothing.Here"}, "cannot be imported"),
        (
            {"_target_": "eomt.models.vit.ViT", "img_size": [64, 64], "patchsize": 16},
            "x.patchsize is unknown; did you mean",
        ),
        (
            {"_target_": "eomt.models.vit.ViT", "img_size": [64, 64], "patch_size": "16"},
            "x.patch_size '16'.*valid integer",
        ),
        ({"_target_": "eomt.models.vit.ViT", "img_size": "big"}, "x.img_size 'big'"),
        (
            {"_target_": "eomt.data.camvid.camvid", "root": "/x", "batch_sise": 4},
            "x.batch_sise is unknown; did you mean",
        ),
        ({"_target_": "eomt.data.camvid.camvid", "root": "/x", "sequences": [16e5]}, "put it in quotes"),
        ({"_target_": "lightning.Trainer", "max_epochs": "ten"}, "x.max_epochs 'ten'"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(node, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_config({"x": node})


def test_a_wrong_value_in_a_nested_target_is_named():
    with pytest.raises(ValueError, match=r"callbacks\.samples\.num_images 'four'"):
        node = {"_target_": "eomt.reporting.sample_pictures.SamplePictures", "directory": "x", "num_images": "four"}
        check_config({"callbacks": {"samples": node}})


def test_warm_ups_and_fading_of_dinov3_are_the_published_steps():
    model = composed("cityscapes", ["model=vit_large_dinov3"]).model
    steps = 16 * (20210 // 16)  # configs/dinov3/ade20k/semantic/eomt_large_512.yaml: 16 epochs of ADE20K, batches of 16
    published = {
        "warmup_steps": [2000, 3000],
        "attn_mask_annealing_start": [0, 6520, 9780, 13040],
        "attn_mask_annealing_end": [3000, 9780, 13040, 16300],
    }
    for name, expected in published.items():
        assert [share * steps for share in model[name]] == pytest.approx(expected, abs=2), name
    assert (model.lr, model.llrd) == (2e-4, 1.0)


def test_a_saved_configuration_holds_no_value_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EOMT_KEY", "s3cret")
    monkeypatch.setenv("EOMT_ROOT", str(tmp_path))
    words = ["+logger.csv.prefix=${oc.env:EOMT_KEY}", "name=run-${logger.csv.prefix}", "data.num_train=${data.num_val}"]
    words += ["data.root=${oc.env:EOMT_ROOT}", "+logger.csv.flag=${oc.env:EOMT_NONE,'a, b'}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("cityscapes", ["data=toy_streets", "output_dir=x", *words])
    cfg.variant = None
    absolute_paths(cfg)
    text = saved_yaml(cfg)
    assert "s3cret" not in text and str(tmp_path) not in text
    saved = OmegaConf.create(yaml.safe_load(text))
    assert "num_train: 60" in text and saved.logger.csv.flag == "a, b"
    assert cfg.name == saved.name == "run-s3cret", "read again where it is needed"
    assert saved.data.root == str(tmp_path)
    monkeypatch.delenv("EOMT_KEY")
    with pytest.raises(InterpolationResolutionError):
        OmegaConf.to_container(saved, resolve=True)


def test_a_relative_path_and_a_nested_default_of_the_environment_are_not_written_down_either(monkeypatch):
    monkeypatch.setenv("EOMT_ROOT", "s3cret/place")
    cfg = composed(overrides=["data.root=${oc.env:EOMT_ROOT}"])
    absolute_paths(cfg)
    assert "s3cret" not in saved_yaml(cfg) and cfg.data.root == "s3cret/place"
    cfg = OmegaConf.create({"a": "${oc.env:EOMT_NONE,${oc.env:EOMT_ROOT}}"})
    saved = OmegaConf.create(yaml.safe_load(saved_yaml(cfg)))
    assert "s3cret" not in saved_yaml(cfg) and saved.a == "s3cret/place"


def test_a_configuration_without_the_environment_is_saved_as_it_resolves(tmp_path):
    cfg = composed(overrides=["data.root=/x", f"output_dir={tmp_path}"])
    assert yaml.safe_load(saved_yaml(cfg)) == OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["data=folder", "model=vit_small"], "folder_vit_small"),
        (["data=folder", "model=vit_small", "model.use_lora=true"], "folder_vit_small_lora"),
        (["experiment=camvid", "variant=head"], "camvid_head"),
        (["experiment=toy_source"], "toy_source"),
        (["name=mine", "variant=full"], "mine"),
    ],
)
def test_a_run_is_called_what_it_trains_unless_it_is_given_a_name(words, name):
    assert compose_run([*words, "output_dir=run"]).name == name


def test_a_matrix_is_called_by_its_data_and_model_whatever_its_variants():
    words = ["data=folder", "model=vit_small", "variants=[lora_r4,full]"]
    assert parse_matrix(words, "cityscapes_lora")[0]["folder"] == "outputs/compare/folder_vit_small"
    assert parse_matrix(["experiment=toy_night"], "cityscapes")[0]["folder"] == "outputs/compare/toy_night"
