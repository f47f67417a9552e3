"""Learning-rate and attention-mask schedules, as functions of the step."""

import math
from collections.abc import Sequence

from eomt.settings.model import LRSchedule, check_length


def resolve_steps(name: str, value: int | float, total_steps: int) -> int:
    """A length in steps: an int is a number of steps, a float from 0.0 to 1.0 a fraction of the run.

    Raises:
        ValueError: a negative length, or a float above 1.
    """
    check_length(name, value)
    return round(value * total_steps) if isinstance(value, float) else value


def resolve_warmup(warmup_steps: Sequence[int | float], total_steps: int) -> tuple[int, int]:
    """The two warm-up lengths in steps; together they must be shorter than the run."""
    if len(warmup_steps) != 2:
        raise ValueError(f"warmup_steps {list(warmup_steps)}: two lengths are needed, of the heads and of the backbone")
    heads, backbone = (resolve_steps("warmup_steps", value, total_steps) for value in warmup_steps)
    if heads + backbone >= total_steps:
        raise ValueError(
            f"warmup_steps {heads} + {backbone} do not end within the run of {total_steps} steps: the full rate "
            "would never be reached; shorten them, or give fractions of the run such as [0.025, 0.05]"
        )
    return heads, backbone


def lr_factor(
    step: int, total_steps: int, start: int, warmup: int, schedule: LRSchedule = "poly", power: float = 0.9
) -> float:
    """Share of the base learning rate at `step`: zero before `start`, linear over `warmup` steps, then decay to zero.

    Polynomial decay is (1 - progress) ** power, as in the published recipe; cosine is (1 + cos(pi * progress)) / 2.
    """
    if step < start:
        return 0.0
    if step < start + warmup:
        return (step - start) / warmup
    progress = min((step - start - warmup) / max(total_steps - start - warmup, 1), 1.0)
    return (1 - progress) ** power if schedule == "poly" else (1 + math.cos(math.pi * progress)) / 2


def mask_probability(step: int, start: int, end: int, power: float = 0.9) -> float:
    """Probability that a query attends within its mask: 1 until `start`, then polynomially down to 0 at `end`."""
    if step < start:
        return 1.0
    if step >= end:
        return 0.0
    return (1 - (step - start) / (end - start)) ** power


def default_annealing(num_blocks: int) -> tuple[list[float], list[float]]:
    """Fractions of the run at which the mask of each masked block starts and ends to fade, first block first.

    As published: starts lie evenly from 1/6 to 4/6, each fade lasts 1/6, and the last sixth trains what is deployed, a
    network without masks. Nothing is published for one block; its fade stands in the middle, from 5/12 to 7/12.
    """
    if num_blocks == 1:
        return [5 / 12], [7 / 12]
    starts = [(1 + 3 * i / (num_blocks - 1)) / 6 for i in range(num_blocks)]
    return starts, [start + 1 / 6 for start in starts]


def resolve_annealing(
    starts: Sequence[int | float] | None, ends: Sequence[int | float] | None, num_blocks: int, total_steps: int
) -> list[tuple[int, int]]:
    """The steps at which each block's mask starts and ends to fade; None: `default_annealing`.

    Raises:
        ValueError: it does not end within the run.
    """
    default_starts, default_ends = default_annealing(num_blocks)
    spans = [
        tuple(resolve_steps("attn_mask_annealing", value, total_steps) for value in span)
        for span in zip(starts or default_starts, ends or default_ends, strict=True)
    ]
    if late := [span for span in spans if span[1] > total_steps or span[0] > span[1]]:
        raise ValueError(
            f"attn_mask_annealing from step {late[0][0]} to {late[0][1]} does not end within the run of "
            f"{total_steps} steps: the deployed network has no masks; give fractions of the run"
        )
    return spans
