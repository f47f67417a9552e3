"""What was meant by a word that is mistyped: the option, the setting, the file, as the end of a sentence."""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from eomt.places import CONFIGS


def did_you_mean(word: str, known: Iterable) -> str:
    """The closest known word as the end of a sentence, or nothing; dashes in front make no words alike."""
    names, word = {str(name).lstrip("-"): str(name) for name in known}, word.lstrip("-")
    begun = [name for name in names if name.startswith(word)] if len(word) > 2 else []
    close = begun or difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""


ELSEWHERE = {  # words of other programs that look like another setting here, or like none
    "learning_rate": "model.lr",
    "r": "model.lora_rank",
    "lora_r": "model.lora_rank",
    "lora": "model.use_lora",
    "gpus": "trainer.devices",
    "bs": "data.batch_size",
    "amp": "trainer.precision",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "checkpoint": "model.ckpt_path",
    "resolution": "model.img_size",
    "save_dir": "output_dir",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
}


def settings_known() -> list[str]:
    """Settings and groups of `configs/` as the command line names them, `model.lora_rank`, `logger`; read as YAML."""
    import yaml

    top = yaml.safe_load((CONFIGS / "cityscapes.yaml").read_text())
    groups = [entry for part in top.pop("defaults") if isinstance(part, dict) for entry in part]
    found = [*groups, *(key for key in top if key != "hydra")]
    for group in ("model", "data", "trainer"):
        for file in sorted((CONFIGS / group).glob("*.yaml")):
            found += [f"{group}.{key}" for key in yaml.safe_load(file.read_text()) if key[0] not in "_+"]
    return list(dict.fromkeys(found))


def not_found(path: str | Path, wanted: str = "file or folder") -> str:
    """Says that a path is not there, or is not what is wanted of it, and what was meant or would make it."""
    path = Path(path)
    if os.path.exists(path):  # of any text, unlike Path.exists
        return f"{path} is a {'folder' if path.is_dir() else 'file'}, a {wanted} is meant"
    source = path.parent.name
    if path.name in ("adapter", "model") and (CONFIGS / "experiment" / f"{source}.yaml").is_file():
        made = f"python train_with_lora.py experiment={source} output_dir={path.parent} makes it"
        return f"{path}: no such {wanted}; {made}"
    beside: list[str] = []
    with suppress(OSError, ValueError):  # a folder that cannot be read
        beside = os.listdir(path.parent)
    return f"{path}: no such {wanted}{did_you_mean(path.name, beside)}"


def option_meant(word: str, flags: Mapping[str, str], settings: Sequence[str]) -> str:
    """The end of a sentence about an unknown option: the flag or the setting that was meant, or nothing.

    Args:
        word: the option, as it was typed.
        flags: that there are, with the settings that they stand for.
        settings: that may be written, dotted.
    """
    name = word.lstrip("-").replace("-", "_")
    leaves = {setting.rpartition(".")[2]: setting for setting in reversed(settings)}
    setting = ELSEWHERE.get(name)
    if setting := setting if setting in settings else leaves.get(name):
        flag = next((flag for flag, stands_for in flags.items() if stands_for == setting), None)
        return f"; did you mean {flag or f'{setting}=VALUE'}?"
    return did_you_mean(name, flags)


def meant(name: str, key: str, parent: Mapping) -> str:
    """The end of a sentence about a name that no configuration has: the key that was meant, wherever it stands.

    Args:
        name: as it was given, dotted.
        key: the part of it that is not there.
        parent: where it would be; OmegaConf's.
    """
    if name == "data.root" and "images" in list(parent):  # also as long as it is not given
        return ": these data are named by data.images, data.masks and data.classes"
    names = {dotted.replace(".", "_"): dotted for dotted in dotted_names(parent._get_root())}
    leaves: dict[str, str] = {}
    for dotted in names.values():
        if not dotted.startswith("hydra."):
            leaves.setdefault(dotted.rpartition(".")[2], dotted)
    word = name.rpartition(".")[2]
    if same := ELSEWHERE.get(word) or leaves.get(word):
        return f"; did you mean {same}?"
    if choices := choices_with(*name.split(".", 1)):
        return f": {' or '.join(choices)} has it"
    if name.endswith(key) and (close := did_you_mean(key, parent)):
        return close
    names |= leaves
    close = difflib.get_close_matches(name.replace(".", "_"), names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""


def choices_with(group: str, key: str = "") -> list[str]:
    """The choices of a group whose configuration has a key: `data=folder`, of `data` and `images`."""
    import yaml

    files = sorted((CONFIGS / group).glob("*.yaml"))
    return [f"{group}={file.stem}" for file in files if key in (yaml.safe_load(file.read_text()) or {})]


def dotted_names(node: Mapping, prefix: str = "") -> Iterator[str]:
    """Every key of a nested configuration, `model.lora_rank`; of OmegaConf's, values that are missing too."""
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, Mapping):
            yield from dotted_names(child, f"{prefix}{key}.")
