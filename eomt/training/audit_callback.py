"""The callback that proves, in a run of any LightningModule, that its adapters train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric

from eomt.lora.audit import AuditError, LoRAAudit
from eomt.lora.parts import adapted_parts
from eomt.training.finite_steps import FiniteSteps
from lora_config import adapted_layers


class AuditAdapters(Callback):
    """Drives `LoRAAudit` through a run of any LightningModule; without adapters it does nothing.

    `Trainer(callbacks=[AuditAdapters()])` is all: the adapted parts are found, and the probe is the loss of the first
    training batch in eval mode, without logging. A run in which adapters would not train stops with an `AuditError`.

    Args:
        forward: another probe: takes the module and the first batch, and returns outputs that depend on all adapters,
            in whatever nesting. A module with manual optimisation needs one, since its `training_step` would train;
            so does one whose step keeps things elsewhere than in metrics and buffers, or has no loss for that batch.
    """

    audit: LoRAAudit | None = None

    def __init__(self, forward: Callable[[LightningModule, Any], Any] | None = None) -> None:
        self.forward = forward
        self.begun = False

    def make_audit(self, module: LightningModule) -> LoRAAudit | None:
        """The audit of a module; None if it has no adapters."""
        return LoRAAudit(module) if adapted_layers(module) else None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.audit, self.begun = self.make_audit(module), False
        self.audited_step = steps_taken(trainer)
        if self.audit and self.forward is None and not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} optimises by hand: give AuditAdapters(forward=lambda module, batch: …), a "
                "probe that returns the network's outputs"
            )

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.audit and not self.begun:
            self.begin(trainer, module, lambda: self.outputs(module, batch))

    def begin(self, trainer: Trainer, module: LightningModule, forward: Callable[[], Any]) -> None:
        """All checks that need no training step."""

        def in_run_precision() -> Any:  # the probe must not need more memory than a training step
            with trainer.precision_plugin.forward_context():
                return forward()

        self.begun = True
        self.audit.before_training(trainer.optimizers, in_run_precision, resumed=trainer.ckpt_path is not None)

    def outputs(self, module: LightningModule, batch: Any) -> Any:
        """What the probe computes of the first batch."""
        if self.forward:
            return self.forward(module, batch)
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)  # as Lightning asks
        with leaving_no_trace(module):
            outputs = module.training_step(batch, 0) if takes_index else module.training_step(batch)
        if outputs is None:
            raise AuditError(
                f"LoRA audit: {type(module).__name__}.training_step returned None for the first batch, so there is "
                "nothing to look at: give AuditAdapters(forward=lambda module, batch: …), a probe that returns the "
                "network's outputs"
            )
        return outputs

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        if self.audit and not self.audit.complete:
            self.audit.after_backward()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.audit and (step := steps_taken(trainer)) > self.audited_step:  # not after each accumulated batch
            self.audited_step = step
            self.audit.after_step(step)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.audit and self.begun:
            self.audit.at_end()  # after every `on_train_end`, in which callbacks put an average into its place


@contextmanager
def leaving_no_trace(module: LightningModule) -> Iterator[None]:
    """Nothing is logged inside; metrics and buffers are afterwards as they were before.

    Buffers of adapted parts are left alone: the audit itself proves that nothing writes to them.
    """
    adapted = {id(inner) for part in adapted_parts(module).values() for inner in part.modules()}
    buffers = [
        (part, name, buffer)
        for part in module.modules()
        if id(part) not in adapted
        for name, buffer in part.named_buffers(recurse=False)
    ]
    metrics = [
        (part, {name: deepcopy(vars(part)[name]) for name in (*part.metric_state, "_update_count", "_computed")})
        for part in module.modules()
        if isinstance(part, Metric)
    ]
    loggers = {name: (lambda *args, **kwargs: None) for name in ("log", "log_dict")}
    vars(module).update(loggers)
    for part, name, buffer in buffers:
        setattr(part, name, buffer.clone())  # the step works on copies: a gradient may need what it read
    try:
        yield
    finally:
        for name in loggers:
            del vars(module)[name]
        for metric, state in metrics:
            vars(metric).update(state)
        for part, name, buffer in buffers:
            setattr(part, name, buffer)


def steps_taken(trainer: Trainer) -> int:
    """Optimiser steps so far, without those that were skipped."""
    finite = next((callback for callback in trainer.callbacks if isinstance(callback, FiniteSteps)), None)
    return finite.steps_taken(trainer) if finite else trainer.global_step
