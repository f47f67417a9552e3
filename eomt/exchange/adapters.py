"""PEFT's adapters in other layouts, as adapter/ folders of this project.

An adapter that was trained on transformers' EoMT has updates of `q_proj`, `k_proj` and `v_proj` apart, where timm has
one layer. Beside each other the ranks add up, and the update is the same: A is one above the other, B a block for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor

from eomt.exchange.opening import is_ours, settings_of
from eomt.files import read_json, read_tensors
from eomt.fingerprints import first_misfit
from eomt.lora.files import WEIGHTS_FILE
from eomt.lora.saved_config import CONFIG_FILE
from eomt.settings.backbone_names import places, renamed
from eomt.settings.config_check import check_type
from eomt.settings.eomt_files import EomtFile, read_eomt_file
from eomt.settings.eomt_names import BACKBONE, BACKBONES, TRANSFORMERS, bare, head_name
from eomt.settings.hub import local_path, named_on_hub, pinned
from lora_config import adapted_layers, listed

if TYPE_CHECKING:
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

KNOWN = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora"}
# what names the base or chose the layers, which the tensors tell, and what is for options that are not used
KNOWN |= {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"}
KNOWN |= {
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "rank_pattern",
    "megatron_core",
    "qalora_group_size",
}
NOTHING = (None, False, {}, [], "none")
TYPES = {"r": PositiveInt, "lora_alpha": float}  # that scale the updates
LORA = re.compile(r"(.*)\.lora_([AB])\.weight$")


class Update(NamedTuple):
    """The update of one layer, or of the part of timm's layer that starts at row `place` of `count` parts."""

    a: Tensor  # [r, C]
    b: Tensor  # [C', r]
    place: int
    count: int


def write_adapter(
    path: str | Path, directory: str | Path, ckpt_path: str | None = None, backbone_weights: str | None = None
) -> None:
    """Writes an adapter/ folder from an adapter of this or an earlier version, or of PEFT on transformers' EoMT.

    Args:
        path: the adapter's folder.
        ckpt_path: the base weights. None: what the adapter names, if it is there.

    Raises:
        ValueError: it is no adapter, or one that cannot be had exactly. OSError: it or its base is not there.
    """
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    path = Path(path).expanduser()
    if is_ours(path):
        module = MaskClassificationSemantic.from_pretrained(path, ckpt_path, backbone_weights)
        if module.lora is None:
            raise ValueError(f"{path} holds a whole network, and no adapter: --to eomt writes it")
        module.save_pretrained(directory)
        return
    if backbone_weights:
        raise ValueError(
            f"backbone_weights {backbone_weights}: {path}, an adapter of another program, has its base in ckpt_path: "
            "leave it out"
        )
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path} is no folder of an adapter: it has no {CONFIG_FILE}; --to eomt writes whole networks")
    config = read_json(path / CONFIG_FILE)
    check_config(config, path / CONFIG_FILE)
    open_foreign(path, config, base_of(path, config, ckpt_path)).save_pretrained(directory)


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError where an adapter is more than plain LoRA, or has impossible settings, naming what."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file} says peft_type {config.get('peft_type')}: plain LoRA alone is mapped to other layers")
    for name, hint in TYPES.items():
        if name not in config:
            raise ValueError(f"{file} has no {name}, which scales the updates: put back what PEFT wrote")
        check_type(config[name], hint, f"{file}: {name}")
    init = config.get("init_lora_weights", True)
    other = {name: value for name, value in config.items() if name not in KNOWN and value not in NOTHING}
    if init in (True, False, "gaussian", "orthogonal"):
        other.pop("init_lora_weights", None)
    if other:
        name = min(other)
        raise ValueError(
            f"{file} says {name} {other[name]!r}: on other layers that would be another update; plain LoRA alone is "
            "mapped"
        )


def base_of(path: Path, config: Mapping[str, Any], ckpt_path: str | None) -> str:
    """Where the network is that an adapter was trained on, pinned; ValueError where it is not named, or not there."""
    named = str(ckpt_path or config.get("base_model_name_or_path") or "")
    place, why = named_on_hub(named), ""
    if place and not ckpt_path:
        place = place._replace(revision=place.revision or config.get("revision"))
    try:
        found = pinned(str(place) if place else named)
        if found and local_path(found).exists():
            return found
    except ConnectionError as error:
        why = f" ({error})"
    raise ValueError(
        f"{path} names as its base {named!r}, which is not there{why}: give the folder or file of the network it was "
        "trained on with --ckpt_path"
    )


