"""Parameter groups for the optimiser: adapters with a learning rate of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from eomt.fingerprints import is_adapter


def parameter_groups(
    network: nn.Module,
    lr: float,
    lora_lr: float | None = None,
    weight_decay: float = 0.0,
    backbone_rates: Mapping[int, float] | None = None,
    adapters: Collection[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of any network in few groups: one for each kind, learning rate and weight decay.

    Adapters have the rate `lora_lr` and no weight decay. `kind` is "lora", "heads" or, for the parameters in
    `backbone_rates` ({id(parameter): learning rate}), "backbone". `adapters` None: those that PEFT's names tell.
    """
    backbone_rates = backbone_rates or {}
    if adapters is None:
        adapters = [p for name, p in network.named_parameters() if is_adapter(name)]
    adapter_ids = {id(p) for p in adapters}
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for p in network.parameters():
        if not p.requires_grad:
            continue
        if id(p) in adapter_ids:
            key = ("lora", lr if lora_lr is None else lora_lr, 0.0)
        elif id(p) in backbone_rates:
            key = ("backbone", backbone_rates[id(p)], weight_decay)
        else:
            key = ("heads", lr, weight_decay)
        groups.setdefault(key, []).append(p)
    return [
        {"params": params, "kind": kind, "lr": rate, "weight_decay": decay}
        for (kind, rate, decay), params in groups.items()
    ]
