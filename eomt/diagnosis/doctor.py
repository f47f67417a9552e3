"""Looks for the faults that leave a run looking fine: facts of what it left, and checks that are functions of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from eomt.diagnosis.checks import (
    Finding,
    check_adapter_updates,
    check_anomaly_scores,
    check_checkpoint_keys,
    check_evaluation_classes,
    check_gradients,
    check_label_indices,
    check_lora_audit,
    check_mask_annealing,
    check_normalisation,
    check_sizes,
    check_trainable_parameters,
    check_trained_weights,
)
from eomt.diagnosis.facts import NothingToCheck, RunFacts
from eomt.inference.saved import bare_weights

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule


def diagnose(
    path: str | Path,
    run: str | Path,
    data: SegmentationDataModule | None = None,
    no_data: str = "none given",
    ckpt_path: str | Path | None = None,
) -> dict[str, Finding]:
    """Runs every check on the files that a run left, and returns the findings by name.

    Args:
        path: an adapter/ or model/ folder, a run's folder, a Lightning checkpoint or a file of weights.
        run: the run's folder, with `summary.json`, `config.yaml`, `checkpoints/`, `evaluation/` and `anomaly/`, as far
            as they are there.
        data: of the run, to look at images and labels; None: scenes are drawn, and labels are not looked at.
        no_data: why there are none.
        ckpt_path: the weights that the run started from, if they have moved.

    Raises:
        FileNotFoundError: neither weights nor a run are there, or nothing at `ckpt_path`.
        ValueError: weights that cannot be read.
    """
    run_facts = RunFacts(Path(path), Path(run), data, no_data, ckpt_path)
    if run_facts.content.get("plain"):
        raise ValueError(bare_weights(Path(path)))
    facts: dict[Callable[..., Finding], Callable[[], tuple]] = {
        check_adapter_updates: run_facts.updates,
        check_lora_audit: run_facts.audit,
        check_trainable_parameters: run_facts.parameters,
        check_trained_weights: run_facts.trained_weights,
        check_gradients: run_facts.gradients,
        check_checkpoint_keys: run_facts.keys,
        check_sizes: run_facts.sizes,
        check_normalisation: run_facts.pixels,
        check_label_indices: run_facts.labels,
        check_mask_annealing: run_facts.annealing,
        check_evaluation_classes: run_facts.classes,
        check_anomaly_scores: run_facts.scores,
    }
    return {_name_of(check): _attempt(check, gather) for check, gather in facts.items()}


def _name_of(check: Callable[..., Finding]) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")


def _attempt(check: Callable[..., Finding], gather: Callable[[], tuple]) -> Finding:
    """The check on its facts; what cannot be read or is wrong in itself is a fault, with its own sentence."""
    try:
        return check(*gather())
    except NothingToCheck as why:
        return Finding(None, str(why))
    except (ValueError, OSError) as error:
        return Finding(False, str(error))
