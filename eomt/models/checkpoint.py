"""Reading published and own EoMT weights, with nothing skipped silently."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from eomt.files import parse_json, read_tensors
from eomt.fingerprints import first_misfit, is_adapter
from eomt.models.backbone_weights import combine
from eomt.models.other_eomts import map_eomt
from eomt.models.resampling import fit_pos_embed, record_resampling
from eomt.settings.backbone_choice import refuse_backbone
from eomt.settings.backbone_files import USUAL, flat, parts_of, places_in, read_state
from eomt.settings.eomt_files import HEADS_ALONE, describe_file, name_published, weights_in
from eomt.settings.eomt_names import PUBLISHED, bare, program_of, sizes_of
from eomt.settings.hub import hub_place, local_path, pinned

if TYPE_CHECKING:  # reading alone needs no timm
    from eomt.models.eomt import EoMT

CLASS_HEAD = "class_head."
OPTIONAL_KEYS = ("encoder.pixel_mean", "encoder.pixel_std")  # else the backbone's own
PIXEL_STD = "encoder.pixel_std"
BACKBONE = "encoder.backbone."
POS_EMBED = f"{BACKBONE}pos_embed"
NORM_WEIGHT = re.compile(r"^encoder\.backbone\..*norm\d?\.weight$")
# State of the published training module that is no weight of the network.
NOT_WEIGHTS = ("criterion.", "metrics.", "encoder.backbone.rope_embeddings.", "encoder.backbone.patch_embed.mask_token")
DINOV3 = re.compile(r"^encoder\.backbone\.blocks\.\d+\.attention\.[qkv]_proj\.")


@dataclass
class LoadReport:
    """The fate of every tensor: `str(report)` is a short table for the log."""

    path: str
    content: str = ""  # in words, of another program's file
    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    grid: tuple[int, int] | None = None  # of position embeddings that were resampled
    num_heads: int | None = None  # of the attention, as the file says

    def __str__(self) -> str:
        lines = [f"CHECKPOINT {self.path}{f': {self.content}' if self.content else ''}"]
        for name in ("loaded", "resampled", "skipped", "reinitialised"):
            keys = getattr(self, name)
            shown = (
                "" if name == "loaded" or not keys else "  " + ", ".join(keys[:4]) + (" ..." if len(keys) > 4 else "")
            )
            lines.append(f"  {name:<14}{len(keys):>5} tensors{shown}")
        if self.grid:
            lines.append(f"  position embeddings were of {self.grid[0]}x{self.grid[1]} patches")
        if self.num_heads is None:
            lines.append("  attention heads: the file does not say how many, and no shape tells; backbone_name decides")
        return "\n".join(lines)


class Stored(NamedTuple):
    """What a checkpoint file holds: tensors under the published names less `network.`, and what it says of itself."""

    tensors: dict[str, Tensor]
    img_size: tuple[int, int] | None
    num_heads: int | None
    content: str = ""  # in words, of another program's file
    left_out: tuple[str, ...] = ()  # names in the file of tensors that make none of the network's
    norm_eps: float | None = None  # of the backbone, where another program says it


def read_checkpoint(path: str | Path) -> Stored:
    """Reads a checkpoint file.

    Accepts `.safetensors`, a `pytorch_model.bin`, a Lightning `.ckpt` (published or ours), or a folder written by
    `save_pretrained`. Pickled code is never run (`weights_only`).

    Raises:
        FileNotFoundError: no such file. ValueError: not a checkpoint, or one that holds more than tensors.
    """
    path = weight_files(path)[0]
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path {path}: no such file")
    try:
        content = read_content(path)
    except FileNotFoundError:  # a part of a folder
        raise
    except Exception as error:
        raise ValueError(
            f"ckpt_path {path} cannot be read as tensors ({type(error).__name__}); the file may be half-downloaded, or "
            "hold pickled objects, which are never loaded: save its state_dict alone with torch.save"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"ckpt_path {path} holds a {type(content).__name__}, not a state dict: nothing would be loaded"
        )
    img_size, num_heads = stored_sizes(content, path)
    content = content.get("state_dict", content)
    if not isinstance(content, Mapping):
        raise ValueError(f"ckpt_path {path} holds a {type(content).__name__} as state_dict: nothing would be loaded")
    shapes = {key: list(value.shape) for key, value in flat(content) if isinstance(value, Tensor)}
    refuse_backbone(path, shapes)
    tensors = {bare(str(key)): value for key, value in content.items() if isinstance(value, Tensor)}
    if any(map(is_adapter, tensors)):
        raise ValueError(
            f"ckpt_path {path} holds an adapter, which holds no backbone: if it is the checkpoint of a LoRA run, "
            "continue that with resume=, else open the adapter/ folder with MaskClassificationSemantic.from_pretrained"
        )
    if shapes and program_of(shapes) != PUBLISHED:
        return read_other(path, content)
    if not tensors:
        raise ValueError(f"ckpt_path {path} holds no tensors: nothing would be loaded")
    return Stored(map_dinov3(tensors, path), img_size, num_heads)


def read_content(path: Path) -> Any:
    """What a file of weights holds; the index of a folder in parts means all of them."""
    if path.suffix == ".json":
        return {key: tensor for part in parts_of(path) for key, tensor in read_state(part).items()}
    return read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


def read_other(path: Path, content: Mapping[str, Any]) -> Stored:
    """`read_checkpoint` of another program's EoMT; ValueError where it is none."""
    stored = {key: value for key, value in flat(weights_in(content)) if isinstance(value, Tensor)}
    shapes = {key: list(value.shape) for key, value in stored.items()}
    try:
        file = describe_file(path, [path], shapes, content)
    except ValueError as error:
        raise ValueError(f"ckpt_path {error}") from error
    tensors, left_out = map_eomt(stored, file)
    said = file.said
    return Stored(tensors, said.img_size, said.num_heads, str(file), tuple(left_out), said.norm_eps)


