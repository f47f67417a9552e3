"""The plain backbone in a file of weights: what it is, and which timm model takes it.

torch is needed only for files other than `.safetensors`, and beside timm's config.json, whose tags timm alone knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eomt.files import read_json
from eomt.fingerprints import is_adapter
from eomt.settings.backbone_files import header_shapes, places_in, read_shapes, weight_files
from eomt.settings.backbone_names import Names, name_tensors
from eomt.settings.backbones import (
    DEFAULT_BACKBONE,
    DEIT,
    DINOV2,
    DINOV3,
    MAE,
    NO_EOMT,
    ROPE_THETA,
    SATELLITE,
    TOLD,
    VIT,
    Backbone,
    plain_vit,
    recognise,
    rope_theta,
)
from eomt.settings.config_check import check_type
from eomt.settings.eomt_names import PUBLISHED, is_backbone_alone, program_of
from eomt.settings.hub import local_path
from eomt.settings.pixel_statistics import (
    IMAGENET,
    Pixels,
    Statistics,
    in_words,
    overlay,
    timm_entries,
    timm_pixels,
    transformers_pixels,
)

FAMILIES = {  # transformers' model_type
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "dinov3_vit": DINOV3,
    "vit_mae": MAE,
    "deit": DEIT,
    "vit": VIT,
}
SATELLITE_TAG = ".sat493m"  # of timm's DINOv3 for satellite images, which these models have
SATELLITES = ("vit_large_patch16_dinov3", "vit_large_patch16_dinov3_qkvb", "vit_7b_patch16_dinov3")


@dataclass(frozen=True)
class BackboneFile:
    """What a file of weights, or a folder of them, says of the backbone in it.

    Args:
        path: as given. files: those with the weights. config: the config.json beside them, empty without one.
        names, backbone: see `name_tensors` and `recognise`.
        timm_name: of the one timm model that this is; None where it may be several, or none.
        heads: of its attention, which no shape tells; None without a config.json.
        norm_eps: what its norms add to the variance, as transformers' config.json says; None without one.
        pixels: that it was trained on, as a file beside it says; None without one.
    """

    path: Path
    files: list[Path]
    names: Names
    backbone: Backbone
    timm_name: str | None
    heads: int | None
    norm_eps: float | None
    pixels: Pixels | None

    def misfit(self, backbone_name: str, asked: Backbone | None = None) -> str:
        """The sentence for a file that holds another backbone than asked for."""
        is_timms = f" (timm's {self.timm_name})" if self.timm_name else ""
        return (
            f"backbone_weights {self.path} holds {self.backbone}{is_timms}; backbone_name says {backbone_name}"
            f"{f', {asked}' if asked else ''}: {remedy(self.timm_name)}"
        )

    def check_pixels(self, backbone_name: str, used: Statistics, better: str | None = None) -> None:
        """Raises ValueError where a model has other statistics of pixels than a file beside the weights says.

        Args:
            backbone_name, used: of the model. better: the name of one that has them.
        """
        if self.pixels is None or self.pixels.are(used):
            return
        said = (self.pixels.mean, self.pixels.std)
        named = f"model.backbone_name={better} or " if better else ""
        raise ValueError(
            f"backbone_weights {self.path} holds {self.backbone}, trained on pixels of mean {in_words(said)}, as "
            f"{self.pixels.file.name} says; backbone_name {backbone_name} has {in_words(used)}: set {named}"
            f"model.backbone_kwargs={overlay(said)}"
        )


def remedy(timm_name: str | None) -> str:
    """What to do about a `backbone_name` that is not the file's."""
    if timm_name:
        return f"set model.backbone_name={timm_name} or null (and backbone_kwargs=null), or give another file"
    return "set the model.backbone_name (and backbone_kwargs) that the file was made with, or give another file"


def read_backbone_file(path: str | Path) -> BackboneFile:
    """Says which backbone a file holds, by names, shapes, and the config.json beside it.

    Raises:
        FileNotFoundError: nothing there. ValueError: it cannot be read, is no plain backbone, or contradicts itself.
    """
    path = Path(path).expanduser()
    files = weight_files(path)
    try:
        shapes = read_shapes(files)
        check_kind(shapes)
        names = name_tensors(shapes)
        backbone = recognise(names, shapes)
    except ValueError as error:
        raise ValueError(f"backbone_weights {path}: {error}") from error
    file = files[0].parent / "config.json"
    config = read_json(file, {})
    backbone = _agreeing(backbone, config, file, path)
    pixels = transformers_pixels(file.parent) or timm_pixels(config, file)
    named = named_by_timm(config) or backbone.timm_name
    if named in SATELLITES and pixels and pixels.are(SATELLITE):
        named += SATELLITE_TAG
    made_with = config.get("model_args")
    heads = made_with.get("num_heads") if isinstance(made_with, Mapping) else config.get("num_attention_heads")
    eps = config.get("layer_norm_eps")
    if eps is not None:
        check_type(eps, float, f"{file}: layer_norm_eps")
    return BackboneFile(path, files, names, backbone, named, heads, eps, pixels)


def named_by_timm(config: Mapping[str, Any]) -> str | None:
    """The timm model that timm's config.json names, with its tag where timm has it, too; None where it names none.

    Only timm knows its tags, which are others' own in what they upload.
    """
    architecture, tag = config.get("architecture"), timm_entries(config).get("tag")
    if not architecture:
        return None
    import timm

    if not timm.is_model(architecture):
        return None
    tagged = f"{architecture}.{tag}"
    return tagged if tagged in timm.list_pretrained(architecture) else architecture


