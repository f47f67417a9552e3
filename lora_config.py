"""LoRA on the linear layers of any torch module: settings from YAML, and applying them.

Low-rank adaptation (https://arxiv.org/abs/2106.09685) keeps a linear layer's weight W [out, in] frozen and trains an
update `scaling * B A`, with A [r, in] and B [out, r]. PEFT (https://github.com/huggingface/peft) does the adapting and
is imported only when LoRA is asked for, and torch only then: settings are checked without. `eomt.lora` has the rest of
an adapter's life: the proof that it trains, files, merging.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

    from eomt.fingerprints import Identity

log = logging.getLogger(__name__)

# loggers that warn of what only their developers can change, when PEFT imports torchao and bitsandbytes
NOT_FOR_USERS = ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
SUPPORTED_OPTIONS = ("use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "lora_bias")
REFUSED_OPTIONS = {  # LoraConfig fields that another setting owns, or that do nothing good here: what to do instead
    "r": "set `rank`",
    "lora_alpha": "set `alpha`",
    "lora_dropout": "set `dropout`",
    "target_modules": "set `target_modules` of the LoRA settings themselves",
    "exclude_modules": "name only the wanted layers in `target_modules`",
    "layers_to_transform": "set `blocks`, 'all' or the last K",
    "layers_pattern": "set `blocks`, 'all' or the last K",
    "modules_to_save": "make further parameters trainable in the network itself and save them beside the adapter",
    "bias": "biases of the base would train and the adapter alone would not restore the model; use `lora_bias`",
    "task_type": "it wraps transformers models only; leave it out",
    "inference_mode": "adapters here are trained; load_adapter gives frozen ones",
    "layer_replication": "it changes the base network; leave it out",
    "target_parameters": "only linear layers are adapted; set `target_modules`",
    "kasa_config": "KaSA truncates the base weights, so its adapter means nothing on the original base; leave it out",
    "eva_config": "EVA needs data to initialise and silently trains plain LoRA without; leave it out",
    "corda_config": "CorDA needs data and changes the base weights; leave it out",
    "lora_ga_config": "LoRA-GA needs data to initialise and silently trains plain LoRA without; leave it out",
    "loftq_config": "LoftQ quantises the base weights; leave it out",
}
REFUSED_INITS = {
    "False": "it changes the output before the first step",
    "pissa": "it changes the base weights, so the adapter file means nothing on the original base",
    "olora": "it changes the base weights, so the adapter file means nothing on the original base",
    "corda": "it changes the base weights, so the adapter file means nothing on the original base",
    "loftq": "it changes the base weights, so the adapter file means nothing on the original base",
    "mica": "it freezes B, half of the adapter",
    "eva": "it needs data to initialise and silently trains plain LoRA without",
    "lora_ga": "it needs data to initialise and silently trains plain LoRA without",
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


@dataclass(frozen=True)
class LoRASettings:
    """The layers to adapt, and how. Everything is checked here, before any model is built and without importing PEFT.

    Args:
        rank: rows of A and columns of B.
        alpha: the update is scaled by alpha / rank (alpha / sqrt(rank) with the option use_rslora).
        dropout: probability of dropping an input feature of the adapter.
        target_modules: linear layers by role ("query", "key", "value", "out", "attention", "mlp", or "decoder.query"),
            by the dotted end of their names ("qkv", "attn.proj", "fc1") or by their full names; `eomt.targets.resolve`.
        blocks: "all", or K to adapt only the last K of the module's numbered blocks.
        options: further fields of `peft.LoraConfig`: those in SUPPORTED_OPTIONS.

    Raises:
        ValueError: for a value outside these rules; the sentence says what to write instead.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: Sequence[str] = ("attn.qkv", "attn.proj")
    blocks: int | str = "all"
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        targets = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules or ())
        object.__setattr__(self, "target_modules", targets)
        object.__setattr__(self, "options", dict(self.options or {}))
        if not _is_int(self.rank) or self.rank < 1:
            raise ValueError(f"LoRA rank {self.rank!r}: it must be a whole number of at least 1, for example 16")
        if not _is_positive(self.alpha):
            raise ValueError(f"LoRA alpha {self.alpha!r}: it must be above 0, for example {2 * self.rank}")
        if not isinstance(self.dropout, (int, float)) or isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout {self.dropout!r}: it must be at least 0 and below 1, for example 0.05")
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise ValueError(f"LoRA target_modules {targets!r}: name at least one layer, for example ['attn.qkv']")
        if self.blocks != "all" and not (_is_int(self.blocks) and self.blocks >= 1):
            raise ValueError(f"LoRA blocks {self.blocks!r}: it must be 'all' or how many of the last blocks to adapt")
        _check_options(self.options, self.rank)

    @classmethod
    def for_images(cls, images: int, **changes: Any) -> LoRASettings:
        """The settings of the preset for a number of training images, in the attention of whatever network.

        `changes` replace some of them: `LoRASettings.for_images(1200, target_modules=("query", "value"))`.
        """
        return replace(preset_for(images).settings, **{"target_modules": ("attention",)} | changes)

    @classmethod
    def from_adapter(
        cls,
        directory: str | Path,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
    ) -> LoRASettings:
        """The settings that a saved adapter was trained with; its targets are the full names of its layers.

        `rank`, `alpha` and `dropout` are what a command line says of them; None: nothing.

        Raises:
            FileNotFoundError: there is no adapter. ValueError: it is none of LoRA, damaged, or contradicts them.
        """
        file = Path(directory) / "adapter_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: give the folder that save_adapter wrote")
        try:
            settings = cls.from_peft(json.loads(file.read_bytes()))
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} does not say what a LoRA was trained with ({error}): put it back") from error
        for name, value in {"rank": rank, "alpha": alpha, "dropout": dropout}.items():
            if value is not None and value != (own := getattr(settings, name)):
                raise ValueError(
                    f"LoRA {name} {value}: the adapter in {directory} was trained with {own}; leave it out"
                )
        return settings

    @classmethod
    def from_peft(cls, content: Mapping[str, Any]) -> LoRASettings:
        """The settings that PEFT's `adapter_config.json` says; LookupError or ValueError where it does not."""
        if content["peft_type"] != "LORA":
            raise ValueError(f"peft_type {content['peft_type']!r} is not LORA")
        return cls(
            rank=content["r"],
            alpha=content["lora_alpha"],
            dropout=content.get("lora_dropout", 0),
            target_modules=content["target_modules"],
            options={name: content[name] for name in SUPPORTED_OPTIONS if content.get(name) is not None},
        )


