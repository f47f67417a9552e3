"""Saved networks, written and opened again: `adapter/` and `model/` folders, and Lightning's checkpoints."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eomt.files import check_room, read_tensors, replacing_files, write_json
from eomt.fingerprints import Identity, combine_hashes, first_misfit, hash_tensors, identify, is_adapter
from eomt.inference.bases import PLACES, Places, check_base, find_base, moved, record_base, refuse_base
from eomt.inference.saved import (
    BASE_FILE,
    CONFIG_FILE,
    HEADS_FILE,
    WEIGHTS_FILE,
    bare_weights,
    check_peft,
    check_settings,
    find_artefact,
    read_config,
)
from eomt.lora import files as lora_files
from eomt.lora.files import BASE
from eomt.lora.merging import merge
from eomt.lora.methods import find_method
from eomt.lora.quantised import quantise_base
from eomt.models.checkpoint import attention_heads, load_checkpoint
from eomt.models.finite import check_finite
from eomt.settings.formats import ARTEFACT, stamped
from eomt.settings.hub import hub_place, named_on_hub, pinned
from eomt.settings.model import completed
from lora_config import find_targets, listed

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

BACKBONE = "network.encoder.backbone."
# What rebuilding is not about.
PLAIN_BASE = {"base_dtype": "float32", "base_quantisation": None}
ALL_TRAINABLE = {"freeze": (), "unfreeze_last_n": None, "compile": False, **PLAIN_BASE}
# what adapters of one network share
ALIKE = ("num_classes", "class_names", "num_q", "num_blocks", "img_size", "lora_method", "base_quantisation")


class Module(Protocol):
    """The part of a training module such as `MaskClassificationSemantic` that saving and opening use."""

    hparams: Any
    network: nn.Module
    backbone: nn.Module
    lora: PeftModel | None
    adapters: dict[str, Adapter]
    adapter_names: list[str]
    base: Identity | None
    trained_precision: str | None
    artefact_id: str | None
    merged_from: dict[str, str | None]
    source: str | None
    settings_type: ClassVar[type]

    @classmethod
    def setting_names(cls) -> set[str]: ...
    def attach(self, lora: PeftModel) -> None: ...
    def adapter_parameters(self) -> list[nn.Parameter]: ...
    def trained_keys(self) -> set[str]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any: ...


class Adapter(NamedTuple):
    """The heads, settings and id of an adapter, beside its weights in the backbone."""

    heads: dict[str, Tensor]
    settings: dict[str, Any]
    artefact_id: str | None = None


# Saving


def save_pretrained(module: Module, directory: str | Path) -> str:
    """Writes what is needed to rebuild this network: with LoRA a small adapter folder, otherwise all weights.

    An adapter folder is PEFT's own format for the backbone, plus `heads.safetensors` (queries, heads, buffers) and
    `eomt_config.json`. Its base weights are named, not copied, unless they are random and exist nowhere else. Of
    several adapters, the one in use is saved.

    Returns:
        The id of what was saved, which stands in `eomt_config.json`, too.

    Raises:
        ValueError: the base is in use, not an adapter, or weights are not finite. OSError: the disk has no room.
    """
    state = {key: value.contiguous().cpu() for key, value in module.state_dict().items()}
    check_finite(state, "the network", "nothing was saved; lower model.lr")
    said = {"img_size": list(module.hparams.img_size), "num_heads": attention_heads(module.network)}
    metadata = {name: json.dumps(value) for name, value in said.items()}
    init = saved_settings(module)
    tensors = artefact_tensors(module, state)
    check_room(directory, sum(tensor.nbytes for tensor in tensors.values()))
    module.artefact_id = artefact_id(tensors, init)
    config = {
        "artefact_id": module.artefact_id,
        **record_base(module.base),
        "precision": precision(module),
        "init": init,
    }
    with replacing_files(directory) as draft:
        if module.lora is None:
            save_file(state, draft / WEIGHTS_FILE, metadata)
        else:
            lora_files.save_adapter(module.lora, draft)
            save_file({k: v for k, v in state.items() if not k.startswith(BACKBONE)}, draft / HEADS_FILE, metadata)
            if not any(module.hparams[name] for name in ("pretrained", *PLACES)):
                base = {k.replace(".base_layer.", "."): v for k, v in state.items() if not is_adapter(k)}
                save_file(base, draft / BASE_FILE, metadata)
        write_json(draft / CONFIG_FILE, stamped(ARTEFACT, config))
    return module.artefact_id


def saved_settings(module: Module) -> dict[str, Any]:
    """The settings as JSON holds them."""
    init = dict(module.hparams)
    for name in PLACES:
        if init[name] and not hub_place(init[name]):
            init[name] = str(Path(init[name]).expanduser().resolve())
    return json.loads(json.dumps(init))


def artefact_tensors(module: Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a network's state dict is its own: everything, or the adapter in use and the heads, as in their files."""
    if module.lora is None:
        return dict(state)
    adapter = lora_files.adapter_tensors(module.lora)
    return adapter | {key: tensor for key, tensor in state.items() if not key.startswith(BACKBONE)}


