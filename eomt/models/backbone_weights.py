"""Loading a plain backbone from a file into a timm model: every tensor is loaded, or the report names it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eomt.fingerprints import first_misfit, unusual_numbers
from eomt.models.resampling import find_grid, resize, square_grid
from eomt.settings.backbone_choice import BackboneFile, read_backbone_file
from eomt.settings.backbone_files import read_state
from eomt.settings.backbone_names import Part, name_tensors, named_as_in
from eomt.settings.backbones import recognise
from eomt.settings.pixel_statistics import Pixels

PATCH_WEIGHT = "patch_embed.proj.weight"
LEAST_EPS, LARGEST_EPS = 1e-12, 1e-5  # of norms, within which no output differs visibly
PIXELS = re.compile(r"encoder\.pixel_(mean|std)$")
BIASES = re.compile(r"\.attn\.[qkv]_bias$")


@dataclass
class BackboneReport:
    """The fate of every tensor of a file: `str(report)` is a short table for the log."""

    path: Path
    content: str
    timm_name: str
    num_heads: int
    heads_known: bool
    used: int = 0  # tensors of the file that were loaded
    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        source = "as the config.json beside it says" if self.heads_known else "as timm has it; the file does not say"
        lines = [
            f"BACKBONE {self.path}: {self.content}, loaded as timm's {self.timm_name}",
            f"  loaded        {len(self.loaded):>5} tensors, made of {self.used} in the file",
            f"  resampled     {len(self.resampled):>5} tensors",
            *(f"    {line}" for line in self.resampled),
            f"  left out      {len(self.left_out):>5} tensors",
            *(f"    {line}" for line in in_short(self.left_out)),
            *(f"  {line}" for line in self.notes),
            f"  attention heads: {self.num_heads}, {source}",
        ]
        if self.resampled:
            lines.append("  resampled as timm does it, antialiased; a program that does not has other features here")
        return "\n".join(lines)


def in_short(keys: Sequence[str]) -> list[str]:
    """Names, those that differ in numbers alone as one, with how many they are."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", key) for key in keys)
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]


