"""LoRA on any torch module: settings, applying, reporting, saving, loading and merging.

Low-rank adaptation (https://arxiv.org/abs/2106.09685) keeps a linear layer's weight W [out, in] frozen and trains an
update `scaling * B A`, with A [r, in] and B [out, r]. PEFT (https://github.com/huggingface/peft) does the adapting and
is imported only when LoRA is asked for. What it does not do is tell you that the adapters train: `lora_audit` does.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # PEFT's own names
BASE = "base"  # in place of an adapter's name: none of them

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


@dataclass(frozen=True)
class LoRASettings:
    """What to adapt and how. Everything is checked here, before any model is built and without importing PEFT.

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
        if not isinstance(self.alpha, (int, float)) or isinstance(self.alpha, bool) or not self.alpha > 0:
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
    """PEFT's LoRA layers by their name in `module` (the name of the linear layer each one wraps)."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) and hasattr(layer, "base_layer")
    }


def is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _linear_names(module: nn.Module) -> list[str]:
    """Names of the linear layers, as they were before adaptation too."""
    names = (n for n, m in module.named_modules() if n and isinstance(m, nn.Linear) and not is_lora(n))
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


def _peft() -> ModuleType:
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


def apply_lora(module: nn.Module, settings: LoRASettings) -> PeftModel:
    """Adapts `module` in place: base frozen, adapters trainable and in float32, names native.

    Load the base weights before; freeze and build the optimiser after. The module is used on as before. The returned
    handle is for save_adapter and merge; keep it out of registered submodules, or the state dict holds all twice.

    Raises:
        ImportError: PEFT is missing.
        ValueError: already adapted, or a target or pattern matches nothing.
    """
    peft = _peft()
    assert_not_adapted(module)
    targets, fused = _resolve_targets(module, settings)
    for option in ("rank_pattern", "alpha_pattern"):  # PEFT ignores patterns that match nothing
        for pattern in settings.options.get(option) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                raise ValueError(f"LoRA {option} {pattern!r} matches none of the adapted layers ({listed(targets)})")
    if fused:
        log.warning("LoRA targets %s: q, k and v are one fused qkv layer here, so all three adapt", ", ".join(fused))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        **settings.options,
    )
    hashes = tensor_hashes(module)
    handle = peft.get_peft_model(module, config)
    _settle(module, hashes)
    return handle


def _settle(module: nn.Module, hashes: Mapping[str, str]) -> None:
    """New adapters follow the mode of their layer, and the module remembers which base weights they belong to."""
    for layer in adapted_layers(module).values():
        layer.train(layer.base_layer.training)
    module.lora_base_hashes = hashes  # a plain attribute, as PEFT's own `peft_config`


def cast_base(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts the frozen linear layers and convolutions: fewer bytes, and what autocast to `dtype` computes anyway.

    The module still belongs to the base it was loaded with; `lora_audit` expects the converted weights from here on.

    Raises:
        ValueError: the base was changed after the adapters were applied.
    """
    if tensor_hashes(module) != module.lora_base_hashes:
        raise ValueError("base weights changed after the adapters were applied; load weights before apply_lora")
    for layer in module.modules():
        weights = list(layer.parameters(recurse=False))
        if isinstance(layer, nn.Linear | nn.Conv2d) and not any(p.requires_grad for p in weights):
            layer.to(dtype)
    module.lora_cast_hashes = tensor_hashes(module)


def update_norms(module: nn.Module) -> dict[str, float]:
    """Frobenius norm of `scaling * B A` of each layer that the adapter in use adapts, by name; 0 before training."""
    return {
        name: update_norm(layer)[0]
        for name, layer in adapted_layers(module).items()
        if layer.active_adapters[0] in layer.lora_A
    }


