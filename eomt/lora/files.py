"""Adapters on disk in PEFT's format, tied to their base by its fingerprint, and several of them on one base."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from eomt.files import parse_json, read_json, read_tensors, replacing_files
from eomt.fingerprints import Identity, first_misfit, identify, is_adapter, plain_name
from eomt.lora.renamed import names_here, record_layers
from eomt.lora.saved_config import CONFIG_FILE, WEIGHTS_FILE, known_config, layers_named, read_adapter_config
from eomt.targets import linear_names
from lora_config import (
    LoRASettings,
    Method,
    adapted_layers,
    anchored,
    assert_not_adapted,
    finish_adapting,
    import_peft,
    listed,
    wrap,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

BASE = "base"  # in place of an adapter's name: none of them


def save_adapter(handle: PeftModel, directory: str | Path) -> None:
    """Writes PEFT's `adapter_config.json` and `adapter_model.safetensors`, with a record of the base as metadata.

    Of several adapters, the one in use. In a run of several processes, call it from one.

    Raises:
        ValueError: none is in use.
    """
    from safetensors.torch import save_file

    name, state = adapter_in_use(handle), adapter_tensors(handle)
    layers, others = _layers_of(handle, name)
    base = getattr(handle.get_base_model(), "lora_base", None)
    metadata = {"format": "pt"}
    if base:
        metadata |= {"base_fingerprint": base.exact, "base_weights": json.dumps(base.as_dict())}
        metadata["base_layers"] = json.dumps(record_layers(base, layers))
    config = copy.copy(handle.peft_config[name])
    config.inference_mode = True
    for field, value in vars(config).items():
        if isinstance(value, set):  # of layer names: the same file each time
            setattr(config, field, sorted(value))
    config.target_modules, config.exclude_modules = layers, others
    config.fan_in_fan_out = False  # PEFT sets it for GPT-2's Conv1D, by the layer, whenever it adapts one
    with replacing_files(directory) as draft:
        save_file(state, draft / WEIGHTS_FILE, metadata=metadata)
        config.save_pretrained(str(draft))


def _layers_of(handle: PeftModel, name: str) -> tuple[list[str], list[str] | None]:
    """The layers that an adapter adapts, and others that PEFT would take for them by the ends of their names."""
    module = handle.get_base_model()
    layers = adapted_layers(module).items()
    own = sorted(plain_name(n) for n, layer in layers if name in getattr(layer, layer.adapter_layer_names[0]))
    ends = tuple(f".{layer}" for layer in own)
    return own, sorted({n for n in map(plain_name, linear_names(module)) if n.endswith(ends)} - {*own}) or None


def adapter_tensors(handle: PeftModel) -> dict[str, Tensor]:
    """The tensors of the adapter in use, under their names in its file; ValueError if none is."""
    state = _adapter_state(handle, adapter_in_use(handle))
    return {plain_name(key): tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def _adapter_state(handle: PeftModel, name: str) -> dict[str, Tensor]:
    """One adapter's tensors under their names in a file; older PEFT takes `day2` for a part of `day`."""
    own = {key: t for key, t in handle.state_dict().items() if is_adapter(key) and name in key.split(".")}
    return import_peft().get_peft_model_state_dict(handle, own, adapter_name=name, save_embedding_layers=False)


def load_adapter(
    module: nn.Module,
    directory: str | Path,
    is_trainable: bool = False,
    method: Method | None = None,
    config: PeftConfig | None = None,
) -> PeftModel:
    """Adapts `module` in place with a saved adapter, and returns the handle as apply_lora does.

    Without `is_trainable` the adapters are frozen and the module is put in eval mode, as PEFT does it.

    Args:
        module: the base.
        directory: as `save_adapter` wrote it.
        is_trainable: whether the adapter trains on.
        method: the one that the adapter was trained with, if it is none of `eomt.lora.methods.METHODS`.
        config: PEFT's configuration as it is meant, with which that of the folder must agree; only LoRA needs none.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: already adapted, the adapter was trained on other base weights, was edited, or does not fit.
    """
    assert_not_adapted(module)
    base = identify(module)
    tensors, config, targets = _check_adapter(module, Path(directory), base, config)
    config.inference_mode = not is_trainable
    handle = wrap(module, config, targets)
    if wrong := _misfit(handle, "default", tensors):
        handle.unload()
        raise ValueError(f"the adapter in {directory} {wrong}")
    import_peft().set_peft_model_state_dict(handle, tensors)
    if not is_trainable:
        handle.eval()
    is_lora = read_adapter_config(Path(directory))["peft_type"] == "LORA"
    finish_adapting(module, base, LoRASettings.from_adapter(directory) if is_lora else None)
    module.lora_loaded = True  # the adapter may change the output from the start
    if method:
        module.adapter_method = method
    return handle


