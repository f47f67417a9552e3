"""Adapter methods: the protocol by which one is trained, audited, saved and merged, and LoRA as the first of them.

PEFT does the adapting. A method says how PEFT is configured, and how its audit sees that it trains.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Protocol

from eomt.suggestions import did_you_mean
from lora_config import LoRASettings, adapted_layers, peft_config

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

METHODS = {"lora": "eomt.lora.methods.LoRA", "ia3": "eomt.lora.ia3.IA3"}  # by their names in YAML
PARTS = ("config", "probe", "size", "exact_at_start", "update")  # of an `AdapterMethod`


class AdapterMethod(Protocol):
    """One of PEFT's methods for linear layers, made without arguments; `update` is what must not stay 0."""

    update: str

    def config(self, settings: LoRASettings, targets: list[str]) -> PeftConfig:
        """Returns PEFT's configuration for layers of these full names; ValueError for settings without a meaning."""

    def probe(self, layer: nn.Module) -> nn.Parameter:
        """The parameter of an adapted layer whose gradient shows that the output depends on the adapter."""

    def size(self, layer: nn.Module) -> tuple[float, float]:
        """Norm of an adapted layer's update, and a bound of it, of which rounding is a small part."""

    def exact_at_start(self, settings: LoRASettings) -> bool:
        """Whether a fresh adapter changes nothing at all; False: nothing but rounding."""


class LoRA:
    """The update `scaling * B A`."""

    update = "B A"

    def config(self, settings: LoRASettings, targets: list[str]) -> PeftConfig:
        return peft_config(settings, targets)

    def probe(self, layer: nn.Module) -> nn.Parameter:
        return lora_factors(layer)[1].weight

    def size(self, layer: nn.Module) -> tuple[float, float]:
        a, b, scaling = lora_factors(layer)
        return factor_norm(a.weight, b.weight, scaling)

    def exact_at_start(self, settings: LoRASettings) -> bool:
        """B = 0 adds exactly nothing; DoRA and orthogonal factors do so up to rounding."""
        return not settings.options.get("use_dora") and settings.options.get("init_lora_weights") != "orthogonal"


def lora_factors(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, float]:
    """A [r, in], B [out, r] as linear layers, and their scaling."""
    adapter = layer.active_adapters[0]
    return layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]


def factor_norm(a: Tensor, b: Tensor, scaling: float) -> tuple[float, float]:
    """||s B A||_F and its bound s ||B||_F ||A||_F, from r x r products: ||BA||^2 = sum(B'B * AA')."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
    return scaling * square.sqrt().item(), scaling * (a.norm() * b.norm()).item()


def check_method_name(name: str) -> None:
    """Raises ValueError for what is neither the name of a method nor `module.Class`; imports nothing."""
    if not isinstance(name, str) or (name not in METHODS and "." not in name):
        raise ValueError(
            f"lora_method {name!r} is unknown: choose from {', '.join(METHODS)}, or name a class of your own, for "
            f"example mine.LoHa{did_you_mean(str(name), METHODS)}"
        )


def find_method(name: str) -> AdapterMethod:
    """The method of this name, or of a class `module.Class` whose module is imported already.

    Names come from files of other people, too: nothing of theirs is imported, and nothing but a method is called.

    Raises:
        ValueError: there is none.
    """
    check_method_name(name)
    module, _, attribute = METHODS.get(name, name).rpartition(".")
    if name in METHODS:
        importlib.import_module(module)
    if module not in sys.modules:
        raise ValueError(
            f"lora_method {name!r}: import {module} first, if you trust it; a saved network imports nothing"
        )
    kind = getattr(sys.modules[module], attribute, None)
    if not (inspect.isclass(kind) and all(hasattr(kind, part) for part in PARTS)):
        raise ValueError(
            f"lora_method {name!r} is no class with {', '.join(PARTS)}; see eomt.lora.methods.AdapterMethod"
        )
    return kind()


def import_method(name: str) -> None:
    """Imports the module of a method that the user names; `find_method` has it from then on.

    Raises:
        ValueError: it cannot be imported.
    """
    check_method_name(name)
    module = METHODS.get(name, name).rpartition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"lora_method {name!r} cannot be had: {error}; name a class as module.Class") from error


def method_of(module: nn.Module) -> AdapterMethod:
    """The method that a module was adapted with; if none is recorded, the one that PEFT names.

    Raises:
        ValueError: PEFT names one that is not in `METHODS`.
    """
    if recorded := getattr(module, "adapter_method", None):
        return recorded
    configs = [*(getattr(module, "peft_config", None) or {}).values()]
    return find_method(configs[0].peft_type.value.lower() if configs else "lora")


def update_norms(module: nn.Module) -> dict[str, float]:
    """The size of each layer's update by the adapter in use, by layer name; 0 before training."""
    method = method_of(module)
    return {name: method.size(layer)[0] for name, layer in adapted_layers(module).items() if is_in_use(layer)}


def is_in_use(layer: nn.Module) -> bool:
    """Whether the adapter in use adapts this layer."""
    return layer.active_adapters[0] in getattr(layer, layer.adapter_layer_names[0])