def stored_updates(
    state: Mapping[str, Tensor],
    alpha: float,
    use_rslora: bool = False,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """What `update_norms` says of a loaded adapter, from its tensors alone: `rank`, `scaling` and `norm` by layer.

    Args:
        state: the tensors of an adapter file or of a state dict, under their names there.
        alpha, use_rslora, alpha_pattern: as the adapter was configured.
    """
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        if found := re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", key):
            factors[found[1]][found[2]] = tensor
    updates = {}
    for name, pair in factors.items():
        rank = pair["A"].shape[0]
        own = (value for pattern, value in (alpha_pattern or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
        scaling = next(own, alpha) / (rank**0.5 if use_rslora else rank)
        norm = factor_norm(pair["A"], pair["B"], scaling)[0]
        updates[name] = {"rank": rank, "scaling": scaling, "norm": norm}
    return updates


def lora_factors(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, float]:
    """A [r, in], B [out, r] as linear layers, and their scaling."""
    adapter = layer.active_adapters[0]
    return layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]


def update_norm(layer: nn.Module) -> tuple[float, float]:
    """||s B A||_F and its upper bound s ||B||_F ||A||_F, from r x r products: ||BA||^2 = sum(B'B * AA')."""
    a, b, scaling = lora_factors(layer)
    return factor_norm(a.weight, b.weight, scaling)


def factor_norm(a: Tensor, b: Tensor, scaling: float) -> tuple[float, float]:
    """`update_norm` of A [r, in] and B [out, r] themselves."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
    return scaling * square.sqrt().item(), scaling * (a.norm() * b.norm()).item()


# Reporting -----------------------------------------------------------------------------------------------------------


def tensor_hashes(module: nn.Module) -> dict[str, str]:
    """SHA-256 of each base tensor (parameters and persistent buffers), by its name before adaptation."""
    return hash_tensors(base_tensors(module))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of the base tensors: the same before and after adaptation."""
    return combine_hashes(tensor_hashes(module))


def combine_hashes(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers but the adapters, under their names before adaptation."""
    state = module.state_dict(keep_vars=True)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not is_lora(name)
    }


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter lock
        return dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))


def _hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.is_meta:  # no bytes there
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def trainable_report(module: nn.Module, title: str = "TRAINABLE PARAMETERS (LoRA)") -> str:
    """The trainable tensors, one line per group of equal shape and equal name but for numbers, and the totals."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[str, ...]]] = defaultdict(list)
    for name, p in module.named_parameters():
        if p.requires_grad:
            name = name.replace(".base_layer.", ".")
            name = re.sub(r"(\.lora_\w+)\.\w+(\.weight)?$", r"\1", name)  # lora_A.default.weight
            numbers = tuple(part for part in name.split(".") if part.isdigit())
            groups[re.sub(r"(?<![^.])\d+(?![^.])", "#", name), tuple(p.shape)].append(numbers)
    rows = []
    for (pattern, shape), numbers in groups.items():
        name = pattern.replace("#", "%s") % tuple(_span(column) for column in zip(*numbers, strict=True))
        size = len(numbers) * torch.Size(shape).numel()
        rows.append((name, f"{len(numbers)} x {list(shape)}" if len(numbers) > 1 else str(list(shape)), f"{size:,}"))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    share = 100 * trainable / max(total, 1)
    totals = [f"Total trainable: {trainable:,}", f"Total frozen: {total - trainable:,}"]
    return "\n".join([title, *lines, *totals, f"SUMMARY: {share:.2f}% trainable"])


def _span(numbers: Iterable[str]) -> str:
    """("0", "1", "2") -> "{0..2}", ("0", "2") -> "{0,2}", ("4", "4") -> "4"."""
    values = sorted({int(number) for number in numbers})
    if len(values) == 1:
        return str(values[0])
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"


def listed(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


# Saving, loading, merging --------------------------------------------------------------------------------------------


def save_adapter(handle: PeftModel, directory: str | Path) -> None:
    """Writes PEFT's `adapter_config.json` and `adapter_model.safetensors`, with the base's fingerprint as metadata.

    Of several adapters, the one in use. In a run of several processes, call it from one.

    Raises:
        ValueError: none is in use.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = _adapter_in_use(handle)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in _adapter_state(handle, name).items()}
    hashes = getattr(handle.get_base_model(), "lora_base_hashes", None)
    metadata = {"format": "pt"} | ({"base_fingerprint": combine_hashes(hashes)} if hashes else {})
    save_file(state, directory / WEIGHTS_FILE, metadata=metadata)
    config = copy.copy(handle.peft_config[name])
    config.target_modules, config.inference_mode = sorted(config.target_modules), True
    config.save_pretrained(str(directory))


def _adapter_state(handle: PeftModel, name: str) -> dict[str, Tensor]:
    """One adapter's tensors under their names in a file; older PEFT takes `day2` for a part of `day`."""
    own = {key: t for key, t in handle.state_dict().items() if is_lora(key) and name in key.split(".")}
    return _peft().get_peft_model_state_dict(handle, own, adapter_name=name, save_embedding_layers=False)


def load_adapter(module: nn.Module, directory: str | Path, is_trainable: bool = False) -> PeftModel:
    """Adapts `module` in place with a saved adapter, and returns the handle as apply_lora does.

    Without `is_trainable` the adapters are frozen and the module is put in eval mode, as PEFT does it.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: already adapted, the adapter was trained on other base weights, or its tensors do not fit.
    """
    assert_not_adapted(module)
    hashes = tensor_hashes(module)
    saved = _check_adapter(directory, hashes)
    handle = _peft().PeftModel.from_pretrained(module, str(directory), is_trainable=is_trainable, torch_device="cpu")
    if wrong := _misfit(handle, "default", saved):
        handle.unload()
        raise ValueError(f"the adapter in {directory} {wrong}")
    _settle(module, hashes)
    return handle


def _check_adapter(directory: str | Path, hashes: Mapping[str, str]) -> set[str]:
    """The names of an adapter's tensors, if it was trained on the base of these hashes."""
    from safetensors import safe_open

    directory = Path(directory)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory / file} is missing: give the folder that save_adapter wrote")
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
        saved, metadata = set(file.keys()), file.metadata() or {}
    trained_on, here = metadata.get("base_fingerprint"), combine_hashes(hashes)
    if trained_on not in (None, here):
        raise ValueError(
            f"the adapter in {directory} was trained on other base weights (fingerprint {trained_on[:12]}, here "
            f"{here[:12]}): first load the base weights it was trained on, at the same sizes and precision"
        )
    return saved


def _misfit(handle: PeftModel, name: str, saved: set[str]) -> str | None:
    """What PEFT passes over in silence: tensors that are in the file alone, or in the module alone."""
    expected = set(_adapter_state(handle, name))
    if saved == expected:
        return None
    return (
        f"does not fit this module (missing: {listed(sorted(expected - saved)) or 'none'}; unexpected: "
        f"{listed(sorted(saved - expected)) or 'none'}): load it on the network it was trained with"
    )


def add_adapter(handle: PeftModel, directory: str | Path, name: str) -> None:
    """Loads a further adapter of the same base beside those of `handle`; `use_adapter` switches to it.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: the name is taken or impossible, the adapter was trained on other base weights, or does not fit.
    """
    module = handle.get_base_model()
    if name in handle.peft_config:
        raise ValueError(f"adapter name {name!r} is taken (there are {listed(handle.peft_config)}): choose another")
    reserved = {part for key in module.state_dict() for part in key.split(".")} | {BASE, *dir(nn.ModuleDict)}
    if name in reserved or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or is_lora(name):
        raise ValueError(
            f"adapter name {name!r}: letters, digits and _, a letter first, and no word that torch or the network's "
            "layers use; for example 'night'"
        )
    hashes = getattr(module, "lora_base_hashes", None) or tensor_hashes(module)
    saved = _check_adapter(directory, hashes)
    was_base = active_adapter(handle) == BASE
    was_training = {layer: layer.training for layer in module.modules()}
    handle.load_adapter(str(directory), adapter_name=name, torch_device="cpu")
    for layer, training in was_training.items():  # PEFT puts all in evaluation mode
        layer.training = training
    if wrong := _misfit(handle, name, saved):
        handle.delete_adapter(name)
        raise ValueError(f"the adapter in {directory} {wrong}")
    _settle(module, hashes)
    if was_base:  # layers that are new here are not
        handle.base_model.disable_adapter_layers()


def use_adapter(handle: PeftModel, name: str) -> None:
    """Switches to one of several adapters, or to none (`base`); all are frozen from then on.

    Raises:
        ValueError: no such adapter.
    """
    if name not in (*handle.peft_config, BASE):
        raise ValueError(f"there is no adapter {name!r}: there are {listed([*handle.peft_config, BASE])}")
    if name == BASE:
        handle.base_model.disable_adapter_layers()
    else:
        handle.base_model.enable_adapter_layers()
        handle.set_adapter(name)
    for parameter_name, p in handle.named_parameters():
        if is_lora(parameter_name):
            p.requires_grad_(False)


def active_adapter(handle: PeftModel) -> str:
    """The name of the adapter in use, or `base`."""
    layers = adapted_layers(handle.get_base_model()).values()
    return BASE if all(layer.disable_adapters for layer in layers) else handle.active_adapter


def _adapter_in_use(handle: PeftModel) -> str:
    name = active_adapter(handle)
    if name == BASE:
        raise ValueError(f"no adapter is in use: first call use_adapter with one of {listed(handle.peft_config)}")
    return name


def merge(handle: PeftModel) -> nn.Module:
    """Adds the updates to the base weights, in float32, and returns the plain module with its original keys.

    The whole module becomes float32, since rounding a small update into bfloat16 weights loses part of it; cast it
    down afterwards if that loss is acceptable. The parameters stay frozen. Of several adapters, the one in use is
    merged and the others are lost.

    Raises:
        ValueError: no adapter is in use, or the base was rounded by `cast_base`.
    """
    _adapter_in_use(handle)
    if hasattr(handle.base_model.model, "lora_cast_hashes"):
        raise ValueError(
            "the base was rounded to bfloat16 for training: load the saved adapter on its base, and merge that"
        )
    module = handle.float().base_model.merge_and_unload(safe_merge=True)
    if hasattr(module, "lora_base_hashes"):
        del module.lora_base_hashes
    return module