def _check_adapter(
    module: nn.Module, directory: Path, base: Identity, config: PeftConfig | None
) -> tuple[dict[str, Tensor], PeftConfig, list[str]]:
    """An adapter's tensors, configuration and layers, if it was trained on this base and says what is meant."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory / file} is missing: give the folder that save_adapter wrote")
    tensors, metadata = read_tensors(directory / WEIGHTS_FILE)
    try:
        facts, recorded = (parse_json(metadata.get(name, "null")) for name in ("base_weights", "base_layers"))
        trained_on = Identity.from_dict(metadata.get("base_fingerprint"), facts)
        renamed = names_here(recorded or {}, base)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{directory / WEIGHTS_FILE}: {error}") from error
    if trained_on.exact and not renamed and (difference := trained_on.difference(base)):
        raise ValueError(
            f"the adapter in {directory} was trained on other base weights ({difference}): first load those, at the "
            "same sizes and precision"
        )
    known = known_config(directory, config)
    names, content = {plain_name(name): name for name in linear_names(module)}, read_json(directory / CONFIG_FILE)
    if renamed:
        content["target_modules"] = [renamed.get(name, name) for name in content["target_modules"]]
    layers = layers_named(content, [*names])
    if config and (other := {*layers} ^ {*layers_named(vars(config), [*names])}):
        raise ValueError(
            f"the adapter in {directory} does not fit this module ({CONFIG_FILE} and the settings disagree about "
            f"{listed(sorted(other))}): load it on the network it was trained with"
        )
    places = {there: names.get(here, here) for there, here in (renamed or {name: name for name in layers}).items()}
    return _renamed(tensors, places), known, [names[name] for name in layers]


def _renamed(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of an adapter's file, under the names that its layers have here."""
    prefix = "base_model.model."
    pattern = re.compile(rf"{re.escape(prefix)}({'|'.join(map(re.escape, places))})\.")
    return {pattern.sub(lambda found: f"{prefix}{places[found[1]]}.", key): t for key, t in tensors.items()}


def _misfit(handle: PeftModel, name: str, saved: Mapping[str, Tensor]) -> str | None:
    """Says what keeps tensors of a file from being those of the module's adapter: names, shapes or kinds of numbers."""
    expected = _adapter_state(handle, name)
    if saved.keys() != expected.keys():
        return (
            f"does not fit this module (missing: {listed(sorted(expected.keys() - saved.keys())) or 'none'}; "
            f"unexpected: {listed(sorted(saved.keys() - expected.keys())) or 'none'}): load it on the network it was "
            "trained with"
        )
    return first_misfit(saved, expected)


def add_adapter(handle: PeftModel, directory: str | Path, name: str, config: PeftConfig | None = None) -> None:
    """Loads a further adapter of the same base beside those of `handle`; `use_adapter` switches to it.

    `config` is as for `load_adapter`.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: the name is taken or impossible, the adapter was trained on other base weights, or does not fit.
    """
    module = handle.get_base_model()
    if name in handle.peft_config:
        raise ValueError(f"adapter name {name!r} is taken (there are {listed(handle.peft_config)}): choose another")
    reserved = {part for key in module.state_dict() for part in key.split(".")} | {BASE, *dir(nn.ModuleDict)}
    if name in reserved or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or is_adapter(name):
        raise ValueError(
            f"adapter name {name!r}: letters, digits and _, a letter first, and no word that torch or the network's "
            "layers use; for example 'night'"
        )
    base = getattr(module, "lora_base", None) or identify(module)
    tensors, config, targets = _check_adapter(module, Path(directory), base, config)
    config.inference_mode, config.target_modules = True, anchored(targets)
    was_base = active_adapter(handle) == BASE
    was_training = {layer: layer.training for layer in module.modules()}
    handle.add_adapter(name, config)
    for layer, training in was_training.items():  # PEFT may put all in evaluation mode
        layer.training = training
    if wrong := _misfit(handle, name, tensors):
        handle.delete_adapter(name)
        raise ValueError(f"the adapter in {directory} {wrong}")
    import_peft().set_peft_model_state_dict(handle, tensors, adapter_name=name)
    finish_adapting(module, base, getattr(module, "lora_settings", None))
    if was_base:  # layers that are new here are not
        handle.base_model.disable_adapter_layers()


def use_adapter(handle: PeftModel, name: str) -> None:
    """Switches to one of several adapters, or to none (`base`); all are frozen from then on.

    Raises:
        ValueError: no such adapter.
    """
    if name not in (*handle.peft_config, BASE):
        raise ValueError(f"there is no adapter {name!r}: there are {listed([*handle.peft_config, BASE])}")
    if name == BASE:
        handle.base_model.disable_adapter_layers()
    else:
        handle.base_model.enable_adapter_layers()
        handle.set_adapter(name)
    for parameter_name, p in handle.named_parameters():
        if is_adapter(parameter_name):
            p.requires_grad_(False)


def active_adapter(handle: PeftModel) -> str:
    """The name of the adapter in use, or `base`."""
    layers = adapted_layers(handle.get_base_model()).values()
    return BASE if all(layer.disable_adapters for layer in layers) else handle.active_adapter


def adapter_in_use(handle: PeftModel) -> str:
    """The name of the adapter in use.

    Raises:
        ValueError: none is.
    """
    name = active_adapter(handle)
    if name == BASE:
        raise ValueError(f"no adapter is in use: first call use_adapter with one of {listed(handle.peft_config)}")
    return name
