"""Files of whole EoMTs: whose they are, and what they and the configurations beside them say of the network.

torch is needed only for files other than `.safetensors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eomt.files import parse_json, read_json, read_pickle
from eomt.fingerprints import is_adapter
from eomt.settings.backbone_files import USUAL, flat, header_shapes, parts_of, places_in
from eomt.settings.backbone_names import Names, Part, name_tensors
from eomt.settings.backbones import DINOV2, DINOV3, NO_EOMT, ROPE_THETA, Backbone, plain_vit, recognise, rope_theta
from eomt.settings.config_check import check_type
from eomt.settings.eomt_names import BACKBONE, KNOWN, LIGHTLY, PUBLISHED, TRANSFORMERS, bare, name_eomt, program_of
from eomt.settings.eomt_names import sizes_of as sizes_of_shapes
from eomt.settings.formats import refuse_exported
from eomt.settings.pixel_statistics import transformers_pixels

CONFIG_TYPES = {
    "image_size": int | list[int],
    "num_attention_heads": int,
    "layer_norm_eps": float,
    "id2label": dict[str, str],
    "class_colors": list[list[int]],
    "rope_parameters": dict,
    "rope_theta": float,
}
LIGHTLY_TYPES = {
    "image_size": Sequence[int],
    "num_joint_blocks": int,
    "classes": dict[int, str],
    "image_normalize": dict[str, Sequence[float]],
}
HEADS_ALONE = (
    "holds queries and heads of an EoMT and no backbone: give the folder of the adapter that they belong to, or a file "
    "of the whole network"
)
OWN_TYPES = {"img_size": Sequence[int], "num_heads": int}


@dataclass(frozen=True)
class Said:
    """What a file, or a configuration beside it, says that no shape of its tensors tells; None where it does not.

    Args:
        img_size: height, width. num_heads: of the attention. norm_eps: of the backbone's norms.
        class_names, class_colors: by index. pixels: mean and deviation of the images. num_blocks: that see the queries.
    """

    img_size: tuple[int, int] | None = None
    num_heads: int | None = None
    norm_eps: float | None = None
    class_names: tuple[str, ...] | None = None
    class_colors: tuple[tuple[int, ...], ...] | None = None
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    num_blocks: int | None = None


@dataclass(frozen=True)
class EomtFile:
    """A file or folder with a whole EoMT.

    Args:
        path: as given. files: those with the weights. program: whose it is, see `eomt_names`.
        names: of all its tensors, see `name_eomt`; shapes: of the parts of each, under the published names.
        said: see `Said`.
    """

    path: Path
    files: list[Path]
    program: str
    names: Names
    shapes: Mapping[str, Sequence[int]]
    said: Said = field(default_factory=Said)

    @property
    def sizes(self) -> dict[str, int]:
        """See `sizes_of`."""
        return ({"num_blocks": self.said.num_blocks} if self.said.num_blocks else {}) | sizes_of_shapes(self.shapes)

    @property
    def backbone(self) -> Backbone:
        """The plain ViT in it; ValueError where there is none."""
        inside = {k.removeprefix(BACKBONE): v for k, v in self.names.made_of.items() if k.startswith(BACKBONE)}
        if not inside:
            raise ValueError(f"{self.path} {HEADS_ALONE}")
        names = Names(inside, [])
        found = recognise(names, {parts[0].key: self.shapes[BACKBONE + k] for k, parts in inside.items()})
        if found.family not in (DINOV2, DINOV3) and self.program == TRANSFORMERS:
            found = replace(found, family=DINOV3 if found.rotary else DINOV2)
        return found

    def __str__(self) -> str:
        """In words: `transformers' EoMT: a DINOv2 ViT-L/16 of 24 blocks …, 100 queries in the last 4, 19 classes`."""
        sizes = self.sizes
        blocks = f" in the last {sizes['num_blocks']} blocks" if "num_blocks" in sizes else ""
        classes = f"{sizes['num_classes']} classes" if "num_classes" in sizes else "no class head"
        return f"{self.program}: {self.backbone}, {sizes.get('num_q', 'no')} queries{blocks}, {classes}"


def eomt_files(path: str | Path) -> list[Path]:
    """Returns the files that hold the weights: the one named, or those of a folder, which may be in parts."""
    path = Path(path).expanduser()
    found = places_in(path) if path.is_dir() else [path]
    return parts_of(found[0]) if found and found[0].is_file() else [*found, path / USUAL[0]][:1]


def read_eomt_file(path: str | Path) -> EomtFile:
    """Says whose EoMT a file or folder holds, and of what sizes.

    Raises:
        FileNotFoundError: it is not there. ValueError: it cannot be read, is no EoMT, or contradicts itself.
    """
    path = Path(path).expanduser()
    files = eomt_files(path)
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file; give a file of weights, or a folder that holds one")
    refuse_exported(files[0])
    if files[0].suffix == ".safetensors":
        shapes = {key: shape for file in files for key, shape in header_shapes(file).items()}
        content: Mapping[str, Any] = {}
    else:
        content = {key: value for file in files for key, value in _mapping(read_pickle(file), file).items()}
        shapes = {key: list(t.shape) for key, t in flat(weights_in(content)) if hasattr(t, "shape")}
    return describe_file(path, files, shapes, content)


def _mapping(content: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not the weights of a network")
    return content


def weights_in(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a pickled file that holds the network: Lightning's, LightlyTrain's, or all of it."""
    for name in ("state_dict", "train_model"):
        if isinstance(content.get(name), Mapping):
            return content[name]
    return content


