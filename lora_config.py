"""LoRA on any torch module: settings from YAML, and applying them.

Low-rank adaptation (https://arxiv.org/abs/2106.09685) keeps a linear layer's weight W [out, in] frozen and trains an
update `scaling * B A`, with A [r, in] and B [out, r]. PEFT (https://github.com/huggingface/peft) does the adapting and
is imported only when LoRA is asked for, and torch only then: settings are checked without. `eomt.lora` has the rest of
an adapter's life: the proof that it trains, files, merging.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

    from eomt.fingerprints import Identity

log = logging.getLogger(__name__)

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
        target_modules: names of linear layers, matched by their dotted ending: "qkv", "attn.proj", "fc1".
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


# Finding layers ------------------------------------------------------------------------------------------------------


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """PEFT's adapted layers by their name in `module` (the name of the linear layer each one wraps)."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if getattr(layer, "adapter_layer_names", None) and hasattr(layer, "base_layer")
    }


def _linear_names(module: nn.Module) -> list[str]:
    """Names of the linear layers, as they were before adaptation too."""
    from torch import nn

    from eomt.fingerprints import is_adapter

    names = (n for n, m in module.named_modules() if n and isinstance(m, nn.Linear) and not is_adapter(n))
    return [name.removesuffix(".base_layer") for name in names]


def _numbered_blocks(linear_names: Iterable[str]) -> list[str]:
    """Prefixes of the network's blocks, in order: `blocks.0`, `blocks.1`, …

    A block is a numbered component that holds at least two of the linear layers; of several such sequences the longest
    is taken, and the outermost of equally long ones. Stages are counted through (`layers.0.blocks.1`). No sequence of
    two or more: no blocks.
    """
    sequences: dict[str, Counter[str]] = defaultdict(Counter)
    for name in linear_names:
        parts = name.split(".")
        for depth, part in enumerate(parts[:-1]):
            if part.isdigit():
                kind = ".".join("#" if p.isdigit() else p for p in parts[:depth])
                sequences[kind][".".join(parts[: depth + 1])] += 1
    blocks = [[prefix for prefix, linears in sequence.items() if linears > 1] for sequence in sequences.values()]
    longest = max(blocks, key=lambda s: (len(s), -s[0].count(".") if s else 0), default=[])
    return longest if len(longest) > 1 else []


def _candidates(linear_names: list[str], blocks: int | str) -> list[str]:
    prefixes = _numbered_blocks(linear_names)
    if blocks != "all":
        if blocks > len(prefixes):
            raise ValueError(
                f"LoRA blocks {blocks}: the module has {len(prefixes)} numbered blocks; use 'all' or fewer"
            )
        prefixes = prefixes[-blocks:]
    return [n for n in linear_names if n.startswith(tuple(p + "." for p in prefixes))] if prefixes else linear_names


def _resolve_targets(module: nn.Module, settings: LoRASettings) -> tuple[list[str], list[str]]:
    """The layers to adapt, and those targets among q_proj, k_proj, v_proj that were found only as a fused qkv."""
    names = _candidates(_linear_names(module), settings.blocks)
    found, fused = set(), []
    for target in settings.target_modules:
        matches = {name for name in names if f".{name}".endswith(f".{target}")}
        if not matches and re.search(r"(^|\.)[qkv]_proj$", target):
            whole = re.sub(r"[qkv]_proj$", "qkv", target)
            matches = {name for name in names if f".{name}".endswith(f".{whole}")}
            fused += [target] if matches else []
        if not matches:
            there = sorted({re.sub(r"^.*\d+\.", "", name) for name in names})
            raise ValueError(f"LoRA target {target!r} matches no linear layer; there are {', '.join(there) or 'none'}")
        found |= matches
    return [name for name in names if name in found], fused


def find_targets(module: nn.Module, settings: LoRASettings) -> list[str]:
    """Full names of the linear layers to adapt, in the module's order, whether it is adapted already or not.

    If the module has numbered blocks, only layers inside the chosen blocks count, so `proj` means `attn.proj` and never
    `patch_embed.proj`. `q_proj`, `k_proj`, `v_proj` mean the fused `qkv` where there is no layer of their own.

    Raises:
        ValueError: a target matches nothing, or there are fewer blocks than asked for.
    """
    return _resolve_targets(module, settings)[0]


# Applying ------------------------------------------------------------------------------------------------------------


def import_peft() -> ModuleType:
    """The package peft; ImportError with a remedy where it is missing."""
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

    peft = import_peft()
    assert_not_adapted(module)
    targets, fused = _resolve_targets(module, settings)
    if fused:
        log.warning("LoRA targets %s: q, k and v are one fused qkv layer here, so all three adapt", ", ".join(fused))
    config = method.config(settings, targets) if method else peft_config(settings, targets)
    base = identify(module)
    handle = peft.get_peft_model(module, config)
    if unknown := [name for name, p in module.named_parameters() if p.requires_grad and not is_adapter(name)]:
        handle.unload()
        raise ValueError(
            f"{type(config).__name__} trains {listed(unknown)}: parameters of an adapter are known by names that begin "
            f"with {', '.join(ADAPTER_PREFIXES)}; choose another method"
        )
    finish_adapting(module, base)
    if method:
        module.adapter_method = method
    return handle


def finish_adapting(module: nn.Module, base: Identity) -> None:
    """New adapters follow the mode of their layer, and the module remembers which base weights they belong to."""
    for layer in adapted_layers(module).values():
        layer.train(layer.base_layer.training)
    module.lora_base = base  # a plain attribute, as PEFT's own `peft_config`


def listed(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
