"""Opening a saved network, whoever saved it, as one plain network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eomt.files import read_json, read_pickle
from eomt.inference.bases import PLACES, refuse_base
from eomt.inference.saved import CONFIG_FILE, check_artefact, read_config
from eomt.lora.saved_config import CONFIG_FILE as ADAPTER_CONFIG
from eomt.settings.backbones import DINOV2, DINOV3, Backbone
from eomt.settings.eomt_files import EomtFile, read_eomt_file
from eomt.settings.eomt_names import BACKBONE

if TYPE_CHECKING:  # mistakes are told before torch is there
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

OWN_SETTINGS = {"img_size", "num_classes", "num_q"}  # in this project's checkpoints


def is_ours(path: str | Path) -> bool:
    """Whether a path is a folder or checkpoint that this project saved, or a run's folder."""
    path = Path(path).expanduser()
    if path.suffix == ".ckpt" and path.is_file():
        content = read_pickle(path)
        settings = content.get("hyper_parameters") if isinstance(content, Mapping) else None
        return isinstance(settings, Mapping) and settings.keys() >= OWN_SETTINGS
    places = (path, path / "adapter", path / "model", path.parent if path.is_file() else path)
    return any((place / CONFIG_FILE).is_file() for place in places)


def recognised(path: str | Path) -> str:
    """Says in words what a path holds, as far as it is known without torch.

    Raises:
        FileNotFoundError: there is nothing. ValueError: it is neither an EoMT nor an adapter.
    """
    if not is_ours(path):
        config = read_json(Path(path) / ADAPTER_CONFIG, {})
        return f"an adapter of PEFT ({config.get('peft_type')})" if config else str(read_eomt_file(path))
    found = check_artefact(path)
    if found.is_file():
        return "a checkpoint of this project"
    init = read_config(found)["init"]
    kind = "an adapter" if init.get("use_lora") else "a whole network"
    return f"{kind} of this project: {init.get('backbone_name')}, {init.get('num_classes')} classes"


def open_merged(
    path: str | Path,
    ckpt_path: str | None = None,
    backbone_weights: str | None = None,
    img_size: Sequence[int] | None = None,
) -> MaskClassificationSemantic:
    """Returns a saved network in float32 and evaluation mode; an adapter is merged into its base.

    Args:
        path: what `from_pretrained` opens, or a file or folder of another program, see `read_eomt_file`.
        ckpt_path, backbone_weights: the base weights of an adapter, if they have moved.
        img_size: of a file that does not say it, (height, width).

    Raises:
        ValueError, OSError: it is no saved network, does not say what is needed, or its base is not there.
    """
    if not is_ours(path):
        if (Path(path) / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{path} is an adapter of another program: first convert it with --to adapter")
        refuse_base(Path(path), {"ckpt_path": ckpt_path})
        return open_other(read_eomt_file(path), img_size, backbone_weights)
    found = check_artefact(path)
    refuse_size(found, img_size)
    from eomt.inference.artefacts import merge_adapter
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    module = MaskClassificationSemantic.from_pretrained(found, ckpt_path, backbone_weights).float()
    if module.lora is not None:
        merge_adapter(module)
    return module.eval()


def refuse_size(path: str | Path, img_size: Sequence[int] | None) -> None:
    """Raises ValueError where an image size is given for what says its own."""
    if img_size:
        raise ValueError(f"--img_size {' '.join(map(str, img_size))}: {path} says its image size itself: leave it out")


def open_other(
    file: EomtFile, img_size: Sequence[int] | None = None, backbone_weights: str | None = None
) -> MaskClassificationSemantic:
    """Builds the network of another program's file, and forgets where it came from: it is whole.

    Args:
        backbone_weights: of a file of differences to a pretrained backbone; None: timm's.
    """
    from eomt.inference.artefacts import set_settings
    from eomt.models.checkpoint import needs_pretrained
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    differences = needs_pretrained(file.path, None)
    if not differences:
        refuse_base(file.path, {"backbone_weights": backbone_weights})
    base = {"backbone_weights": backbone_weights, "pretrained": differences and not backbone_weights}
    module = MaskClassificationSemantic(**settings_of(file, img_size) | base)
    set_settings(module, {**module.hparams, "pretrained": False, **dict.fromkeys(PLACES)})
    return module.eval()


def settings_of(file: EomtFile, img_size: Sequence[int] | None = None) -> dict[str, Any]:
    """The settings of the network in a file, from its tensors and what lies beside them.

    Raises:
        ValueError: the file does not say enough.
    """
    sizes, said = file.sizes, file.said
    size = img_size or said.img_size or square_size(file)
    if size is None:
        raise ValueError(f"{file.path} is {file}, and does not say for which image size: give --img_size HEIGHT WIDTH")
    if "num_classes" not in sizes:
        raise ValueError(f"{file.path} is {file}: it cannot predict; start a training from it with model.ckpt_path")
    name, kwargs = backbone_of(file)
    names = list(said.class_names or ())
    colors = [list(color) for color in said.class_colors or ()]
    return {
        "img_size": list(size),
        **{key: sizes[key] for key in ("num_classes", "num_q", "num_blocks", "patch_size")},
        "backbone_name": name,
        "backbone_kwargs": kwargs,
        "pretrained": False,
        "class_names": names if len(names) == sizes["num_classes"] else None,
        "class_colors": colors if len(colors) == sizes["num_classes"] else None,
        "ckpt_path": str(file.path),
    }


def square_size(file: EomtFile) -> tuple[int, int] | None:
    """The image size that position embeddings are for, if it is square; None where there are none."""
    positions = file.shapes.get(f"{BACKBONE}pos_embed")
    if not positions:
        return None
    side = math.isqrt(positions[-2])
    patch = file.backbone.patch_size
    return (side * patch, side * patch) if positions[-2] - side**2 in (0, 1) else None  # 1: the class token's


def backbone_of(file: EomtFile) -> tuple[str, dict[str, Any] | None]:
    """timm's name for the backbone in a file, and the arguments that make it of the file's size.

    Raises:
        ValueError: the file does not say enough.
    """
    found, heads = file.backbone, file.said.num_heads
    usual = replace(found, patch_size=14 if found.family == DINOV2 else 16).timm_name
    if usual:
        return usual, None
    if found.family not in (DINOV2, DINOV3) or not heads:
        raise ValueError(
            f"{file.path} is {file}, and its tensors do not tell which model of timm's that is, or how many heads its "
            "attention has: build the network with its settings, and load the file with model.ckpt_path"
        )
    inner = file.shapes[f"{BACKBONE}blocks.0.mlp.fc2.weight"][-1]
    kwargs: dict[str, Any] = {"embed_dim": found.width, "depth": found.depth, "num_heads": heads}
    if inner != 4 * found.width:
        packed = 2 if found.gated and not found.rotary else 1
        kwargs["mlp_ratio"] = (packed * inner + 0.5) / found.width  # timm rounds down
    return any_size(found, kwargs), kwargs


def any_size(backbone: Backbone, kwargs: dict[str, Any]) -> str:
    """timm's name of a model that the arguments make of any size; adds the number of registers where it is unusual."""
    if backbone.rotary:
        size = "small_plus" if backbone.gated else "small"
        return f"vit_{size}_patch16_dinov3{'_qkvb' if backbone.biased else ''}"
    if backbone.registers not in (0, 4):
        kwargs["reg_tokens"] = backbone.registers
    return f"vit_{'giant' if backbone.gated else 'small'}_patch14_{'reg4_' if backbone.registers else ''}dinov2"
