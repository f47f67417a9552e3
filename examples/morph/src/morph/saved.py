"""A trained detector in a folder: settings, the adapter, and the rest of what trained, bound to its base weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eomt.files import read_json, read_tensors, replacing, replacing_folder, write_json
from eomt.fingerprints import base_tensors, first_misfit, is_adapter
from lora_config import LoRASettings, listed
from morph.settings import ADAPTER, MADE, Settings, make_settings, read_overrides

if TYPE_CHECKING:
    from morph.module import MorphDetector

REST, BASE = "rest.safetensors", "base.safetensors"
MAY_DIFFER = ("data", "val_share", "num_workers", "batch_size", "weights", "precision")  # when testing


def save_base(module: MorphDetector, path: Path) -> None:
    """Writes the backbone's weights as they are before training, for `MorphDetector(base=…)`."""
    from safetensors.torch import save_file

    tensors = base_tensors(module.encoder.backbone)
    with replacing(path) as draft:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, draft)


def save_detector(module: MorphDetector, folder: str | Path, base: Path) -> None:
    """Writes `settings.json`, `rest.safetensors`, with LoRA `adapter/`, and the base weights where they were made.

    `base` is their file, which `save_base` wrote.
    """
    from safetensors.torch import save_file

    rest = {k: t.detach().cpu().contiguous() for k, t in module.trained_state().items() if not is_adapter(k)}
    with replacing_folder(folder) as draft:
        facts = {"settings": dataclasses.asdict(module.settings), "base": module.base_record()}
        write_json(draft / "settings.json", facts)
        save_file(rest, draft / REST, metadata={"format": "pt"})
        if module.settings.use_lora:
            module.adapted.save(draft / "adapter")
        if module.settings.weights in MADE and module.adapted:
            shutil.copy(base, draft / BASE)


def saved_settings(folder: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings that a detector was trained with; overrides may say where data and weights are now.

    Raises:
        ValueError: an override contradicts what it was trained with. FileNotFoundError: no detector is there.
    """
    folder = Path(folder)
    if not (folder / "settings.json").is_file():
        raise FileNotFoundError(f"model_path {folder} holds no settings.json: give the folder model/ of a run")
    saved = read_json(folder / "settings.json").get("settings")
    if not isinstance(saved, dict):
        raise ValueError(f"{folder / 'settings.json'} holds no settings: put back what was saved")
    trained, changes = make_settings(saved, str(folder / "settings.json")), read_overrides(overrides)
    trained = dataclasses.replace(trained, **carried_by_adapter(folder, changes)) if trained.use_lora else trained
    asked = make_settings(saved | changes)
    for name in changes:
        before, now = getattr(trained, name), getattr(asked, name)
        if name not in MAY_DIFFER and before != now:
            raise ValueError(f"{name}={now}: the detector in {folder} was trained with {name}={before}; leave it out")
    return dataclasses.replace(trained, **{name: getattr(asked, name) for name in changes})


def carried_by_adapter(folder: Path, changes: Mapping[str, str]) -> dict[str, float]:
    """Rank, alpha and dropout that the adapter says; ValueError with both values where an override says another."""
    asked = {ADAPTER[name]: getattr(make_settings({name: changes[name]}), name) for name in ADAPTER if name in changes}
    own = LoRASettings.from_adapter(folder / "adapter", **asked)
    return {name: getattr(own, field) for name, field in ADAPTER.items()}


def load_detector(folder: str | Path, settings: Settings) -> MorphDetector:
    """The trained detector, in eval mode.

    Raises:
        ValueError: its base weights are others than those that it was trained on, or a file does not fit.
    """
    from morph.module import MorphDetector
    from morph.pretraining import base_weights

    folder = Path(folder)
    trained_whole = settings.freeze_strategy == "none"
    settings = dataclasses.replace(settings, weights="none") if trained_whole else settings  # the file holds them all
    is_kept = settings.weights in MADE and (folder / BASE).is_file()
    base = folder / BASE if is_kept else base_weights(settings)
    module = MorphDetector(settings, base, folder / "adapter" if settings.use_lora else None)
    if not trained_whole:
        module.check_base(read_json(folder / "settings.json").get("base"), f"model_path {folder}")
    tensors, _ = read_tensors(folder / REST)
    own = {name: t for name, t in module.trained_state().items() if not is_adapter(name)}
    if wrong := tensors.keys() ^ own.keys():
        raise ValueError(f"{folder / REST} does not fit its settings.json ({listed(sorted(wrong), 3)}): put back both")
    if misfit := first_misfit(tensors, own):
        raise ValueError(f"{folder / REST} {misfit}")
    module.load_state_dict(tensors, strict=False)
    return module.eval()