def check_kind(keys: Collection[str]) -> None:
    """Raises ValueError where tensors are an EoMT's or an adapter's, which other settings take."""
    if any(map(is_adapter, keys)):
        raise ValueError(
            "it holds an adapter, and backbone_weights takes a plain backbone: give what it was trained on"
        )
    program = program_of(keys)
    if program and not is_backbone_alone(keys):
        whole = "a whole EoMT" if program == PUBLISHED else program
        raise ValueError(f"it holds {whole}, with queries and heads: give it as model.ckpt_path")
    if not keys:
        raise ValueError("it holds no tensors")


def plain_backbone(path: str | Path) -> Backbone | None:
    """Returns the plain backbone that a file or folder holds, whatever the config.json beside it says.

    None where it holds something else, or nothing.
    """
    try:
        return plain_backbone_of(read_shapes(weight_files(Path(path).expanduser())))
    except (ValueError, FileNotFoundError):
        return None


def plain_backbone_of(shapes: Mapping[str, Sequence[int]]) -> Backbone | None:
    """Returns the plain backbone that tensors of these shapes are; None where they are something else."""
    try:
        check_kind(shapes)
    except ValueError:
        return None
    return plain_vit(shapes)


def _agreeing(backbone: Backbone, config: Mapping[str, Any], file: Path, path: str | Path) -> Backbone:
    """The backbone with the family that transformers' config.json names; ValueError where they contradict."""
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        return backbone
    if backbone.family in (VIT, family):
        backbone = replace(backbone, family=family)
    said = {
        "model_type": (config["model_type"], next(kind for kind, name in FAMILIES.items() if name == backbone.family)),
        "hidden_size": (config.get("hidden_size"), backbone.width),
        "num_hidden_layers": (config.get("num_hidden_layers"), backbone.depth),
        "patch_size": (config.get("patch_size"), backbone.patch_size),
        "num_register_tokens": (config.get("num_register_tokens"), backbone.registers),
        "rope_theta": (rope_theta(config), ROPE_THETA),
        "hidden_act": (None if backbone.gated else config.get("hidden_act"), "gelu"),
    }
    for name, (there, here) in said.items():
        same_family = name == "model_type" and family == backbone.family
        if there not in (None, here) and not same_family:
            raise ValueError(
                f"backbone_weights {path}: {file} says {name} {there}, the weights are those of {backbone}, {name} "
                f"{here}: keep the config.json of these weights beside them, or none"
            )
    return backbone


def choose_backbone(backbone_name: str | None, backbone_weights: str | Path | None) -> str:
    """Returns the timm model that the settings name, the file of weights tells, or else the default.

    Raises:
        ValueError: the file does not tell, or is another model than the one named.
        FileNotFoundError: there is no such file.
    """
    if not backbone_weights:
        return backbone_name or DEFAULT_BACKBONE
    if backbone_name:
        return backbone_name
    file = read_backbone_file(backbone_weights)
    if not file.timm_name:
        raise ValueError(
            f"backbone_weights {backbone_weights} holds {file.backbone}, and names and shapes do not tell which timm "
            "model that is: give model.backbone_name (for a ViT-B/16, vit_base_patch16_224.mae, deit_base_patch16_224 "
            "and vit_base_patch16_224 are alike but for the statistics of their pixels)"
        )
    return file.timm_name


def check_backbone_weights(path: str | Path, backbone_name: str | None, kwargs: Mapping[str, Any] | None) -> None:
    """Raises what loading a file into a timm model would, as far as it is known without torch.

    Args:
        path, backbone_name, kwargs: the settings `backbone_weights`, `backbone_name` and `backbone_kwargs`.
    """
    if ((kwargs or {}).get("pretrained_cfg_overlay") or {}).get("file"):
        raise ValueError(f"backbone_weights {path} and backbone_kwargs pretrained_cfg_overlay.file: leave one out")
    if any(file.suffix != ".safetensors" for file in weight_files(path)):
        return
    name = choose_backbone(backbone_name, path)
    file, named = read_backbone_file(path), name.split(".")[0].removesuffix("_qkvb")
    told = (file.timm_name or "").split(".")[0].removesuffix("_qkvb")
    if kwargs or named not in TOLD:
        return
    if told and told != named:
        raise ValueError(file.misfit(name))
    if "." not in name:  # else timm knows which pixels such weights are for
        satellite = str(file.timm_name).endswith(SATELLITE_TAG)
        file.check_pixels(name, IMAGENET, file.timm_name if satellite else None)


def check_no_backbone(path: str | Path) -> None:
    """Raises what `refuse_backbone` does for a file that `ckpt_path` names, as far as it is known without torch."""
    file = local_path(path)
    if file.is_dir():
        file = next(iter(places_in(file)), file)
    if file.suffix != ".safetensors" or not file.is_file():
        return
    try:
        shapes = header_shapes(file)
    except ValueError:  # which is said when it is loaded
        return
    refuse_backbone(path, shapes)


def refuse_backbone(path: str | Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError where the tensors of what `ckpt_path` names are a plain backbone."""
    if backbone := plain_backbone_of(shapes):
        raise ValueError(
            f"ckpt_path {path} holds {backbone}, {NO_EOMT}: give it as model.backbone_weights, and leave ckpt_path out"
        )
