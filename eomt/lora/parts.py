"""The parts of a network that carry adapters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from eomt.lora.methods import method_of
from lora_config import LoRASettings, adapted_layers


@dataclass
class AuditedPart:
    """A module that was adapted: what was asked for, and the layers that carry adapters, by their names in messages."""

    module: nn.Module
    settings: LoRASettings | None
    prefix: str
    fingerprint: str | None

    def __post_init__(self) -> None:
        self.layers = {f"{self.prefix}{name}": layer for name, layer in adapted_layers(self.module).items()}
        self.method = method_of(self.module)


def parts_to_audit(
    network: nn.Module, adapted: nn.Module | None, settings: LoRASettings | None, fingerprint: str | None
) -> list[AuditedPart]:
    """The adapted parts of a network; `settings` and `fingerprint` are those of `adapted`, or of all without it."""
    inside = set() if adapted is None else {id(module) for module in adapted.modules()}
    modules = {name: module for name, module in adapted_parts(network).items() if id(module) not in inside}
    if adapted is not None:
        places = {id(module): name for name, module in network.named_modules()}
        modules[places.get(id(adapted), "")] = adapted
    parts = []
    for name, module in modules.items():
        own = getattr(module, "lora_settings", None)
        is_meant = adapted is None or module is adapted
        prefix = f"{name}." if name and len(modules) > 1 else ""
        parts.append(
            AuditedPart(module, (settings or own) if is_meant else own, prefix, fingerprint if is_meant else None)
        )
    return parts


def adapted_parts(network: nn.Module) -> dict[str, nn.Module]:
    """The modules in a network that apply_lora or load_adapter adapted, by name."""
    return {name: module for name, module in network.named_modules() if "lora_base" in vars(module)}
