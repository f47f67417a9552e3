"""PEFT's `adapter_config.json`, which may come from other people: compared with what is meant, not handed to PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eomt.files import read_json
from lora_config import LoRASettings, peft_config

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's own names
# what changes nothing about the layers, or is compared with the layers themselves
NOT_COMPARED = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode")
NOT_COMPARED += ("target_modules", "exclude_modules", "feedforward_modules", "lora_dropout")
NOTHING = (None, False, {}, [])  # values of options that this version of PEFT does not know, and that ask for nothing

REMEDY = "one of them was changed since the adapter was saved; put it back"


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Returns an adapter's configuration; that of LoRA is checked as far as it can be without PEFT.

    Raises:
        ValueError: an entry is left out or impossible. FileNotFoundError: there is no such file.
    """
    file = directory / CONFIG_FILE
    content = read_json(file)
    lora = content.get("peft_type") == "LORA"
    for name in ("peft_type", "target_modules", *(("r", "lora_alpha") if lora else ())):
        if name not in content:
            raise ValueError(f"{file} has no {name}: put back what was saved with the adapter")
    targets = content["target_modules"]
    if not isinstance(content["peft_type"], str):
        raise ValueError(f"{file} says peft_type {content['peft_type']!r}: the name of a method is meant")
    if not (targets and is_names(targets)):
        raise ValueError(f"{file} says target_modules {targets!r}: a list of the adapted layers is meant")
    if not is_names(others := content.get("exclude_modules") or []):
        raise ValueError(f"{file} says exclude_modules {others!r}: a list of layers that are not adapted is meant")
    if lora:
        try:
            LoRASettings.from_peft(content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return content


def is_names(value: Any) -> bool:
    """Whether it is a list of names."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def layers_named(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of a network's linear layers that a configuration as saved means: by the ends of their names, as PEFT."""
    targets, others = (tuple(config.get(key) or ()) for key in ("target_modules", "exclude_modules"))
    ends, other_ends = tuple(f".{end}" for end in targets), tuple(f".{end}" for end in others)
    return [n for n in names if n in targets or (f".{n}".endswith(ends) and not f".{n}".endswith(other_ends))]


def known_config(directory: Path, meant: PeftConfig | None = None) -> PeftConfig:
    """Returns `meant`, or without it what the file says in settings of LoRA that this project writes, too.

    Raises:
        ValueError: the file says something else, or names a method whose settings must be given.
    """
    content, source = read_adapter_config(directory), "what it is opened with"
    file, kind = directory / CONFIG_FILE, content["peft_type"]
    if meant is None and kind == "LORA":
        source = "what is supported"
        settings = LoRASettings.from_peft(content)
        meant = peft_config(settings, [*settings.target_modules])
    elif meant is None:
        raise ValueError(f"{file} says peft_type {kind}: give the configuration of this method")
    wanted = json.loads(json.dumps(meant.to_dict(), default=_plain))
    if kind != wanted["peft_type"]:
        raise ValueError(f"{file} says peft_type {kind}, {source} says {wanted['peft_type']}: {REMEDY}")
    for name, value in content.items():
        same = value == wanted[name] if name in wanted else value in NOTHING
        if name not in NOT_COMPARED and not same:
            other = f"{source} says {json.dumps(wanted[name])}" if name in wanted else "which nothing here knows"
            raise ValueError(f"{file} says {name} {json.dumps(value)}, {other}: {REMEDY}")
    return meant


def _plain(value: Any) -> Any:
    """Sets and enumerations as JSON holds them."""
    return sorted(value) if isinstance(value, (set, tuple)) else value.value
