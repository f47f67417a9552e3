"""The optimiser of a run, and the schedule of its learning rates."""

from collections.abc import Callable
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from eomt.settings.model import OptimizerSettings
from eomt.training.schedules import lr_factor, resolve_warmup


def fused_adamw(groups: list[dict]) -> torch.optim.AdamW:
    """AdamW in few groups: a kernel call each, and not several a tensor."""
    optimizer = torch.optim.AdamW(groups, fused=True)
    optimizer._step_supports_amp_scaling = False  # else Lightning clips no gradients under autocast
    return optimizer


def build_scheduler(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, total_steps: int) -> LambdaLR:
    """Warm-up of heads and adapters, then of the backbone, and decay; see `lr_factor`.

    Raises:
        ValueError: the warm-up does not end within the run.
    """
    heads, backbone = resolve_warmup(settings.warmup_steps, total_steps)

    def schedule(start: int, warmup: int) -> Callable[[int], float]:
        return partial(
            lr_factor,
            total_steps=total_steps,
            start=start,
            warmup=warmup,
            schedule=settings.lr_schedule,
            power=settings.poly_power,
        )

    waits = {"backbone": schedule(heads, backbone), "heads": schedule(0, heads), "lora": schedule(0, heads)}
    return LambdaLR(optimizer, [waits[group["kind"]] for group in optimizer.param_groups])
