"""Steps whose loss, logits or gradients are not finite are skipped, recorded, and end the run where they go on."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from eomt.command_line import RunError
from eomt.files import Tolerated, write_json
from eomt.models.finite import check_finite

logger = logging.getLogger(__name__)

RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # buffers that a forward pass in training moves


class Batch(NamedTuple):
    """One of the batches of an optimiser step: its place in the epoch, its loss, and the loss's terms [L] by name."""

    index: int
    loss: Tensor
    logits_finite: bool
    terms: dict[str, Tensor]


class FiniteSteps(Callback):
    """Skips a step whose loss, logits or gradients are not finite.

    Weights, running statistics and the optimiser stay as they were. It counts as a step all the same, for schedules and
    the length of the run. In `failures/` each process leaves a file that says which images and seeds its batches were
    made of. Under 16-mixed, gradients that overflow because their loss is scaled up are no failure: the scaler skips
    such a step and lowers its scale, and `overflows` counts them.

    Args:
        directory: the run's folder.
        limit: skipped steps in a row that end the run.
        lr, precision: what the user calls these settings.
    """

    def __init__(
        self, directory: str | Path, limit: int = 10, lr: str = "model.lr", precision: str = "trainer.precision"
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit {limit}: a run goes on after fewer skipped steps than that, so at least 1")
        self.lr, self.precision = lr, precision
        self.folder, self.limit = Path(directory) / "failures", limit
        self.skipped = self.overflows = self.in_a_row = 0
        self.first: str | None = None  # file of the first step in this row
        self.batches: list[Batch] = []  # of the step so far
        self.statistics: list[tuple[Tensor, Tensor]] = []  # running ones, and what they were before the step
        self.tolerated = Tolerated("failures/")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        buffers = (buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in RUNNING)
        self.statistics = [(buffer, buffer.clone()) for buffer in buffers]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch_idx = batch_idx
        if not self.batches:  # the first of a step
            self.statistics = [(buffer, before.copy_(buffer)) for buffer, before in self.statistics]

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        # a loss or a module of somebody else's may not say more than its loss
        logits_finite = getattr(getattr(module, "criterion", None), "finite_logits", True)
        self.batches.append(Batch(self.batch_idx, loss.detach(), logits_finite, getattr(module, "terms", {})))

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        batches, self.batches = self.batches, []
        if not batches:  # a `training_step` that returned no loss
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        reason = find_reason(trainer, batches, norm)
        if reason is None:
            self.in_a_row = 0
            return
        optimizer.zero_grad(set_to_none=True)  # optimisers pass over parameters without a gradient
        for buffer, before in self.statistics:
            buffer.copy_(before)
        if reason == "gradient" and scaled_up(trainer):
            self.overflows += 1
            return
        check_weights(module, self.lr)  # no later step could be better
        self.skipped += 1
        file = self.record(trainer, module, reason, batches, norm)
        self.first = self.first if self.in_a_row else str(file)
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise RunError(
                f"{self.in_a_row} steps in a row had a {reason} that is not finite (the limit is {self.limit}): "
                f"{self.first} names the images of the first; lower {self.lr}, or set {self.precision}=32-true, now "
                f"it is {trainer.precision}"
            )

    def record(
        self, trainer: Trainer, module: LightningModule, reason: str, batches: list[Batch], norm: Tensor
    ) -> Path:
        """Writes all that is needed to make the batches of a skipped step again, and returns the file."""
        path = self.folder / f"step_{trainer.global_step:06d}_process_{trainer.global_rank}.json"
        items = getattr(trainer.datamodule, "batch_items", None)  # somebody else's data may not say
        facts = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "process": trainer.global_rank,
            "reason": reason,
            "gradient_norm": number(norm),
            "seed": getattr(module, "seed", torch.initial_seed()),  # somebody else's module keeps none
            "batches": [
                {
                    "batch": batch.index,
                    "logits_finite": batch.logits_finite,
                    "terms": {name: [number(value) for value in term] for name, term in batch.terms.items()},
                    "images": items(batch.index) if items else None,
                }
                for batch in batches
            ],
        }
        with self.tolerated:
            write_json(path, facts)
        if not rank_zero_only.rank:
            logger.warning("step %d is skipped, its %s is not finite: see %s", trainer.global_step, reason, path)
        return path

    def steps_taken(self, trainer: Trainer) -> int:
        """The optimiser steps that were not skipped."""
        return trainer.global_step - self.skipped - self.overflows

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        check_weights(module, self.lr)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        check_weights(module, self.lr)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("skipped", "overflows", "in_a_row", "first")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def find_reason(trainer: Trainer, batches: list[Batch], norm: Tensor) -> str | None:
    """Which of a step's numbers are not finite, in any process; None if all are. Waits for the device once."""
    losses = torch.stack([batch.loss for batch in batches]).isfinite().all()
    logits = torch.tensor(all(batch.logits_finite for batch in batches), device=losses.device)
    wrong = ~torch.stack([logits, losses, norm.isfinite().to(losses.device)])
    wrong = trainer.strategy.reduce(wrong.float(), reduce_op="sum").tolist()
    return next((name for name, here in zip(("logit", "loss", "gradient"), wrong, strict=True) if here), None)


def scaled_up(trainer: Trainer) -> bool:
    """Whether the loss is multiplied for 16-mixed, so that its gradients may overflow where their own values do not."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1


def check_weights(module: LightningModule, lr: str = "model.lr") -> None:
    """Raises ValueError where a weight is not finite: such a network is neither scored nor saved."""
    remedy = f"lower {lr} and go on from an earlier checkpoint"
    check_finite(module.state_dict(), f"after step {module.global_step}", remedy)


def number(value: Tensor) -> float | str:
    """A number as JSON can hold it: `nan` and `inf` as words."""
    return value.item() if value.isfinite() else str(value.item())
