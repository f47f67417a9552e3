"""Checks of a run's configuration that need no torch: names, values, paths.

Everything here takes plain, resolved mappings. What needs torch is checked by `check_config` and by what is built.
"""

import importlib.util
import inspect
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eomt.command_line import unquoted
from eomt.lora.methods import METHODS, check_method_name
from eomt.processes import is_first_process
from eomt.settings.config_check import argument_types, check_call, check_name, check_type, find_target
from eomt.settings.model import ModelSettings
from eomt.settings.trainer import check_callbacks, check_plugins, check_trainer
from eomt.suggestions import did_you_mean

MODEL = "eomt.training.mask_classification_semantic.MaskClassificationSemantic"
PARTS = {
    "data": (),
    "model": (),
    "trainer": (),
    "callbacks": ("save_best", "audit", "clock", "finite_steps"),
    "logger": (),
}
OPTIONS = {
    "name": str,
    "variant": str | None,
    "group": str | None,
    "job": str | None,
    "output_dir": str,
    "seed": int,
    "resume": str | None,
    "patience": int | None,
    "allow_any_target": bool,
    "trunk_cache": bool,
    "views": int,
}
LEFT_BY_RUNS = ("metrics.csv", "checkpoints", "adapter", "model")  # worth keeping
RECORDS = ("experiment", "lora", "lora_preset")  # choices that may leave their names


def check_run(config: Mapping[str, Any], missing: Collection[str] = ()) -> None:
    """Everything that can be known to be wrong without torch.

    Args:
        config: of `train_with_lora.py`, plain and resolved.
        missing: dotted names of values that are required and not given.

    Raises:
        ValueError: a key that is unknown or left out, or a value that cannot be meant. FileNotFoundError: a file or
            folder is not there.
    """
    check_parts(config)
    for key, hint in OPTIONS.items():
        check_type(config[key], hint, key)
    check_options(config)
    check_trainer(config["trainer"])
    check_plugins(config["trainer"].get("plugins"))
    check_callbacks(config["callbacks"], config["model"])
    any_target = config["allow_any_target"]
    method = config["model"].get("lora_method", "lora")
    if isinstance(method, str) and method not in METHODS:
        check_method_name(method)
        check_name(method, "model.lora_method", any_target)  # it is imported later
    if not any(key.startswith("model.") for key in missing):
        check_model(config["model"])
    if missing:
        raise ValueError(required(missing))
    if config["resume"] not in (None, "auto") and not Path(config["resume"]).is_file():
        raise FileNotFoundError(no_checkpoint(Path(config["resume"])))
    check_data(config["data"], any_target)


def unread_lora(words: Sequence[str]) -> list[str]:
    """The words `model.lora_...=` of a command line that does not say itself whether there is LoRA."""
    keys = [word.lstrip("+~").partition("=")[0] for word in words]
    if "model.use_lora" in keys:
        return []
    return [word for word, key in zip(words, keys, strict=True) if key.startswith("model.lora_") and "=" in word]


def no_checkpoint(path: Path) -> str:
    """The sentence for a `resume` that is no file."""
    if not path.is_dir():
        return f"resume {path}: no such checkpoint; resume=auto finds the newest one in output_dir"
    return f"resume {path} is a folder, a checkpoint is meant: in a run's folder output_dir=FOLDER resume=auto goes on"


def check_options(config: Mapping[str, Any]) -> None:
    """Raises ValueError where a number at the top of the configuration is out of its range."""
    if not 0 <= config["seed"] < 2**32:
        raise ValueError(f"seed {config['seed']}: a seed is from 0 to {2**32 - 1}; Lightning would take 0 in its place")
    for name in ("patience", "views"):
        if config[name] is not None and config[name] < 1:
            raise ValueError(f"{name} {config[name]}: at least 1")