def load_backbone(
    backbone: nn.Module, name: str, path: str | Path, img_size: tuple[int, int], patch_size: int
) -> BackboneReport:
    """Loads a file into a timm model at the file's sizes, and resamples it as timm does.

    The attribute `resampled` of the model says what was stored; see `create_resized`.

    Args:
        backbone: without a head. name: its name in timm.
        path: see `read_backbone_file`.
        img_size, patch_size: that the model is for, in pixels.

    Raises:
        ValueError: the file holds another backbone, lacks a weight, or has one that is unknown or not finite.
        FileNotFoundError: it is not there.
    """
    file = read_backbone_file(path)
    check_agreement(backbone, name, file)
    file = replace(file, names=named_as_in(file.names, backbone.state_dict()))
    stored = {key: tensor for part in file.files for key, tensor in read_state(part).items()}
    try:
        tensors = combine(file.names.made_of, stored)
    except ValueError as error:
        raise ValueError(f"backbone_weights {file.path}: {error}") from error
    check_pixels(backbone, name, replace(file, pixels=stored_pixels(stored, file)))
    report = BackboneReport(
        file.path, str(file.backbone), name, backbone.blocks[0].attn.num_heads, file.heads is not None
    )
    report.left_out = [*file.names.left_out, *drop_empty(tensors, file)]
    drop_zero_biases(tensors, stored, backbone, file, report)
    add_class_position(tensors, backbone, report)
    check_rotary(stored, backbone, file)

    grid = stored_grid(tensors, backbone, file, name)
    old_size = file.backbone.patch_size
    set_sizes(backbone, grid or tuple(length // patch_size for length in img_size), old_size)
    check_tensors(tensors, backbone.state_dict(), file, name)
    backbone.load_state_dict(tensors)
    report.loaded = sorted(tensors)
    report.used = len({part.key for name, parts in file.names.made_of.items() if name in tensors for part in parts})
    backbone.resampled = resize(backbone, img_size, patch_size)
    new_grid = tuple(length // patch_size for length in img_size)
    sizes = {"pos_embed": (grid, new_grid, "patches"), PATCH_WEIGHT: ((old_size,) * 2, (patch_size,) * 2, "pixels")}
    for key in backbone.resampled:
        (old, new, unit) = sizes[key]
        report.resampled.append(f"{key} from {old[0]}x{old[1]} to {new[0]}x{new[1]} {unit}")
    return report


def check_agreement(backbone: nn.Module, name: str, file: BackboneFile) -> None:
    """Raises ValueError where the model is another than the file is of."""
    import timm

    own = {key: list(tensor.shape) for key, tensor in backbone.state_dict().items()}
    asked = recognise(name_tensors(own), own)
    if not asked.is_like(file.backbone):
        raise ValueError(file.misfit(name, asked))
    heads = backbone.blocks[0].attn.num_heads
    if file.heads not in (None, heads):
        raise ValueError(
            f"backbone_weights {file.path} has {file.heads} attention heads, as the config.json beside it says, {name} "
            f"has {heads}: set backbone_kwargs={{num_heads: {file.heads}}}, or choose another backbone_name"
        )
    eps = backbone.norm.eps
    if file.norm_eps not in (None, eps) and not LEAST_EPS <= file.norm_eps <= LARGEST_EPS:
        raise ValueError(
            f"backbone_weights {file.path} has norms with layer_norm_eps {file.norm_eps:g}, as the config.json beside "
            f"it says, {name} has {eps:g}: set model.backbone_kwargs={{norm_eps: {file.norm_eps:g}}}"
        )
    check_pixels(backbone, name, file)
    known, used = (timm.get_pretrained_cfg(model) for model in (file.timm_name or name, name))
    only_the_model = file.timm_name == name.split(".")[0]  # of whose sets of weights any may be meant
    told_by_name = known and not only_the_model and file.pixels is None
    if told_by_name and (known.mean, known.std) != (used.mean, used.std):
        raise ValueError(
            f"backbone_weights {file.path} holds {file.backbone}, trained on pixels of mean {known.mean}, deviation "
            f"{known.std}; backbone_name {name} has {used.mean}, {used.std}: set model.backbone_name={file.timm_name}"
        )


def check_pixels(backbone: nn.Module, name: str, file: BackboneFile) -> None:
    """Raises ValueError where the model has other statistics of pixels than the file, or one beside it, says."""
    own = (tuple(backbone.pretrained_cfg["mean"]), tuple(backbone.pretrained_cfg["std"]))
    file.check_pixels(name, own, named_with_pixels(name, file))


def stored_pixels(stored: Mapping[str, Tensor], file: BackboneFile) -> Pixels | None:
    """The statistics of pixels that a published EoMT's encoder has among its tensors; None without."""
    keys = {key.rpartition("_")[2]: key for key in file.names.left_out if PIXELS.search(key)}
    if keys.keys() != {"mean", "std"}:
        return None
    mean, std = (tuple(stored[keys[name]].flatten().tolist()) for name in ("mean", "std"))
    return Pixels(mean, std, file.files[0])


def named_with_pixels(name: str, file: BackboneFile) -> str | None:
    """A timm model like the one named, with the statistics of pixels that a file says; None without one."""
    import timm

    family = name.split(".")[0]
    for other in (file.timm_name, family, *timm.list_pretrained(family)):
        config = timm.get_pretrained_cfg(other) if other else None
        if config and file.pixels and file.pixels.are((config.mean, config.std)):
            return other
    return None


def combine(made_of: Mapping[str, Sequence[Part]], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors under timm's names from those that a file has; see `name_tensors`.

    Raises:
        ValueError: parts of one tensor are of different shapes, or one is sparse or in 8 bits.
    """
    tensors = {}
    for name, parts in made_of.items():
        for key, _ in parts:
            if unusual := unusual_numbers(stored[key]):
                raise ValueError(f"{key} {unusual}")
        found = [stored[key] if third is None else stored[key].chunk(3)[third] for key, third in parts]
        if len({tensor.shape for tensor in found}) > 1 or not (len(found) == 1 or found[0].ndim):
            raise ValueError(f"{', '.join(part.key for part in parts)} are of different shapes")
        tensors[name] = found[0] if len(found) == 1 else torch.cat(found)
    return tensors


def drop_empty(tensors: dict[str, Tensor], file: BackboneFile) -> list[str]:
    """Takes out tensors without values, such as no registers, and returns their names in the file."""
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    for name in empty:
        del tensors[name]
    return [part.key for name in empty for part in file.names.made_of[name]]


def drop_zero_biases(
    tensors: dict[str, Tensor],
    stored: Mapping[str, Tensor],
    backbone: nn.Module,
    file: BackboneFile,
    report: BackboneReport,
) -> None:
    """Takes out biases of queries, keys and values that are 0 and that the model has not.

    Raises:
        ValueError: one is not 0, or DINOv3's mask of biases is another than keys without.
    """
    for key in (key for key in stored if key.endswith("qkv.bias_mask")):
        q, k, v = stored[key].chunk(3)
        if not ((q == 1).all() and (k == 0).all() and (v == 1).all()):
            raise ValueError(f"backbone_weights {file.path}: {key} should be 1 for queries and values, 0 for keys")
        name = next(name for name, parts in file.names.made_of.items() if Part(key[: -len("_mask")], 1) in parts)
        tensors[name] = torch.zeros_like(tensors[name])
    own = backbone.state_dict()
    for name in [name for name in tensors if BIASES.search(name) and name not in own]:
        if tensors.pop(name).any():
            better = f": set model.backbone_name={file.timm_name}" if file.timm_name else ""
            raise ValueError(
                f"backbone_weights {file.path} has {name}, which is not 0 and which this backbone_name lacks{better}"
            )
        report.left_out.append(f"{name}, which is 0")


def add_class_position(tensors: dict[str, Tensor], backbone: nn.Module, report: BackboneReport) -> None:
    """Adds the position embedding of the class token to the token, where timm's model has none for it."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3 or not getattr(backbone, "no_embed_class", False):
        return
    patches = positions.shape[1] - 1
    if math.isqrt(patches) ** 2 == patches and "cls_token" in tensors:
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]
        report.notes.append("the class token's position embedding is added to the token, as timm has it")


def check_rotary(stored: Mapping[str, Tensor], backbone: nn.Module, file: BackboneFile) -> None:
    """Raises ValueError where a file was trained with other rotary periods than the model computes."""
    own = getattr(getattr(backbone, "rope", None), "periods", None)
    for key in (key for key in file.names.left_out if key.endswith("rope_embed.periods")):
        there = stored[key].float()
        if own is None or own.shape != there.shape or not torch.allclose(own.cpu(), there, rtol=0.01):  # it is in bf16
            raise ValueError(f"backbone_weights {file.path}: {key} are other periods than those of this backbone_name")


def stored_grid(
    tensors: Mapping[str, Tensor], backbone: nn.Module, file: BackboneFile, name: str
) -> tuple[int, int] | None:
    """The grid of patches that position embeddings [1, prefix + N, C] are for; None without embeddings.

    Raises:
        ValueError: those beside the tokens that the model has before its patches are no grid.
    """
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return None
    prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    patches = positions[0, prefix:]
    try:
        return find_grid(patches) or square_grid(len(patches))
    except ValueError as error:
        raise ValueError(
            f"backbone_weights {file.path} holds {file.backbone}, whose {positions.shape[1]} position embeddings are "
            f"no square grid of patches if {prefix} of them are for other tokens, as {name} has {prefix}: choose the "
            "backbone_name that the file was made with"
        ) from error


def set_sizes(backbone: nn.Module, grid: tuple[int, int], patch_size: int) -> None:
    """Makes room for the position and patch embeddings of a file; what was there is not resampled, but dropped."""
    positions = backbone.pos_embed
    prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    backbone.pos_embed = None
    backbone.set_input_size(img_size=tuple(length * patch_size for length in grid), patch_size=patch_size)
    if positions is not None:
        backbone.pos_embed = nn.Parameter(positions.new_empty(1, prefix + math.prod(grid), positions.shape[-1]))


def check_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], file: BackboneFile, name: str) -> None:
    """Raises ValueError where a file's tensors are not the model's, one for one, in shape and kind, and finite."""
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"backbone_weights {file.path} holds {file.backbone}, but {len(missing)} of the {len(own)} weights of "
            f"{name} are missing there ({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown here "
            f"({', '.join(unknown[:3]) or 'none'}): the file may be cut, or another backbone_name be meant"
        )
    if misfit := first_misfit(tensors, own):
        raise ValueError(f"backbone_weights {file.path} {misfit}")
