"""Numbers that cannot be meant are refused before torch is imported: below or above their range, nan, infinite."""

import math
from dataclasses import fields

import pytest

from eomt.settings.model import ModelSettings
from eomt.settings.run import check_options
from eomt.settings.trainer import check_trainer
from lora_config import LoRASettings

NEEDED = {"img_size": [64, 64], "num_classes": 3}
NUMBERS = [f.name for f in fields(ModelSettings) if "float" in str(f.type)]
NAN, INF = math.nan, math.inf


def refused(check, name, value):
    with pytest.raises(ValueError, match=name.rsplit("lora_", 1)[-1]):
        check()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_setting_is_nan_or_infinite(name, value):
    sequences = {"warmup_steps": 2, "attn_mask_annealing_start": 4, "attn_mask_annealing_end": 4, "class_weights": 3}
    value = [value, *[0.5] * (sequences[name] - 1)] if name in sequences else value
    refused(lambda: ModelSettings(**NEEDED, **{name: value}), name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(f"{name}_coefficient", -5.0) for name in ("mask", "dice", "class", "no_object")],
        ("no_object_coefficient", 0.0),
        ("outlier_weight", 0.0),
        ("outlier_weight", -1.0),
        ("lr", 0.0),
        ("lr", -1e-4),
        ("lora_lr", -1e-4),
        ("llrd", 1.5),
        ("weight_decay", -0.1),
        ("poly_power", 0.0),
        ("warmup_steps", [0.1]),
        ("warmup_steps", [-1, 5]),
        ("warmup_steps", [0.1, 1.5]),
        ("attn_mask_annealing_start", [0.1, 0.2, 0.3, 1.2]),
        ("attn_mask_annealing_end", [1, 2, 3, -4]),
        ("class_weights", [1.0, -1.0, 1.0]),
        ("class_weights", [0.0, 0.0, 0.0]),
        ("class_colors", [[0, 0, 0], [1, 1, 1], [2, 2, 256]]),
        ("class_colors", [[0, 0, 0], [1, 1, 1], [2, 2]]),
        ("num_q", 0),
        ("num_points", -1),
        ("num_blocks", 0),
        ("oversample_ratio", 0.5),
        ("importance_sample_ratio", 1.1),
        ("arcface_scale", -1.0),
        ("arcface_margin", -0.1),
        ("lora_alpha", -2),
        ("lora_dropout", 1.0),
        ("lora_rank", 0),
        ("lora_options", {"alpha_pattern": {"qkv": -2}}),
        ("lora_options", {"alpha_pattern": {"qkv": INF}}),
        ("lora_options", {"rank_pattern": {"qkv": 0}}),
    ],
)
def test_a_setting_of_the_model_has_its_range(name, value):
    refused(lambda: ModelSettings(**NEEDED, **{name: value}), name.replace("lora_options", "pattern"), value)


def test_a_loss_without_any_term_is_refused():
    none = dict.fromkeys(("mask_coefficient", "dice_coefficient", "class_coefficient"), 0.0)
    with pytest.raises(ValueError, match="mask_coefficient, dice_coefficient and class_coefficient are 0"):
        ModelSettings(**NEEDED, **none)
    ModelSettings(**NEEDED, **none | {"class_coefficient": 1.0})


@pytest.mark.parametrize("value", [NAN, INF])
def test_alpha_is_a_number(value):
    with pytest.raises(ValueError, match="alpha"):
        LoRASettings(alpha=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_clip_val", -1),
        ("gradient_clip_val", NAN),
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", -2),
        ("max_epochs", -2),
        ("max_epochs", 0),
        ("max_steps", -5),
        ("check_val_every_n_epoch", 0),
        ("val_check_interval", 0),
        ("val_check_interval", -3),
        ("val_check_interval", 1.5),
        ("limit_train_batches", 0),
        ("limit_train_batches", -1),
        ("limit_train_batches", 1.5),
        ("limit_val_batches", -1),
        ("limit_val_batches", 2.5),
        ("limit_val_batches", NAN),
        ("log_every_n_steps", -1),
        ("num_sanity_val_steps", -2),
        ("devices", 0),
        ("devices", -3),
        ("num_nodes", 0),
        ("overfit_batches", -0.5),
        ("min_epochs", -1),
        ("min_steps", -1),
    ],
)
def test_a_number_of_the_trainer_has_its_range(name, value):
    with pytest.raises(ValueError, match=rf"trainer\.{name} {value}: "):
        check_trainer({name: value})


def test_usual_numbers_of_the_trainer_pass():
    usual = {"max_epochs": -1, "max_steps": 0, "val_check_interval": 0.25, "limit_val_batches": 0, "devices": "auto"}
    usual |= {"gradient_clip_val": None, "limit_train_batches": 1.0, "accumulate_grad_batches": 4, "precision": "16"}
    check_trainer(usual | {"num_sanity_val_steps": -1, "overfit_batches": 0.0, "gradient_clip_val": 0})
    check_trainer({"limit_train_batches": 1, "devices": -1, "devices ": [0, 1], "val_check_interval": 100})


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", 2**32), ("patience", 0), ("views", 0)])
def test_a_number_of_the_run_has_its_range(name, value):
    with pytest.raises(ValueError, match=rf"{name} {value}: "):
        check_options({"seed": 0, "patience": None, "views": 8} | {name: value})


def test_more_processes_than_processors_are_refused_without_torch():
    with pytest.raises(ValueError, match=r"trainer\.devices 999 with accelerator cpu: \d+ processes at most here"):
        check_trainer({"devices": 999, "accelerator": "cpu"})