def open_foreign(path: Path, config: Mapping[str, Any], place: str) -> MaskClassificationSemantic:
    """The network with an adapter of PEFT's on its own base, which is at `place`, by timm's layers."""
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    base, tensors = read_eomt_file(local_path(place)), read_tensors(path / WEIGHTS_FILE)[0]
    updates, heads, added = sort_tensors(at_one_scale(tensors, config), base, path / WEIGHTS_FILE)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    ranks = {name: sum(update.a.shape[0] for update in parts) for name, parts in updates.items()}
    rank = min(ranks.values())
    settings = settings_of(base) | {"ckpt_path": place}
    if "class_head.weight" in heads and len(heads["class_head.weight"]) != settings["num_classes"] + 1:
        settings |= {"num_classes": len(heads["class_head.weight"]) - 1, "load_ckpt_class_head": False}
        settings |= {"class_names": None, "class_colors": None}
    module = MaskClassificationSemantic(
        **settings,
        use_lora=True,
        lora_rank=rank,
        lora_alpha=scale * rank,
        lora_dropout=config.get("lora_dropout", 0.0),
        lora_target_modules=sorted(updates),
        lora_options={
            "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {name: scale * r for name, r in ranks.items() if r != rank},
        },
    )
    load_updates(module, updates, path)
    load_heads(module, heads, {name: scale * update for name, update in added.items()}, path)
    return module.eval()


def at_one_scale(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors with every B multiplied so that all updates have the scale of the adapter's own rank.

    PEFT divides by the rank of each layer, which `rank_pattern` may set.
    """
    power = 0.5 if config.get("use_rslora") else 1
    ranks = {key: t.shape[-1] for key, t in tensors.items() if (found := LORA.fullmatch(key)) and found[2] == "B"}
    return {
        key: tensor * (config["r"] / ranks[key]) ** power if ranks.get(key, config["r"]) != config["r"] else tensor
        for key, tensor in tensors.items()
    }


def sort_tensors(
    tensors: Mapping[str, Tensor], base: EomtFile, file: Path
) -> tuple[dict[str, list[Update]], dict[str, Tensor], dict[str, Tensor]]:
    """The updates by timm's layers, the heads that were trained, and what is added to others, by the published names.

    Raises:
        ValueError: a tensor belongs to none of them.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    heads, added = {}, {}
    for key, tensor in tensors.items():
        name = bare(key.removeprefix("base_model.model."))
        if found := LORA.fullmatch(name):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif inside_backbone(name):
            raise ValueError(f"{file} holds {key}, a weight of the backbone itself, which an adapter leaves as it is")
        else:
            heads[head_name(name, TRANSFORMERS)] = tensor
    backbone, updates = base.backbone, {}
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"} or any(tensor.ndim != 2 for tensor in pair.values()):
            raise ValueError(f"{file} has of {layer} no lora_A and lora_B of a linear layer, which alone are mapped")
        if not (inside := inside_backbone(layer)):
            added[head_name(f"{layer}.weight", TRANSFORMERS)] = pair["B"] @ pair["A"]  # heads are kept whole here
            continue
        named = renamed(f"{layer[inside.end() :]}.weight", backbone.rotary)
        ((target, place, count, _),) = places(named, backbone.rotary, backbone.gated)
        updates.setdefault(target.removesuffix(".weight"), []).append(Update(pair["A"], pair["B"], place, count))
    if not updates:
        raise ValueError(f"{file} holds no update of the backbone")
    return updates, heads, added


def inside_backbone(name: str) -> re.Match[str] | None:
    """Where the name of a tensor or layer of the backbone begins in it, after transformers' or the published prefix."""
    return BACKBONES[TRANSFORMERS].match(name) or re.match(re.escape(BACKBONE), name)


@torch.no_grad()
def load_updates(module: MaskClassificationSemantic, updates: Mapping[str, list[Update]], path: Path) -> None:
    """Puts the updates beside each other into timm's layers: A [R, C], B [C', R] with a block for each part."""
    for name, layer in adapted_layers(module.backbone).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found = {"A": torch.cat([update.a for update in updates[name]]), "B": torch.zeros_like(b)}
        first = 0
        for update in updates[name]:
            rows, rank = len(b) // update.count, update.a.shape[0]
            if update.b.shape != (rows, rank):
                raise ValueError(f"{path}: the update of {name} is {list(update.b.shape)}, here [{rows}, {rank}]")
            found["B"][update.place * rows : (update.place + 1) * rows, first : first + rank] = update.b
            first += rank
        if misfit := first_misfit(found, {"A": a, "B": b}):
            raise ValueError(f"{path}: the update of {name} {misfit}")
        a.copy_(found["A"])
        b.copy_(found["B"])


@torch.no_grad()
def load_heads(
    module: MaskClassificationSemantic, heads: Mapping[str, Tensor], added: Mapping[str, Tensor], path: Path
) -> None:
    """Loads the heads that were trained beside the adapter, and adds to others; ValueError where one does not fit."""
    own = module.network.state_dict()
    misfit = first_misfit(heads, own) or first_misfit(added, own)
    if unknown := sorted((heads.keys() | added.keys()) - own.keys()):
        misfit = f"holds {listed(unknown)}, which this network has not"
    if misfit:
        raise ValueError(f"{path / WEIGHTS_FILE} {misfit}")
    changed = {name: own[name] + update for name, update in added.items()}
    module.network.load_state_dict({**changed, **heads}, strict=False)
