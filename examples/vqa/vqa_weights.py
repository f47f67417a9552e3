"""The pretrained parts: built of their configuration, with random weights, those of the hub, a file or a run."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vqa_config import VQAConfig

from eomt.command_line import one_sentence
from eomt.files import read_tensors
from eomt.suggestions import did_you_mean
from lora_config import NOT_FOR_USERS

if TYPE_CHECKING:
    from transformers import Dinov2Model, MBartForConditionalGeneration, PretrainedConfig

log = logging.getLogger(__name__)
ANSWER_TOKENS = 16  # of a generated answer, at most
PUBLISHED = (384, 768, 1024, 1536)  # widths of DINOv2
UNUSED = {"embeddings.mask_token"}  # of DINOv2's own training


def import_transformers() -> ModuleType:
    """The package transformers; ImportError with a remedy where it is missing."""
    for name in NOT_FOR_USERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks for it by its earlier name
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "this example needs the package transformers, which cannot be imported here: pip install eomt-lora[vqa]"
        ) from error
    return transformers


def build_vision(config: VQAConfig, pretrained: bool = False, weights: str | Path | None = None) -> Dinov2Model:
    """The image encoder.

    Raises:
        ValueError: an unknown field, or weights that are not of a DINOv2. OSError: weights that cannot be had.
    """
    transformers = import_transformers()
    if pretrained and weights:
        raise ValueError(
            f"--pretrained and --vision_weights {weights}: both name the image encoder's weights, give one"
        )
    if weights:
        return _vision_from_file(Path(weights), config.vision)
    if pretrained:
        return _from_hub(transformers.Dinov2Model, config.vision_hub, "vision_hub")
    return transformers.Dinov2Model(_known(transformers.Dinov2Config, config.vision, "vision"))


def build_language(config: VQAConfig, pretrained: bool = False) -> MBartForConditionalGeneration:
    """Text encoder, answer decoder and head, whose embeddings and head are one tensor.

    Raises:
        ValueError: an unknown field. OSError: weights that cannot be had.
    """
    transformers = import_transformers()
    kind = transformers.MBartForConditionalGeneration
    if pretrained:
        language = _from_hub(kind, config.text_hub, "text_hub")
    else:
        language = kind(_known(transformers.MBartConfig, config.text, "text"))
    own = language.config
    own.decoder_start_token_id = own.bos_token_id
    language.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=own.bos_token_id,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
    )
    return language


def fields_of(config: PretrainedConfig) -> dict[str, Any]:
    """The fields in which a configuration of transformers differs from its defaults."""
    known = type(config)().to_dict().keys() - {"transformers_version", "model_type", "architectures", "dtype"}
    return {name: value for name, value in config.to_diff_dict().items() if name in known}


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, those that are tied under the first of their names."""
    names = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    return {name: tensor for name, tensor in network.state_dict().items() if name in names}


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], source: str | Path = "the start") -> None:
    """Loads tensors by name; those of the network that are not given stay.

    Raises:
        ValueError: there are others, or of other shapes.
    """
    own = network.state_dict()
    wrong = [name for name, t in tensors.items() if name not in own or own[name].shape != t.shape]
    if wrong:
        raise ValueError(
            f"{source} is not of a network like this one (they differ in {len(wrong)} tensors, such as {wrong[0]}): "
            "give the configuration that it was trained with"
        )
    network.load_state_dict(tensors, strict=False)


def _known(kind: type, values: Mapping[str, Any], name: str) -> Any:
    """A configuration of transformers, which itself takes any name."""
    known = kind().to_dict()
    for field in values:
        if field not in known:
            raise ValueError(f"{name}.{field} is no field of {kind.__name__}{did_you_mean(field, known)}")
    if not values:
        raise ValueError(f"{name} is empty: give fields of {kind.__name__}, as tiny.yaml does")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {one_sentence(error)}") from error


def _from_hub(kind: type, name: str | None, field: str) -> Any:
    if not name:
        raise ValueError(f"--pretrained: the configuration names no {field}; take --config base, or leave it out")
    try:
        model, info = kind.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"--pretrained: {name} cannot be loaded ({one_sentence(error)}); give a folder as {field}, or weights in "
            "a file"
        ) from error
    if missing := sorted(set(info["missing_keys"]) - UNUSED):
        raise ValueError(f"--pretrained: {name} lacks {len(missing)} weights, such as {missing[0]}: choose another")
    return model


def _vision_from_file(path: Path, values: Mapping[str, Any]) -> Dinov2Model:
    """A DINOv2 whose sizes the file says; of the configuration only what its tensors do not tell counts."""
    transformers = import_transformers()
    tensors, _ = read_tensors(path)
    try:
        sizes = _dinov2_sizes(tensors, values.get("num_attention_heads"))
    except (KeyError, ValueError):
        raise ValueError(
            f"{path} holds no DINOv2 under transformers' names: save one with Dinov2Model.save_pretrained"
        ) from None
    config = _known(transformers.Dinov2Config, {**values, **sizes}, "vision")
    try:
        model, info = transformers.Dinov2Model.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
        )
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the DINOv2 that its sizes tell ({one_sentence(error)})") from error
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]} - UNUSED)
    if wrong:
        raise ValueError(f"{path} is no whole DINOv2: {len(wrong)} tensors are missing or unknown, such as {wrong[0]}")
    log.info("vision: %s, %s", path, ", ".join(f"{name} {value}" for name, value in sizes.items()))
    return model


def _dinov2_sizes(tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """The fields of `Dinov2Config` that shapes tell; those of the published sizes have heads of 64."""
    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    positions = tensors["embeddings.position_embeddings"].shape[1] - 1
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    gated = any(".mlp.weights_in." in name for name in tensors)
    sizes = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": math.isqrt(positions) * patch,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64 if width in PUBLISHED else heads,
        "use_swiglu_ffn": gated,
    }
    return sizes if gated else sizes | {"mlp_ratio": tensors["encoder.layer.0.mlp.fc1.weight"].shape[0] // width}