def stored_sizes(content: Mapping[str, Any], path: Path) -> tuple[tuple[int, int] | None, int | None]:
    """Image size and attention heads that a checkpoint says it is of; ValueError where it says something else."""
    settings = content.get("hyper_parameters") or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"ckpt_path {path} holds a {type(settings).__name__} as hyper_parameters: settings are meant")
    size, heads = settings.get("img_size"), content.get("num_heads")
    numbers = [*(size if isinstance(size, (list, tuple)) else []), *([] if heads is None else [heads])]
    if not (size is None or (isinstance(size, (list, tuple)) and len(size) == 2)) or not all(
        isinstance(number, int) and number > 0 for number in numbers
    ):
        raise ValueError(f"ckpt_path {path} says img_size {size!r}, num_heads {heads!r}: [height, width], a number")
    return tuple(size) if size else None, heads


def weight_files(path: str | Path) -> list[Path]:
    """The file itself, or those of a folder that hold weights, the preferred one first; an adapter is a ValueError."""
    path = local_path(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"ckpt_path {path} is an adapter, not a network: open it with MaskClassificationSemantic.from_pretrained, "
            "or give the checkpoint it was trained from"
        )
    if not path.is_dir():
        return [path]
    return places_in(path) or [path / USUAL[0]]


def read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors, and what `save_pretrained` left in the metadata, laid out like a Lightning checkpoint.

    Raises:
        ValueError: the file cannot be read. FileNotFoundError: there is none.
    """
    tensors, metadata = read_tensors(path)
    try:
        said = {name: parse_json(metadata.get(name, "null")) for name in ("img_size", "num_heads")}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: its metadata are no JSON ({error})") from error
    settings = {"img_size": said["img_size"]}
    return {"state_dict": tensors, "hyper_parameters": settings, "num_heads": said["num_heads"]}


def map_dinov3(state: dict[str, Tensor], path: str | Path = "the checkpoint") -> dict[str, Tensor]:
    """Names of the published DINOv3 EoMT (transformers' backbone) -> timm's `*_dinov3_qkvb`; others pass unchanged.

    q, k and v become one fused layer; the keys have no bias there, as in timm.
    """
    if not any(map(DINOV3.match, state)):
        return state
    try:
        names = name_published(state)
        return combine(names.made_of, state) | {key: state[key] for key in names.left_out}
    except ValueError as error:
        raise ValueError(f"ckpt_path {path}: {error}") from None


def describe_head(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tells the class head that the tensors belong to, and the scale of its cosines."""
    if "class_head.scale" in state:
        scale = state["class_head.scale"]
        return {"head": "arcface"} | ({"arcface_scale": round(scale.item(), 6)} if scale.numel() == 1 else {})
    return {"head": "linear"} if "class_head.bias" in state else {}


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the sizes of the network that the tensors belong to, as far as they tell."""
    return sizes_of({key: list(tensor.shape) for key, tensor in state.items()}) | describe_head(state)


def holds_differences(state: Mapping[str, Tensor]) -> bool | None:
    """Whether backbone tensors are differences to pretrained ones; None where neither sign of it is there.

    Differences of the fixed pixel statistics are 0, and norms' weights (near 1 or above) move little in training.

    Raises:
        ValueError: the two signs disagree.
    """
    norms = [t.float().abs().mean().item() for key, t in state.items() if NORM_WEIGHT.search(key)]
    size = sum(norms) / len(norms) if norms else math.nan
    by_norms = True if size < 0.1 else False if size > 0.3 else None
    by_pixels = bool((state[PIXEL_STD] == 0).all()) if PIXEL_STD in state else None
    if None not in (by_norms, by_pixels) and by_norms != by_pixels:
        raise ValueError(
            f"norm weights of the backbone are {size:.3f} on average and pixel_std is "
            f"{'' if by_pixels else 'not '}0: differences to pretrained weights have both near 0, weights neither"
        )
    return by_norms if by_pixels is None else by_pixels


def resolve_differences(state: Mapping[str, Tensor], delta_weights: bool | None, path: str | Path) -> bool:
    """`delta_weights`, or what the tensors say where it is None.

    Raises:
        ValueError: the setting contradicts the tensors.
    """
    try:
        found = holds_differences(state)
    except ValueError as error:
        raise ValueError(f"ckpt_path {path}: {error}") from None
    if None not in (found, delta_weights) and found != delta_weights:
        content = "differences to a pretrained backbone" if found else "whole weights"
        raise ValueError(
            f"ckpt_path {path} holds {content}, as norm weights and pixel_std tell, but delta_weights is "
            f"{str(delta_weights).lower()}: set delta_weights={str(found).lower()} or leave it out"
        )
    return bool(found if delta_weights is None else delta_weights)


def needs_pretrained(path: str | Path, delta_weights: bool | None) -> bool:
    """Whether the checkpoint, or one of the two in a folder, holds differences to a pretrained backbone."""
    if delta_weights is not None:
        return delta_weights
    return any(resolve_differences(read_checkpoint(file).tensors, None, file) for file in weight_files(path))


def load_checkpoint(
    network: EoMT, path: str | Path, load_class_head: bool = True, delta_weights: bool | None = None
) -> LoadReport:
    """Loads a checkpoint into the network; every weight is loaded, or the reason is in the report, or it is an error.

    Args:
        network: a plain network: adapters come after the weights.
        path: see `read_checkpoint`; of a folder with two files of weights, the first that fits is taken.
        load_class_head: False keeps the fresh class head, the only way to change its kind or the number of classes.
        delta_weights: the file holds differences to the pretrained backbone, as the published DINOv3 checkpoints do;
            the network must hold that backbone (`pretrained: true`). None: as the file says.

    Raises:
        ValueError: configuration and checkpoint disagree, a weight is missing, or nothing would be loaded.
    """
    reasons = []
    for file in weight_files(path):
        try:
            report = load_one(network, file, load_class_head, delta_weights)
            return replace(report, path=str(pinned(path))) if hub_place(path) else report
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; and ".join(reasons))


def load_one(network: EoMT, path: Path, load_class_head: bool, delta_weights: bool | None) -> LoadReport:
    """`load_checkpoint` of one file; the network changes only if the whole file fits."""
    stored = read_checkpoint(path)
    state, own = stored.tensors, network.state_dict()
    fresh = [] if load_class_head else [key for key in own if key.startswith(CLASS_HEAD)]
    report = LoadReport(str(path), stored.content, reinitialised=fresh, num_heads=stored.num_heads)
    said = {"num_heads": stored.num_heads, "norm_eps": stored.norm_eps}
    found = describe(state) | {name: value for name, value in said.items() if value is not None}
    check_agreement(network, found, f"{path} holds {stored.content} and" if stored.content else path, load_class_head)
    differences = resolve_differences(state, delta_weights, path)
    if differences:
        state = {key: tensor for key, tensor in state.items() if key not in OPTIONAL_KEYS}  # zeros there

    report.skipped = [key for key in state if key not in own]
    check_complete(own, state, report)  # before shapes, which say little about another backbone
    report.skipped += stored.left_out
    if differences:
        check_base(own, path)
    weights = {}
    for key, tensor in state.items():
        if key not in own or key in report.reinitialised:
            continue
        if key == POS_EMBED:
            encoder = network.encoder
            prefix = own[key].shape[1] - math.prod(encoder.grid_size)
            if tensor.ndim != 3 or tensor.shape[1] <= prefix:
                raise ValueError(f"ckpt_path {path}: {key} is {list(tensor.shape)}, this network's {[*own[key].shape]}")
            tensor, report.grid = fit_pos_embed(tensor, prefix, encoder.grid_size, encoder.patch_size, stored.img_size)
            report.resampled += [key] if report.grid else []
        weights[key] = tensor
    if misfit := first_misfit(weights, own):
        raise ValueError(f"ckpt_path {path} {misfit}")
    backbone = {key.removeprefix(BACKBONE): state[key] for key in weights if key.startswith(BACKBONE)}
    if backbone:
        names = [key.removeprefix(BACKBONE) for key in report.resampled]
        record_resampling(network.encoder.backbone, backbone, names, differences)
    if differences:
        weights = {k: v + own[k] if k.startswith(BACKBONE) else v for k, v in weights.items()}
        weights["attn_mask_probs"] = weights["attn_mask_probs"].clamp(0, 1)  # the published code adds it to ones
    network.load_state_dict(weights, strict=False)
    report.loaded = sorted(weights)
    return report


def attention_heads(network: EoMT) -> int | None:
    """How many heads the attention of the encoder has, which no shape of its weights tells; None if it does not say."""
    return getattr(getattr(network.encoder.blocks[0], "attn", None), "num_heads", None)


def check_base(own: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises ValueError where the network's backbone is untrained: all of its norm weights are 1."""
    if all((tensor == 1).all() for key, tensor in own.items() if NORM_WEIGHT.search(key)):
        raise ValueError(
            f"ckpt_path {path} holds differences to a pretrained backbone, but this backbone is random: "
            "set pretrained=true, or give the backbone with backbone_weights"
        )


def check_agreement(network: EoMT, found: Mapping[str, Any], what: str | Path, load_class_head: bool) -> None:
    """Raises ValueError naming both values where the checkpoint was made for another network.

    Args:
        what: the checkpoint's path, and in words what it holds.
    """
    configured = {
        "num_blocks": network.num_blocks,
        "num_q": network.num_q,
        "patch_size": network.encoder.patch_size,
        "embed_dim": network.encoder.embed_dim,
        "depth": len(network.encoder.blocks),
        "num_heads": attention_heads(network),
        "norm_eps": getattr(network.encoder.norm, "eps", None),
    }
    if load_class_head:
        # classes before queries: a network for other classes may start one with any number of queries
        configured = describe_head(network.state_dict()) | {"num_classes": network.num_classes} | configured
    for name, value in configured.items():
        if name not in found or found[name] == value or value is None:
            continue
        remedy = f"set {name}={found[name]}"
        if load_class_head and name in ("num_classes", "num_q"):
            remedy += ", or load_ckpt_class_head=false starts from it, with its queries and a fresh class head"
        elif name in ("head", "arcface_scale"):
            remedy += ", or load_ckpt_class_head=false to train a fresh class head"
        elif name == "norm_eps":
            remedy = f"set backbone_kwargs={{norm_eps: {found[name]}}}"
        elif name in ("embed_dim", "depth", "num_heads"):
            remedy = "choose the backbone_name (and backbone_kwargs) that the checkpoint was trained with"
        raise ValueError(f"ckpt_path {what} has {name} {found[name]}, the configuration says {value}: {remedy}")


def check_complete(own: Mapping[str, Tensor], state: Mapping[str, Tensor], report: LoadReport) -> None:
    """Raises ValueError when a weight of the network is not in the checkpoint, or the reverse."""
    known = (*NOT_WEIGHTS, CLASS_HEAD) if report.reinitialised else NOT_WEIGHTS
    unknown = [key for key in report.skipped if not key.startswith(known)]
    missing = sorted(own.keys() - state.keys() - set(report.reinitialised) - set(OPTIONAL_KEYS))
    backbone = {key for key in own if key.startswith(BACKBONE)}
    if backbone and backbone <= set(missing) and not unknown:
        raise ValueError(f"ckpt_path {report.path} {HEADS_ALONE}")
    if missing or unknown:
        holds = f" holds {report.content} and" if report.content else ""
        raise ValueError(
            f"ckpt_path {report.path}{holds} does not fit this network: {len(missing)} of its {len(own)} weights are "
            f"missing there ({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown here "
            f"({', '.join(unknown[:3]) or 'none'}); check backbone_name and backbone_kwargs"
        )