def check_output_dir(folder: Path, resume: str | None, names: tuple[str, str] = ("output_dir", "resume=auto")) -> None:
    """Raises ValueError where the folder holds a run that is not continued: it is not written over.

    `names` are what the command line calls the folder, and what it takes to continue.
    """
    goes_on = resume == "auto" or (resume and folder.resolve() in Path(resume).resolve().parents)
    if is_first_process() and not goes_on and any((folder / name).exists() for name in LEFT_BY_RUNS):
        raise ValueError(f"{names[0]} {folder} holds a run: continue it with {names[1]}, or choose another folder")


def check_parts(config: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown key at the top, or a part that is left out."""
    for key in config:
        if key not in (*PARTS, *OPTIONS, *RECORDS):
            raise ValueError(f"{key} is unknown at the top of the configuration{did_you_mean(key, [*PARTS, *OPTIONS])}")
    for part, entries in PARTS.items():
        if part not in config:
            raise ValueError(f"the configuration has no {part}: begin it with `defaults: [cityscapes, _self_]`")
        if part in ("callbacks", "logger"):
            for name, node in config[part].items():
                if not isinstance(node, Mapping):
                    raise ValueError(
                        f"{part}.{name} {node!r}: a class with its settings is meant; ~{part}.{name} drops it"
                    )
        if absent := [entry for entry in entries if entry not in config[part]]:
            raise ValueError(f"{part}.{absent[0]} cannot be left out: it writes or proves what the run leaves")


def check_model(model: Mapping[str, Any]) -> None:
    """Names, types and values of the model's settings; a module of somebody else's may have further names."""
    settings = {"num_classes": 1, **{key: value for key, value in model.items() if value is not None}}
    if model.get("_target_", MODEL) == MODEL:
        hints, _ = argument_types(ModelSettings)
        own = {name: value for name, value in settings.items() if name not in MODEL_PARTS and name != "_target_"}
        for name, value in own.items():
            if name not in hints:
                raise ValueError(f"model.{name} is unknown{did_you_mean(name, [*hints, *MODEL_PARTS])}")
            if not (isinstance(value, Mapping) and "_target_" in value):
                check_type(value, hints[name], f"model.{name}")
    if ModelSettings.of(settings).base_quantisation and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"model.base_quantisation={settings['base_quantisation']} needs the package bitsandbytes, which is not "
            "installed: pip install 'eomt-lora[quantised]', or leave it out"
        )


def required(missing: Collection[str]) -> str:
    """The sentence on settings that have no value."""
    names = sorted(missing)
    given = " ".join(f"{name}=VALUE" for name in names)
    note = "; scripts/dataset_report.py --init IMAGES MASKS writes a class file" if "data.classes" in names else ""
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} required: give {given}{note}"


MODEL_PARTS = ("encoder", "loss", "optimizer")  # objects that YAML may describe


def check_data(data: Mapping[str, Any], any_target: bool = False, files: bool = True) -> None:
    """The arguments of a data set's function and, if `files`, their places where it has a function `splits`.

    `splits` takes the function's own arguments, imports no torch, and raises what is wrong.
    """
    if "_target_" not in data:
        return
    target = find_target(data["_target_"], "data._target_", any_target)
    check_call(data, "data", any_target)
    splits = getattr(sys.modules.get(target.__module__), "splits", None)
    if splits and files:
        splits(**{name: data[name] for name in inspect.signature(splits).parameters if name in data})


def found_before(words: Sequence[str]) -> Path:
    """The innermost folder that is there of the one that a command line gives its runs; what they make lies below."""
    keys = ("output_dir=", "hydra.sweep.dir=", "hydra.run.dir=")
    given = [word.partition("=")[2] for word in words if word.lstrip("+").startswith(keys)]
    place = Path(os.path.abspath(unquoted(given[-1]) if given else "outputs"))
    return next(each for each in (place, *place.parents) if os.path.isdir(each))  # of any text, unlike Path.is_dir


def remove_empty(folder: Path, kept: Path) -> None:
    """Removes a folder and those that it lies in as far as they are empty and below `kept`."""
    with suppress(OSError):  # another run may have come
        for empty in (folder, *folder.parents):
            if kept not in empty.parents:
                break
            empty.rmdir()
