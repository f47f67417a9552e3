"""IA3 (https://arxiv.org/abs/2205.05638): a learned factor for each output of a layer, 1 at first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_config import LoRASettings, import_peft

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

FEEDFORWARD = ("fc2", "w3", "down_proj")  # second layers of an MLP, whose inputs are scaled: what the activation gives


class IA3:
    """Scales the outputs of the adapted layers, q, k and v of a fused `qkv` alike, and the inputs of an MLP's last."""

    update = "l - 1"

    def config(self, settings: LoRASettings, targets: list[str]) -> PeftConfig:
        if settings.options:
            raise ValueError(f"lora_options {dict(settings.options)}: IA3 has none; leave them out")
        feedforward = [name for name in targets if name.rpartition(".")[2] in FEEDFORWARD]
        return import_peft().IA3Config(target_modules=targets, feedforward_modules=feedforward)

    def probe(self, layer: nn.Module) -> nn.Parameter:
        return layer.ia3_l[layer.active_adapters[0]]

    def size(self, layer: nn.Module) -> tuple[float, float]:
        """||l - 1|| and ||l||: how far the factors are from changing nothing."""
        factors = self.probe(layer).detach().cpu().double()
        return (factors - 1).norm().item(), factors.norm().item()

    def exact_at_start(self, settings: LoRASettings) -> bool:
        return True
