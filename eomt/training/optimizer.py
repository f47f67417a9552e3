"""The optimiser of a run, and the schedule of its learning rates."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from eomt.models.eomt import EoMT
from eomt.training.param_groups import param_groups
from eomt.training.schedules import lr_factor, resolve_warmup


def build_optimizer(network: EoMT, adapters: Collection[nn.Parameter], hp: Mapping[str, Any]) -> torch.optim.AdamW:
    """For the trainable parameters, in few groups: a kernel call each, and not several a tensor.

    Args:
        adapters: those of the parameters that LoRA added.
        hp: arguments of `MaskClassificationSemantic`, by name.
    """
    lora_lr = hp["lora_lr"] or hp["lr"]
    groups = param_groups(
        network, adapters, hp["lr"], lora_lr, hp["llrd"], hp["llrd_masked_blocks"], hp["weight_decay"]
    )
    optimizer = torch.optim.AdamW(groups, fused=True)
    optimizer._step_supports_amp_scaling = False  # else Lightning clips no gradients under autocast
    return optimizer


def build_scheduler(optimizer: torch.optim.Optimizer, hp: Mapping[str, Any], total_steps: int) -> LambdaLR:
    """Warm-up of heads and adapters, then of the backbone, and decay; see `lr_factor`.

    Raises:
        ValueError: the warm-up does not end within the run.
    """
    heads, backbone = resolve_warmup(hp["warmup_steps"], total_steps)

    def schedule(start: int, warmup: int) -> Callable[[int], float]:
        return lambda step: lr_factor(step, total_steps, start, warmup, hp["lr_schedule"], hp["poly_power"])

    waits = {"backbone": schedule(heads, backbone), "heads": schedule(0, heads), "lora": schedule(0, heads)}
    return LambdaLR(optimizer, [waits[group["kind"]] for group in optimizer.param_groups])