def artefact_id(tensors: Mapping[str, Tensor], init: Mapping[str, Any]) -> str:
    """SHA-256 over tensors and settings of what is saved, but for the places of its base, which may move."""
    settings = json.loads(json.dumps(init))
    for name in PLACES:
        settings.pop(name, None)
    overlay = (settings.get("backbone_kwargs") or {}).get("pretrained_cfg_overlay")
    if isinstance(overlay, dict):
        overlay.pop("file", None)
    settings = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(f"{combine_hashes(hash_tensors(tensors))}\n{settings}".encode()).hexdigest()


def precision(module: Module) -> str | None:
    """Lightning's name for the arithmetic that the network was trained in; None if it is not known."""
    return str(module._trainer.precision) if module._trainer else module.trained_precision


# Opening


def load_pretrained(cls: type[Module], path: str | Path, given: Places) -> Module:
    """Restores a trained network, bit for bit, in evaluation mode; see `MaskClassificationSemantic.from_pretrained`."""
    place, path = named_on_hub(path), find_artefact(path)
    module = open_checkpoint(cls, path, given) if path.is_file() else open_folder(cls, path, given)
    module.source = pinned(str(place)) if place else None
    return module


def open_folder(cls: type[Module], path: Path, given: Places) -> Module:
    """A folder that `save_pretrained` wrote."""
    config = read_config(path)
    check_settings(config, path / CONFIG_FILE, cls.setting_names(), cls.settings_type)
    check_peft(config)
    complete = config | {"init": completed(config["init"], cls.settings_type)}
    open_kind = open_adapter if complete["init"]["use_lora"] else open_model
    module = open_kind(cls, path, complete, given)
    module.trained_precision = config.get("precision")
    module.artefact_id = check_unchanged(path, config)  # what is wrong in one file alone is said before
    return module.eval()


def check_unchanged(directory: Path, config: Mapping[str, Any]) -> str:
    """Returns the id of what a folder holds; ValueError if it is no longer what `save_pretrained` wrote.

    A folder of an earlier version names no id, and passes.
    """
    names = (lora_files.WEIGHTS_FILE, HEADS_FILE) if config["init"].get("use_lora") else (WEIGHTS_FILE,)
    tensors = {key: tensor for name in names for key, tensor in read_tensors(directory / name)[0].items()}
    found = artefact_id(tensors, config["init"])
    if config.get("artefact_id") not in (None, found):
        raise ValueError(
            f"{directory} is no longer what was saved: its {', '.join(names)} and the settings in {CONFIG_FILE} are "
            f"together {found[:12]}, saved was {str(config['artefact_id'])[:12]}; fetch the folder again"
        )
    return found


def open_model(cls: type[Module], directory: Path, config: Mapping[str, Any], given: Places) -> Module:
    """A `model/` folder: everything is in it."""
    refuse_base(directory, given)
    module = build_empty(cls, config["init"])
    load_checkpoint(module.network, directory / WEIGHTS_FILE)
    return module