def _check_options(options: Mapping[str, Any], rank: int) -> None:
    for key in options:
        if key in REFUSED_OPTIONS:
            raise ValueError(f"LoRA option {key!r} is not accepted: {REFUSED_OPTIONS[key]}")
        if key not in SUPPORTED_OPTIONS:
            close = difflib.get_close_matches(str(key), SUPPORTED_OPTIONS, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"accepted are {', '.join(SUPPORTED_OPTIONS)}"
            raise ValueError(f"LoRA option {key!r} is not supported: {remedy}")
    for key in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(options.get(key, False), bool):
            raise ValueError(f"LoRA option {key} is {options[key]!r}: it must be true or false")
    ranks = options.get("rank_pattern") or {}
    if not isinstance(ranks, Mapping) or not all(_is_int(value) and value >= 1 for value in ranks.values()):
        raise ValueError(f"LoRA option rank_pattern is {ranks!r}: it maps layer names to ranks of at least 1")
    alphas = options.get("alpha_pattern") or {}
    if not isinstance(alphas, Mapping) or not all(_is_positive(value) for value in alphas.values()):
        raise ValueError(f"LoRA option alpha_pattern is {alphas!r}: it maps layer names to numbers above 0")
    init = options.get("init_lora_weights", True)
    if init is not True and init not in ("gaussian", "orthogonal"):
        name = str(init)
        reason = next((why for key, why in REFUSED_INITS.items() if name.startswith(key)), "it is unknown")
        raise ValueError(f"LoRA option init_lora_weights {init!r}: {reason}; use true, 'gaussian' or 'orthogonal'")
    odd = [value for value in (rank, *ranks.values()) if value % 2]
    if init == "orthogonal" and odd:
        raise ValueError(f"LoRA rank {odd[0]}: init_lora_weights 'orthogonal' needs an even rank, such as {odd[0] + 1}")


@dataclass(frozen=True)
class Preset:
    """Settings for at least this number of training images, and the adapters' learning rate; starting points."""

    name: str
    images: int
    settings: LoRASettings
    lr: float


PRESETS = (  # as in configs/lora/
    Preset("small", 0, LoRASettings(rank=4, alpha=32, dropout=0.1), lr=5e-4),
    Preset("medium", 2000, LoRASettings(rank=8, alpha=32, dropout=0.05), lr=5e-4),
    Preset("large", 5001, LoRASettings(rank=16, alpha=32, dropout=0.05), lr=3e-4),
)


def preset_for(images: int) -> Preset:
    """The preset for a number of training images; ValueError where it is none."""
    if not images >= 0:
        raise ValueError(f"images {images}: a number of training images is at least 0")
    return [preset for preset in PRESETS if images >= preset.images][-1]


# Finding layers ------------------------------------------------------------------------------------------------------


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """PEFT's adapted layers by their name in `module` (the name of the linear layer each one wraps)."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if getattr(layer, "adapter_layer_names", None) and hasattr(layer, "base_layer")
    }


def find_targets(module: nn.Module, settings: LoRASettings) -> list[str]:
    """Full names of the linear layers to adapt, in the module's order, whether it is adapted already or not.

    See `eomt.targets.resolve`.

    Raises:
        ValueError: a target matches nothing, there are fewer blocks than asked for, or they are in several stacks.
    """
    from eomt.targets import resolve

    return resolve(module, settings.target_modules, settings.blocks).names


def _find_targets_with_warnings(module: nn.Module, settings: LoRASettings) -> list[str]:
    from eomt.targets import PARTS, resolve

    found = resolve(module, settings.target_modules, settings.blocks)
    for layer, asked in found.fused.items():
        parts = PARTS[layer.lower()]
        others = [part for part in parts if part not in asked]
        also = f"{' and '.join(others)} {'adapts' if len(others) == 1 else 'adapt'} as well"
        effect = also if others else f"all {len(parts)} share one update of this rank"
        named = f"{', '.join(part[0] for part in parts[:-1])} and {parts[-1][0]}"
        log.warning("LoRA targets %s: %s are one fused %s layer here, so %s", ", ".join(asked), named, layer, effect)
    for parts, blocks in found.missing.items():
        log.warning(
            "LoRA target %s finds no %s in %s: name these layers as well, if there are any",
            next(target for target in settings.target_modules if target.rpartition(".")[2] == "attention"),
            " and no ".join(parts),
            " and ".join(blocks) if len(blocks) < 3 else listed(blocks, 2),
        )
    if found.left_out:
        log.warning(
            "LoRA leaves out %s: such layers of decoders, of attention to another sequence or outside of the numbered "
            "blocks are adapted where a target names their part",
            listed(found.left_out, 2),
        )
    return found.names


# Applying ------------------------------------------------------------------------------------------------------------


def import_peft() -> ModuleType:
    """The package peft; ImportError with a remedy where it is missing."""
    for name in NOT_FOR_USERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs the package peft, which cannot be imported here: pip install peft") from error
    return peft


def assert_not_adapted(module: nn.Module) -> None:
    """Call this before loading base weights: with adapters in place, `strict=False` would load nothing into them.

    Raises:
        ValueError: the module carries LoRA adapters.
    """
    if adapted := adapted_layers(module):
        names = listed(adapted)
        raise ValueError(
            f"the module already carries LoRA adapters ({names}); load weights and adapt before, only once"
        )


class Method(Protocol):
    """The part of an adapter method other than LoRA that applying uses; see `eomt.lora.methods`."""

    def config(self, settings: LoRASettings, targets: list[str]) -> PeftConfig: ...


def peft_config(settings: LoRASettings, targets: list[str]) -> PeftConfig:
    """PEFT's configuration of LoRA in the layers of these full names.

    Raises:
        ValueError: a pattern matches none of them.
    """
    for option in ("rank_pattern", "alpha_pattern"):  # PEFT ignores patterns that match nothing
        for pattern in settings.options.get(option) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                raise ValueError(f"LoRA {option} {pattern!r} matches none of the adapted layers ({listed(targets)})")
    return import_peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        **settings.options,
    )


def apply_lora(module: nn.Module, settings: LoRASettings, method: Method | None = None) -> PeftModel:
    """Adapts `module` in place: base frozen, adapters trainable and in float32, names native.

    Load the base weights before; freeze and build the optimiser after. The module is used on as before. The returned
    handle is for save_adapter and merge; keep it out of registered submodules, or the state dict holds all twice.
    Another `method` takes the place of LoRA; the targets stay.

    Raises:
        ImportError: PEFT is missing.
        ValueError: already adapted, a target or pattern matches nothing, or the method's parameters have unknown names.
    """
    from eomt.fingerprints import ADAPTER_PREFIXES, identify, is_adapter

    import_peft()
    assert_not_adapted(module)
    targets = _find_targets_with_warnings(module, settings)
    config = method.config(settings, targets) if method else peft_config(settings, targets)
    base = identify(module)
    handle = wrap(module, config, targets)
    if unknown := [name for name, p in module.named_parameters() if p.requires_grad and not is_adapter(name)]:
        handle.unload()
        raise ValueError(
            f"{type(config).__name__} trains {listed(unknown)}: parameters of an adapter are known by names that begin "
            f"with {', '.join(ADAPTER_PREFIXES)}; choose another method"
        )
    finish_adapting(module, base, settings)
    if method:
        module.adapter_method = method
    return handle


def anchored(names: Iterable[str]) -> str:
    """The pattern of these full names alone: PEFT takes names in a list for the ends of others."""
    return f"(?:{'|'.join(map(re.escape, names))})"


def wrap(module: nn.Module, config: PeftConfig, targets: Iterable[str]) -> PeftModel:
    """PEFT's handle of a module that is adapted in place, in the layers of these full names and no others."""
    config.target_modules = anchored(targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # PEFT then sets it for GPT-2's Conv1D
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # which PEFT asks for
        return import_peft().get_peft_model(module, config)


def finish_adapting(module: nn.Module, base: Identity, settings: LoRASettings | None) -> None:
    """New adapters follow the mode of their layer; the module remembers its base weights, and what was asked for."""
    for layer in adapted_layers(module).values():
        layer.train(layer.base_layer.training)
    _leave_fast_path(module)
    module.lora_base = base  # a plain attribute, as PEFT's own `peft_config`
    module.lora_settings = settings


def _leave_fast_path(module: nn.Module) -> None:
    """torch's transformer layers read the weights of their linear layers in eval mode; adapters need to be called."""
    from torch import nn

    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer) and adapted_layers(part):
            part.activation_relu_or_gelu = 0  # what torch itself asks before it takes that path
        if isinstance(part, nn.TransformerEncoder) and adapted_layers(part):
            part.use_nested_tensor = False


def listed(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