def describe_file(
    path: Path, files: Sequence[Path], shapes: Mapping[str, Sequence[int]], content: Mapping[str, Any]
) -> EomtFile:
    """`read_eomt_file`, of a file whose tensors' shapes are known.

    Args:
        content: what else a pickled file holds.
    """
    program = program_of(shapes)
    if program is None:
        raise ValueError(f"{path} {what_is_there(files[0], shapes)}")
    try:
        names = name_eomt(shapes, program) if program != PUBLISHED else name_published(shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    firsts = {name: shapes[parts[0].key] for name, parts in names.made_of.items()}
    said = {TRANSFORMERS: said_by_transformers, LIGHTLY: said_by_lightly}.get(program, said_by_ours)
    file = EomtFile(path, list(files), program, names, firsts, said(files[0], content))
    if program != PUBLISHED:
        _check_upscaling(file)
    if program == TRANSFORMERS:
        _check_config(file, files[0].parent / "config.json")
    return file


def name_published(keys: Iterable[str]) -> Names:
    """The names of the published code, whose DINOv3 backbone has transformers' names."""
    keys = list(keys)
    backbone = {bare(key).removeprefix(BACKBONE): key for key in keys if bare(key).startswith(BACKBONE)}
    names = name_tensors(backbone)
    made_of = {bare(key): [Part(key)] for key in keys if not bare(key).startswith(BACKBONE)}
    for name, parts in names.made_of.items():
        made_of[BACKBONE + name] = [Part(backbone[key], third) for key, third in parts]
    return Names(made_of, [backbone[key] for key in names.left_out])


def what_is_there(file: Path, shapes: Mapping[str, Sequence[int]]) -> str:
    """Returns what can be said of a file that is no EoMT: what it is, or its first keys and what is known."""
    if any(map(is_adapter, shapes)):
        return "holds an adapter, which holds no backbone: give the folder of the adapter, with its settings"
    if any(key.endswith(".exp_avg") for key in shapes):
        return "holds the state of an optimiser and no network: give the weights that were saved beside it"
    if backbone := plain_vit(shapes):
        return f"holds {backbone}, {NO_EOMT}: start a training from it with model.backbone_weights"
    config = _config(file.parent / "config.json")
    kind = config.get("architectures") or config.get("model_type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    named = f"is no EoMT, but {kind}, as the config.json beside it says" if kind else "is no EoMT that is known here"
    first = ", ".join(sorted(shapes)[:3])
    return f"{named}: it holds {first or 'no tensors'}{', ...' if len(shapes) > 3 else ''}; known are {KNOWN}"


def _config(file: Path) -> dict[str, Any]:
    return read_json(file, {})


def said_by_transformers(file: Path, _: Mapping[str, Any]) -> Said:
    """What transformers' config.json and preprocessor_config.json beside a file say; ValueError for what cannot be."""
    config = _entries(_config(file.parent / "config.json"), CONFIG_TYPES, file.parent / "config.json")
    pixels = transformers_pixels(file.parent)
    size, labels, colors = (config.get(name) for name in ("image_size", "id2label", "class_colors"))
    if labels and sorted(labels) != sorted(map(str, range(len(labels)))):
        raise ValueError(f"{file.parent / 'config.json'}: id2label names {', '.join(labels)}: 0 to K - 1 are meant")
    return Said(
        img_size=(size, size) if isinstance(size, int) else tuple(size) if size else None,
        num_heads=config.get("num_attention_heads"),
        norm_eps=config.get("layer_norm_eps"),
        class_names=tuple(labels[str(k)] for k in range(len(labels))) if labels else None,
        class_colors=tuple(map(tuple, colors)) if colors else None,
        pixels=(pixels.mean, pixels.std) if pixels else None,
    )


def said_by_lightly(file: Path, content: Mapping[str, Any]) -> Said:
    """What LightlyTrain keeps beside the weights: the arguments that its network is made with.

    Raises:
        ValueError: they are impossible, or do not say how many blocks see the queries, which no tensor tells.
    """
    made_with = content.get("model_init_args")
    if not isinstance(made_with, Mapping) or "num_joint_blocks" not in made_with:
        raise ValueError(
            f"{file} is {LIGHTLY} without its model_init_args, which say how many blocks see the queries: give the "
            "exported_models/exported_last.pt of its run as it is"
        )
    _entries(made_with, LIGHTLY_TYPES, file)
    classes, pixels, size = (made_with.get(name) for name in ("classes", "image_normalize", "image_size"))
    return Said(
        img_size=tuple(size) if size else None,
        class_names=tuple(classes.values()) if classes else None,
        pixels=(tuple(pixels["mean"]), tuple(pixels["std"])) if pixels and pixels.keys() >= {"mean", "std"} else None,
        num_blocks=made_with["num_joint_blocks"],
    )


def said_by_ours(file: Path, content: Mapping[str, Any]) -> Said:
    """What this project leaves in the metadata of a `.safetensors` file, or in a checkpoint."""
    settings, heads = content.get("hyper_parameters") or {}, content.get("num_heads")
    size = settings.get("img_size") if isinstance(settings, Mapping) else None
    if file.suffix == ".safetensors":
        metadata = read_metadata(file)
        size, heads = (parse_json(metadata.get(name, "null")) for name in ("img_size", "num_heads"))
    _entries({"img_size": size, "num_heads": heads}, OWN_TYPES, file)
    return Said(img_size=tuple(size) if size else None, num_heads=heads)


def _entries(mapping: Mapping[str, Any], hints: Mapping[str, Any], place: Path) -> Mapping[str, Any]:
    """The mapping, after its entries are of their types; ValueError for the first one that is not."""
    for name, hint in hints.items():
        value = mapping.get(name)
        if value is not None:
            check_type(value, hint, f"{place}: {name}")
            if name in ("image_size", "img_size") and not isinstance(value, int) and len(value) != 2:
                raise ValueError(f"{place}: {name} {value!r}: two numbers are meant, height and width")
    return mapping


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a `.safetensors` file, whose tensors are not read."""
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        return opened.metadata() or {}


def _check_upscaling(file: EomtFile) -> None:
    """Raises ValueError where features are doubled more or less often than in the published EoMT with such patches."""
    there = len({key.split(".")[1] for key in file.shapes if key.startswith("upscale.")})
    patch = file.backbone.patch_size
    here = max(1, int(math.log2(patch)) - 2)
    if there != here:
        raise ValueError(
            f"{file.path} is {file}: with patches of {patch} it doubles its features {there} times, and the published "
            f"EoMT {here}, so that no network here computes the same"
        )


def _check_config(file: EomtFile, config_file: Path) -> None:
    """Raises ValueError where transformers' config.json contradicts the weights, or says what is not computed here."""
    config, sizes, backbone = _config(config_file), file.sizes, file.backbone
    if backbone.rotary and backbone.gated:
        raise ValueError(
            f"{file.path} is {file}: transformers computes one activation in its gated MLPs and its heads, where the "
            "published networks have two (SiLU, GELU), so that no network here computes the same"
        )
    patch = config.get("patch_size")
    said = {
        "model_type": (config.get("model_type"), "eomt_dinov3" if backbone.rotary else "eomt"),
        "hidden_size": (config.get("hidden_size"), backbone.width),
        "num_hidden_layers": (config.get("num_hidden_layers"), backbone.depth),
        "num_queries": (config.get("num_queries"), sizes.get("num_q")),
        "num_blocks": (config.get("num_blocks"), sizes.get("num_blocks")),
        "patch_size": (patch[0] if isinstance(patch, list) and patch else patch, backbone.patch_size),
        "num_register_tokens": (config.get("num_register_tokens"), backbone.registers),
        "id2label": (len(config["id2label"]) if config.get("id2label") else None, sizes.get("num_classes")),
        "hidden_act": (config.get("hidden_act"), "gelu"),
        "rope_theta": (rope_theta(config), ROPE_THETA),
    }
    for name, (there, here) in said.items():
        if there is not None and here is not None and there != here:
            raise ValueError(
                f"{file.path}: {config_file.name} says {name} {there}, its weights are those of {name} {here}: keep "
                "the config.json of these weights beside them"
            )
