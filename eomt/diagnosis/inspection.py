"""Reads what is in a saved network from its files, without building it, and checks an adapter against a base."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eomt.fingerprints import Identity, hash_tensors, identify, identify_tensors, is_adapter
from eomt.inference.artefacts import read_lightning
from eomt.inference.bases import recorded_base
from eomt.inference.saved import (
    BASE_FILE,
    CONFIG_FILE,
    HEADS_FILE,
    WEIGHTS_FILE,
    check_settings,
    find_weights,
    read_config,
)
from eomt.lora.files import WEIGHTS_FILE as LORA_WEIGHTS
from eomt.lora.saved_config import CONFIG_FILE as LORA_CONFIG
from eomt.lora.saved_config import read_adapter_config
from eomt.lora.updates import stored_updates
from eomt.models.backbone_weights import combine
from eomt.models.checkpoint import (
    BACKBONE,
    NOT_WEIGHTS,
    POS_EMBED,
    describe,
    map_dinov3,
    needs_pretrained,
    read_checkpoint,
    read_safetensors,
)
from eomt.models.resampling import find_grid, fit_pos_embed
from eomt.settings.backbone_choice import plain_backbone, plain_backbone_of
from eomt.settings.backbone_files import flat
from eomt.settings.backbone_names import name_tensors
from eomt.settings.backbones import NO_EOMT, Backbone
from eomt.settings.eomt_files import weights_in
from eomt.settings.eomt_names import LIGHTLY, TRANSFORMERS, bare, program_of
from eomt.settings.hub import hub_place
from eomt.settings.model import completed

BASE_RECORD = ("base_fingerprint", "base_weights")
HEADS = {"q.": "queries", "class_head.": "class head", "mask_head.": "mask head", "upscale.": "upscale"}


def inspect_model(path: str | Path, base: str | Path | None = None) -> dict[str, Any]:
    """Everything that the files say, as plain values.

    Args:
        path: an adapter/ or model/ folder, a run's folder, a Lightning checkpoint, or a file of weights.
        base: base weights to check an adapter against; None: those that it names, if they are there.

    Returns:
        `path`, `kind`, `network` (backbone, sizes, classes), `parts` (tensors, parameters and bytes of each), `files`
        (bytes), `precision`. For a whole network also `backbone_fingerprint`; for an adapter `base_fingerprint` (of the
        base it was trained on), `lora`, `updates` (rank, scaling and norm by layer, `relative` to the base weight if
        that is there), `base` (what it names) and `fit` (see `check_fit`; None without a base).

    Raises:
        FileNotFoundError: nothing there. ValueError: no network, or a base given for a whole network.
    """
    path = find_weights(path)
    content, files = read(path)
    init, state = content.get("hyper_parameters") or {}, content["state_dict"]
    adapted = any(is_adapter(key) for key in state)
    facts = {
        "path": str(path),
        "kind": content.get("kind") or kind(path, adapted, bool(init)),
        "network": describe_network(init, state),
        "parts": count_parts(state),
        "files": {file.name: file.stat().st_size for file in files},
        "precision": content.get("precision"),
    }
    if not adapted:
        if base:
            raise ValueError(f"a base is for adapters, and {path} is a {facts['kind']}: leave --base out")
        return facts | {
            "backbone_fingerprint": identify_backbone(state).exact if "backbone" in facts["parts"] else None
        }
    facts["base_fingerprint"] = content.get("base_fingerprint")
    lora = content["lora"]
    try:
        updates = stored_by_layer(lora, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    facts["updates"] = {name: updates[name] | {"relative": None} for name in sorted(updates, key=by_number)}
    facts["lora"] = lora
    facts["base"] = name_base(path, init)
    base = base or (facts["base"] if Path(str(facts["base"])).exists() else None)
    facts["fit"] = check_fit(facts, recorded_base(content), base, init) if base else None
    return facts


def by_number(name: str) -> list:
    """Sorts block 10 behind block 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def read(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """A checkpoint's content, whatever it is stored as, with cleaned keys; and the files that it takes.

    Tensors are mapped from the file, so that their names and shapes cost nothing.
    """
    if path.is_file():
        content = read_weights(path)
        init, state = content.get("hyper_parameters") or {}, content.get("state_dict", content)
        if not (isinstance(init, Mapping) and isinstance(state, Mapping)):
            raise ValueError(f"{path} holds no weights and settings by name: it is no checkpoint")
        init = own_settings(init, path)
        stored = {key: value for key, value in flat(weights_in(content)) if isinstance(value, Tensor)}
        if backbone := plain_backbone_of({key: list(tensor.shape) for key, tensor in stored.items()}):
            return {**describe_plain(backbone, stored), "lora": None}, [path]
        if program_of(stored) in (TRANSFORMERS, LIGHTLY):
            stored = read_checkpoint(path)
            said = {"hyper_parameters": {}, "state_dict": stored.tensors, "kind": stored.content}
            return {**said, "lora": None}, [path]
        state = {bare(str(key)): tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
        if not state:
            raise ValueError(f"{path} holds no tensors")
        found = {name: content[name] for name in BASE_RECORD if name in content}
        lora = None
        if init.get("use_lora") and init.get("lora_method", "lora") != "lora":
            lora = other_method(init["lora_method"], init)
        elif init.get("use_lora"):
            names = ("rank", "alpha", "dropout", "target_modules", "blocks", "options")
            lora = {name: init[f"lora_{name}"] for name in names}
            lora["options"] = dict(lora["options"] or {})
        if lora is None and any(is_adapter(key) for key in state):
            raise ValueError(f"{path} is a part of an adapter, without its settings: give the folder it belongs to")
        return {**found, "hyper_parameters": init, "state_dict": map_dinov3(state), "lora": lora}, [path]

    config = read_config(path)
    check_settings(config, path / CONFIG_FILE)
    config["init"] = completed(config["init"])
    content = {"hyper_parameters": config["init"], "precision": config.get("precision")}
    files = sorted(file for file in path.iterdir() if file.is_file())
    if not config["init"]["use_lora"]:
        state = read_weights(path / WEIGHTS_FILE)["state_dict"]
    else:
        state = {**read_weights(path / HEADS_FILE)["state_dict"], **read_weights(path / LORA_WEIGHTS)["state_dict"]}
        content |= {
            **{name: config.get(name) for name in BASE_RECORD},
            "lora": read_lora(path / LORA_CONFIG, config["init"]),
        }
    if not state:
        raise ValueError(f"{path} holds no tensors: it is no saved network")
    return content | {"state_dict": {bare(key): tensor for key, tensor in state.items()}}, files


def describe_plain(backbone: Backbone, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """The content of a file with a plain backbone: its kind, and its tensors under the network's names."""
    names = name_tensors(stored)
    tensors = {BACKBONE + name: tensor for name, tensor in combine(names.made_of, stored).items()}
    kind = f"{backbone}: {NO_EOMT}; give it as model.backbone_weights"
    said = {"backbone_name": backbone.timm_name} if backbone.timm_name else {}
    state = tensors | {key: stored[key] for key in names.left_out}
    return {"hyper_parameters": said, "state_dict": state, "kind": kind, "plain": True}


def own_settings(init: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings in a checkpoint, completed; none where they are another program's, or the image size alone."""
    if not {"backbone_name", "img_size", "num_classes"} <= init.keys():
        return {}
    check_settings({"init": init}, path)
    return completed(init)


def read_weights(path: Path) -> dict[str, Any]:
    """One file; ValueError if it cannot be read, FileNotFoundError if it is not there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder is incomplete")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_lightning(path)


def read_lora(path: Path, init: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings of an adapter, in the words of `LoRASettings`."""
    config = read_adapter_config(path.parent)
    if config["peft_type"] != "LORA":
        return other_method(config["peft_type"].lower(), init)
    names = ("use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "lora_bias")
    usual = {"init_lora_weights": True}
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout"),
        "target_modules": init["lora_target_modules"],
        "blocks": init["lora_blocks"],
        "options": {name: config[name] for name in names if config.get(name) not in (usual.get(name), False, None, {})},
    }


def other_method(name: str, init: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter that is no LoRA."""
    return {"method": name, "target_modules": init["lora_target_modules"], "blocks": init["lora_blocks"]}


def stored_by_layer(lora: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """See `stored_updates`; nothing for an adapter that is no LoRA."""
    if "method" in lora:
        return {}
    return stored_updates(
        {key.removeprefix(BACKBONE): tensor for key, tensor in state.items() if is_adapter(key)},
        lora["alpha"],
        lora["options"].get("use_rslora", False),
        lora["options"].get("alpha_pattern"),
    )


def kind(path: Path, adapted: bool, configured: bool) -> str:
    """Names the kind of files in two or three words."""
    if path.is_dir():
        return "LoRA adapter" if adapted else "full model"
    if not configured:
        return "bare weights"
    return "Lightning checkpoint of a LoRA run" if adapted else "Lightning checkpoint of a full network"


def describe_network(init: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Backbone, sizes and classes: as configured, and where nothing is, as the tensors tell."""
    names = ("backbone_name", "backbone_kwargs", "img_size", "patch_size", "num_q", "num_blocks", "num_classes")
    configured = {name: init[name] for name in (*names, "class_names") if init.get(name) is not None}
    return describe({key: t for key, t in state.items() if not is_adapter(key)}) | configured


def name_in_folder(key: str) -> str:
    """Gives a state-dict key the name that it has in a run's folder: PEFT's files leave the adapter's own name out."""
    key = bare(key).removeprefix("base_model.model.")
    if not is_adapter(key):
        return key
    return key.removeprefix(BACKBONE).replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def part_of(key: str) -> str:
    """Names the part of the network that a cleaned key belongs to."""
    if is_adapter(key):
        return "adapters"
    if key.startswith(BACKBONE):
        return "backbone"
    return next((part for start, part in HEADS.items() if key.startswith(start)), "buffers and others")


def count_parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Number of tensors, of values in them and their bytes, by part."""
    parts: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "parameters": 0, "bytes": 0})
    for key, tensor in state.items():
        counts = parts[part_of(key)]
        counts["tensors"] += 1
        counts["parameters"] += tensor.numel()
        counts["bytes"] += tensor.nbytes
    order = ("backbone", "adapters", *HEADS.values(), "buffers and others")
    return {part: parts[part] for part in order if part in parts}


def name_base(path: Path, init: Mapping[str, Any]) -> str:
    """Names the place of an adapter's base weights, in its folder or elsewhere."""
    if path.is_dir() and (path / BASE_FILE).is_file():
        return str(path / BASE_FILE)
    if place := init.get("ckpt_path") or init.get("backbone_weights"):
        return str(hub_place(place) or Path(place).expanduser())  # nothing is fetched to be named
    if init.get("pretrained"):
        return f"timm's pretrained weights of {init['backbone_name']}"
    return "not named"


def identify_backbone(state: Mapping[str, Tensor], resampled: Mapping[str, str] | None = None) -> Identity:
    """Identifies the backbone in a cleaned state dict, in float32 as it is built; see `identify_tensors`."""
    tensors = {
        key.removeprefix(BACKBONE): tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
        if key.startswith(BACKBONE) and not key.startswith(NOT_WEIGHTS)
    }
    return identify_tensors(tensors, {key.removeprefix(BACKBONE): digest for key, digest in (resampled or {}).items()})


def check_fit(facts: dict[str, Any], trained_on: Identity, base: str | Path, init: Mapping[str, Any]) -> dict[str, Any]:
    """Whether an adapter's updates were trained on the backbone in `base`; adds each update's relative norm.

    Returns:
        `base`, `fits` (None if it cannot be told) and `why`, a sentence.
    """
    verdict = {"base": str(base)}
    if plain_backbone(base):
        return verdict | fit_of_backbone(facts, trained_on, base, init)
    state, base_size, *_ = read_checkpoint(find_weights(base))
    if not any(key.startswith(BACKBONE) for key in state):
        raise ValueError(f"{base} holds no backbone (no key begins with {BACKBONE}): give an EoMT checkpoint")
    if other := other_shape(facts, state):
        return verdict | {"fits": False, "why": other}
    if trained_on.exact is None:
        return verdict | {"fits": None, "why": "the adapter names no fingerprint to compare with"}
    if needs_pretrained(find_weights(base), init.get("delta_weights")):
        return verdict | {
            "fits": None,
            "why": "the base is a difference to timm's pretrained weights, which are not here",
        }
    size = facts["network"].get("img_size")
    shape, _ = trained_on.computed.get("pos_embed", ((None, None), ()))
    resampled = resample(state, base_size, size, facts["network"]["patch_size"], shape[1]) if size else {}
    found = identify_backbone(state, resampled)
    grids = f"; position embeddings resampled to {size[0]}x{size[1]}" if resampled else ""
    if difference := trained_on.difference(found):
        return verdict | {"fits": False, "why": difference + grids}
    add_relative(facts["updates"], state)
    return verdict | {"fits": True, "why": f"fingerprint {found.exact[:12]}{grids}"}


def add_relative(updates: Mapping[str, dict[str, float | None]], state: Mapping[str, Tensor]) -> None:
    """Says how large each update is beside its base weight."""
    for name, update in updates.items():
        update["relative"] = update["norm"] / state[f"{BACKBONE}{name}.weight"].double().norm().item()


def fit_of_backbone(
    facts: Mapping[str, Any], trained_on: Identity, base: str | Path, init: Mapping[str, Any]
) -> dict[str, Any]:
    """`fits` and `why` of `check_fit` for a plain backbone in a file."""
    try:
        encoder = encoder_from(base, init)
    except ValueError as error:
        return {"fits": False, "why": str(error)}
    found = identify(encoder.backbone)
    if trained_on.exact is None:
        return {"fits": None, "why": "the adapter names no fingerprint to compare with"}
    if difference := trained_on.difference(found):
        return {"fits": False, "why": difference}
    add_relative(facts["updates"], {BACKBONE + name: tensor for name, tensor in encoder.backbone.state_dict().items()})
    return {"fits": True, "why": f"fingerprint {found.exact[:12]}"}


def read_start_backbone(weights: str | Path, init: Mapping[str, Any]) -> tuple[dict[str, Tensor], Identity]:
    """The tensors of an encoder from a file, under the network's names, and their identity."""
    encoder = encoder_from(weights, init)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    resampled = {BACKBONE + name: digest for name, digest in encoder.backbone.resampled.items()}
    return state, identify_tensors(state, resampled)


def encoder_from(weights: str | Path, init: Mapping[str, Any]) -> nn.Module:
    """The encoder of these settings with a plain backbone from a file; raises ValueError where that does not fit."""
    from eomt.models.vit import ViT  # nothing else here needs timm

    kwargs = {"pretrained": False, "backbone_kwargs": init.get("backbone_kwargs"), "weights": weights}
    return ViT(init["img_size"], init["patch_size"], init["backbone_name"], **kwargs)


def other_shape(facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> str | None:
    """Says how the backbone differs in shape from the adapter's; None if it does not."""
    there, here = describe(state), facts["network"]
    for name in ("embed_dim", "patch_size", "depth"):
        if name in there and name in here and there[name] != here[name]:
            return f"another backbone: {name} {there[name]}, the adapter's has {here[name]}"
    missing = [name for name in facts["updates"] if f"{BACKBONE}{name}.weight" not in state]
    return f"another backbone: it has no {missing[0]}, which the adapter adapts" if missing else None


def resample(
    state: dict[str, Tensor],
    old_size: tuple[int, int] | None,
    size: Sequence[int],
    patch_size: int,
    tokens: int | None = None,
) -> dict[str, str]:
    """Brings position embeddings to an image size, as loading does.

    Args:
        state: cleaned keys; changed in place.
        old_size, size: (height, width) in pixels, of the file as far as it says so, and of the network.
        tokens: how many embeddings the network has at `size`, those before the patches included, if that is known.

    Returns:
        SHA-256 of what was resampled, by key.
    """
    stored = state.get(POS_EMBED)
    if stored is None:
        return {}
    grid = tuple(length // patch_size for length in size)
    registers = sum(state[key].shape[1] for name in ("cls_token", "reg_token") if (key := BACKBONE + name) in state)
    choices = sorted({0, 1, registers}) if tokens is None else [tokens - math.prod(grid)]
    patches = math.prod(length // patch_size for length in old_size or size)
    prefix = _prefix(stored[0], choices, patches)
    state[POS_EMBED], old_grid = fit_pos_embed(stored, prefix, grid, patch_size, old_size)
    return hash_tensors({POS_EMBED: stored}) if old_grid else {}


def _prefix(embeddings: Tensor, choices: Sequence[int], patches: int) -> int:
    """Finds how many tokens stand before the patches: what leaves as many as expected, a square, or a clear grid."""
    tokens = len(embeddings)
    fitting = [prefix for prefix in choices if tokens - prefix == patches]
    fitting += [prefix for prefix in choices if math.isqrt(tokens - prefix) ** 2 == tokens - prefix]
    fitting += [prefix for prefix in choices if find_grid(embeddings[prefix:])]
    return (fitting or choices)[0]
