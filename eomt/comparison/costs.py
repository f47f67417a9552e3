"""Seconds and memory of a comparison from runs of their own, which had the machine for themselves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from eomt.comparison.differences import machine_name
from eomt.comparison.facts import what_trains
from eomt.comparison.runs import Run

MEASURED = ("seconds_per_step", "peak_memory", "wall_seconds")  # what other work on the machine changes, in a summary


def with_costs_of(runs: Sequence[Run], measured: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Gives each run the seconds per step and the peak memory of a measured run of its variant.

    The wall time is left out: a measured run may be shorter. A run without steps has no costs, unless one of its
    variant was measured.

    Returns:
        The runs, and the measured ones that were used.

    Raises:
        ValueError: no run of a variant was measured, or one does something else in a step.
    """
    by_variant = {run.variant: run for run in reversed(measured) if run.error is None}
    given = [replace(run, summary=run.summary | _costs(run, by_variant.get(run.variant))) for run in runs]
    return given, [by_variant[name] for name in dict.fromkeys(run.variant for run in runs) if name in by_variant]


def costs_words(used: Sequence[Run]) -> str:
    """A sentence for the report that says where the costs are from."""
    steps = sorted({run.steps for run in used if run.steps})
    machines = ", ".join(dict.fromkeys(machine_name(run.summary.get("machine")) for run in used))
    length = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    return f"Seconds and memory are from other runs of these variants, of {length} steps, on {machines}."


def _costs(run: Run, measured: Run | None) -> dict[str, Any]:
    if run.error is not None:
        return {}
    nothing = dict.fromkeys(MEASURED)
    if measured is None:
        if run.steps:
            raise ValueError(f"--costs holds no finished run of {run.variant}: measure it, too, or leave --costs out")
        return nothing
    for name, value, other in zip(STEP, _step(run), _step(measured), strict=True):
        if value != other:
            raise ValueError(
                f"--costs: {measured.path} has {name} {other}, {run.path} has {value}: their steps cost something else"
            )
    return nothing | {key: measured.summary.get(key) for key in MEASURED if key != "wall_seconds"}


STEP = ("training of", "images per step", "crops of", "precision", "trainable parameters")


def _step(run: Run) -> tuple[Any, ...]:
    """What a step's time and memory depend on, in the order of STEP."""
    model, trainer = run.config.get("model") or {}, run.config.get("trainer") or {}
    return what_trains(run), run.images_per_step, model.get("img_size"), trainer.get("precision"), run.trainable