def open_adapter(cls: type[Module], directory: Path, config: Mapping[str, Any], given: Places) -> Module:
    """An `adapter/` folder, on its base."""
    init = moved(config["init"], given)
    own_base = directory / BASE_FILE
    if own_base.is_file() and not any(given.values()):
        given = {"ckpt_path": str(own_base)}
    module = cls(**init | ALL_TRAINABLE | {"use_lora": False} | find_base(directory, init, given))
    module.base = identify(module.backbone)
    check_base(config, module.base, f"the adapter {directory}")
    keep_base_heads(module, init)
    method = find_method(init["lora_method"])
    peft_config = meant_config(module, init)
    module.attach(lora_files.load_adapter(module.backbone, directory, method=method, config=peft_config))
    quantise_base(module.backbone, init["base_quantisation"])  # it was scored on these weights
    load_heads(module, read_tensors(directory / HEADS_FILE)[0], directory / HEADS_FILE)
    set_settings(module, init)
    return module


def meant_config(module: Module, init: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration of an adapter with these settings on this network."""
    settings = module.settings_type.of(init).lora
    return find_method(init["lora_method"]).config(settings, find_targets(module.backbone, settings))


def open_checkpoint(cls: type[Module], path: Path, given: Places) -> Module:
    """A Lightning checkpoint of a run: all weights, or those that a LoRA run trains."""
    checkpoint = read_lightning(path)
    init = checkpoint.get("hyper_parameters")
    if not isinstance(init, Mapping) or not {"img_size", "num_classes", "num_q"} <= init.keys() <= cls.setting_names():
        raise ValueError(bare_weights(path))
    check_settings({"init": init}, path, cls.setting_names(), cls.settings_type)
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} has no weights in `state_dict`: it is no checkpoint of a run")
    check_peft({"init": init})
    init = completed(init, cls.settings_type)
    if not init["use_lora"]:
        refuse_base(path, given)
        module = build_empty(cls, init)
        load_exactly(module, state, module.state_dict().keys(), path)
        return finish_opening(module, checkpoint)
    init = moved(init, given)
    base = find_base(path, init, given)
    if not any(base.values()) and set(init["freeze"]) - {"backbone"}:
        raise ValueError(f"{path} leaves out the heads that its run froze, {init['freeze']}: open its adapter/ folder")
    module = cls(**init | {"compile": False} | base)
    check_base(checkpoint, module.base, f"the checkpoint {path}")
    keep_base_heads(module, init)
    load_exactly(module, state, module.trained_keys(), path)
    for p in module.adapter_parameters():  # as those of an adapter folder
        p.requires_grad_(False)
    set_settings(module, init)
    return finish_opening(module, checkpoint)


def finish_opening(module: Module, checkpoint: Mapping[str, Any]) -> Module:
    """A network from a checkpoint, with the id that it would be saved under."""
    module.trained_precision = checkpoint.get("precision")
    module.artefact_id = artefact_id(artefact_tensors(module, module.state_dict()), saved_settings(module))
    return module.eval()


def read_lightning(path: Path) -> dict[str, Any]:
    """A checkpoint's content; pickled code is never run.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): it may be half-written, or hold pickled objects, which "
            "are never loaded"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return dict(content)


def build_empty(cls: type[Module], init: Mapping[str, Any]) -> Module:
    """The full network of these settings, its weights yet to come."""
    module = cls(**init | ALL_TRAINABLE | {"pretrained": False} | dict.fromkeys(PLACES))
    set_settings(module, init)
    return module


def set_settings(module: Module, init: Mapping[str, Any]) -> None:
    """Records what a run was started with: `hparams` are for files; `settings` stay what the module was built with."""
    module.hparams.update(init)


def load_heads(module: Module, heads: Mapping[str, Tensor], name: str | Path = HEADS_FILE) -> None:
    """Everything outside the backbone, and nothing less."""
    load_exactly(module, heads, head_keys(module), name)


def head_keys(module: Module) -> set[str]:
    return {key for key in module.state_dict() if not key.startswith(BACKBONE)}


def load_exactly(module: Module, state: Mapping[str, Tensor], wanted: Collection[str], name: str | Path) -> None:
    """Loads the wanted keys; ValueError if others are there, some are not, or one is of another shape."""
    check_exactly(state, {key: tensor for key, tensor in module.state_dict().items() if key in wanted}, name)
    module.load_state_dict(state, strict=False)


def check_exactly(state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str | Path) -> None:
    """Raises ValueError where tensors of a file are not the ones that a network has."""
    if wrong := own.keys() ^ state.keys():
        raise ValueError(f"{name} does not fit this network: {len(wrong)} weights differ, {listed(wrong)}")
    if misfit := first_misfit(state, own):
        raise ValueError(f"{name} {misfit}")


# Several adapters on one base


def keep_base_heads(module: Module, init: Mapping[str, Any]) -> None:
    """While the checkpoint's heads are still in the network; fresh heads are not worth keeping."""
    if init["ckpt_path"] and init["load_ckpt_class_head"]:
        module.adapters[BASE] = in_use(module, init)


def in_use(module: Module, settings: Mapping[str, Any]) -> Adapter:
    """A copy of the heads as they are now."""
    state = module.state_dict()
    return Adapter(
        {key: state[key].detach().cpu().clone() for key in head_keys(module)}, dict(settings), module.artefact_id
    )


def add_adapter(module: Module, directory: str | Path, name: str) -> None:
    """See `MaskClassificationSemantic.add_adapter`. The heads are kept in memory, the base is not touched."""
    directory = find_artefact(directory)
    config = read_config(directory) if directory.is_dir() else {}
    if not config.get("init", {}).get("use_lora"):
        raise ValueError(f"{directory} is not an adapter: give the adapter/ folder of a LoRA run")
    if module.lora is None:
        raise ValueError("this network has no adapters: open one with from_pretrained, and add others to it")
    check_settings(config, directory / CONFIG_FILE, module.setting_names(), module.settings_type)
    found = check_unchanged(directory, config)
    config["init"] = completed(config["init"], module.settings_type)
    for setting in ALIKE:
        here, there = (init[setting] for init in (module.hparams, config["init"]))
        if json.dumps(here) != json.dumps(there):
            raise ValueError(
                f"adapters of one network must agree in {setting}: here it is {json.dumps(here)}, in {directory} "
                f"{json.dumps(there)}; open that adapter by itself"
            )
    heads, state = read_tensors(directory / HEADS_FILE)[0], module.state_dict()
    check_exactly(heads, {key: state[key] for key in head_keys(module)}, directory / HEADS_FILE)
    lora_files.add_adapter(module.lora, directory, name, meant_config(module, config["init"]))
    module.adapters[name] = Adapter(heads, config["init"], found)


def use_adapter(module: Module, name: str) -> None:
    """See `MaskClassificationSemantic.use_adapter`."""
    if name not in module.adapter_names:
        why = "its checkpoint left no trained heads to use without the adapter; " if name == BASE else ""
        raise ValueError(f"there is no adapter {name!r}: {why}there are {', '.join(module.adapter_names) or 'none'}")
    module.adapters[lora_files.active_adapter(module.lora)] = in_use(module, module.hparams)
    lora_files.use_adapter(module.lora, name)
    heads, settings, module.artefact_id = module.adapters[name]
    load_heads(module, heads)
    set_settings(module, settings)


def merge_adapter(module: Module) -> None:
    """Adds the updates of the adapter in use to the weights, in float32: from then on it is a full network.

    Raises:
        ValueError: it has no adapter in use.
    """
    if module.lora is None:
        raise ValueError("this network has no adapter to merge")
    merge(module.lora)
    base = record_base(module.base)["base_fingerprint"]
    module.merged_from = {"artefact_id": module.artefact_id, "base_fingerprint": base}
    module.__dict__["lora"], module.base, module.adapters, module.strict_loading = None, None, {}, True
    module.artefact_id = None
    merged = {"use_lora": False, "delta_weights": False, **PLAIN_BASE, **dict.fromkeys(PLACES)}
    set_settings(module, {**module.hparams, **merged})
