"""A trained network in a folder: the encoders' base weights, an adapter each, everything else, and the tokeniser.

network.json            sizes, dropout, whether there is a head of types, which encoders have adapters
base.safetensors        both encoders as they were before training
vision_adapter/         where there is LoRA, in PEFT's format, tied to its base by fingerprint
text_adapter/
rest.safetensors        all else: what trained but the adapters, and what is neither encoder
tokenizer/
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model_no_latent import DeterministicVQA
from torch import Tensor
from vqa_config import from_dict
from vqa_tokens import load_tokenizer
from vqa_weights import load_tensors, own_tensors

from eomt.files import read_json, read_tensors, replacing, replacing_folder, write_json
from eomt.fingerprints import base_tensors
from lora_config import LoRASettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE, REST = "base.safetensors", "rest.safetensors"
ENCODERS = {"vision": "vision.", "text": "language.model.encoder."}  # their names in the network


def base_of(network: DeterministicVQA) -> dict[str, Tensor]:
    """Copies of the encoders' weights before training, without adapters, by their names in a plain network."""
    parts = {"vision": network.vision, "text": network.text}
    return {
        f"{prefix}{name}": tensor.detach().cpu().clone()
        for part, prefix in ENCODERS.items()
        for name, tensor in base_tensors(parts[part]).items()
    }


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a `.safetensors` file, as a whole or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as draft:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft)


def save_model(
    network: DeterministicVQA, tokenizer: PreTrainedTokenizerBase, base: dict[str, Tensor], folder: Path
) -> None:
    """Writes a trained network to a folder, as a whole or not at all.

    Args:
        network: the network.
        tokenizer: its own.
        base: what `base_of` gave before training.
        folder: to write.
    """
    adapted = network.adapted()
    with replacing_folder(folder) as draft:
        facts = {"dropout": network.projection[2].p, "use_type_loss": network.type_head is not None}
        write_json(draft / "network.json", {"config": network.config.as_dict(), **facts, "adapters": [*adapted]})
        save_tensors(base, draft / BASE)
        for name, part in adapted.items():
            part.save(draft / f"{name}_adapter")
        save_tensors(_rest(network), draft / REST)
        tokenizer.save_pretrained(draft / "tokenizer")


def _rest(network: DeterministicVQA) -> dict[str, Tensor]:
    encoders = tuple(ENCODERS.values())
    adapters = {id(p) for part in (network.vision_part, network.text_part) if part for p in part.adapter_parameters()}
    trained = {id(p) for p in network.parameters() if p.requires_grad} - adapters
    parameters = dict(network.named_parameters())
    return {
        name: tensor
        for name, tensor in own_tensors(network).items()
        if not name.startswith(encoders) or id(parameters.get(name)) in trained
    }


def load_model(
    folder: str | Path,
    vision_lora_r: int | None = None,
    vision_lora_alpha: float | None = None,
    vision_lora_dropout: float | None = None,
    text_lora_r: int | None = None,
    text_lora_alpha: float | None = None,
    text_lora_dropout: float | None = None,
) -> tuple[DeterministicVQA, PreTrainedTokenizerBase]:
    """The network of a folder that `save_model` wrote: base, then adapters, then the rest; and its tokeniser.

    The LoRA settings are the adapters' own; what is given here must agree with them.

    Raises:
        ValueError: a setting contradicts an adapter, or the folder's files do not belong together.
        FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    if (folder / "model" / "network.json").is_file():
        raise ValueError(f"{folder} is the folder of a run: give its {folder / 'model'}")
    if not (folder / "network.json").is_file():
        raise FileNotFoundError(f"{folder / 'network.json'} is missing: give model/ of a run")
    facts = read_json(folder / "network.json")
    given = {
        "vision": (vision_lora_r, vision_lora_alpha, vision_lora_dropout),
        "text": (text_lora_r, text_lora_alpha, text_lora_dropout),
    }
    try:
        config, adapters = from_dict(facts["config"], folder / "network.json"), facts["adapters"]
        network_facts = {name: facts[name] for name in ("dropout", "use_type_loss")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'network.json'} does not say {error}: fetch the folder again") from error
    for name, flags in given.items():
        if name in adapters:
            LoRASettings.from_adapter(folder / f"{name}_adapter", *flags)
        elif any(flag is not None for flag in flags):
            raise ValueError(f"{folder} has no LoRA on its {name} encoder: leave the flags --{name}_lora_... out")
    network = DeterministicVQA(config, **network_facts)
    base, _ = read_tensors(folder / BASE)
    rest, _ = read_tensors(folder / REST)
    if lacking := sorted(own_tensors(network).keys() - base.keys() - rest.keys()):
        raise ValueError(f"{folder} lacks {len(lacking)} tensors, such as {lacking[0]}: fetch the folder again")
    load_tensors(network, base, folder / BASE)
    network.load_adapters(*(folder / f"{name}_adapter" if name in adapters else None for name in ENCODERS))
    load_tensors(network, rest, folder / REST)
    return network.eval(), load_tokenizer(folder / "tokenizer")


def frozen_rest(network: DeterministicVQA) -> dict[str, Tensor]:
    """What neither trains nor is in an encoder, by name: a frozen decoder, and buffers."""
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    parameters, encoders = dict(network.named_parameters()), tuple(ENCODERS.values())
    return {
        name: tensor
        for name, tensor in own_tensors(network).items()
        if not name.startswith(encoders) and id(parameters.get(name)) not in trained
    }


def start_of(folder: str | Path, types: bool = True) -> dict[str, Tensor]:
    """The tensors of a trained network, its adapters merged, for another one of its sizes to start from.

    Args:
        folder: `model/` of a run.
        types: whether the other one has a head of types as well.
    """
    network, _ = load_model(folder)
    for part in (network.vision_part, network.text_part):
        if part:
            part.merge()
    return {name: t for name, t in own_tensors(network).items() if types or not name.startswith("type_head.")}
