"""Ends a run that a signal asks to end, with a checkpoint from which it goes on as if it had never stopped."""

import signal
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging

from eomt.fingerprints import checksums
from eomt.processes import Interrupted, Interruption


class StopOnSignal(Callback):
    """Finishes the optimiser step in progress, writes a checkpoint and raises `Interrupted`, in all processes at once.

    A validation that was due or in progress is run by the continued run, from its first image. One in which a callback
    of somebody else's has swapped the weights is run to its end before.

    Args:
        interruption: that receives the signals of this process.
        checkpoint: to write.
    """

    def __init__(self, interruption: Interruption, checkpoint: Path) -> None:
        self.interruption, self.checkpoint = interruption, checkpoint
        self.stopping = False  # the checkpoint is written, and the metrics of its step are on their way
        self.step = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step
        self.receive_signals()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.stopping:
            self.stop()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are being accumulated
        self.step = trainer.global_step
        if self.asked(trainer):
            trainer.save_checkpoint(self.checkpoint)
            self.stopping = True

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.receive_signals()
        self.trained = checksums(module)
        if self.stopping:
            self.stop_validation(trainer)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        batch_idx = args[2]
        everywhere = len(trainer.datamodule.val_set) // trainer.world_size  # some processes have one image more
        if batch_idx < everywhere and self.asked(trainer) and self.has_trained_weights(trainer, module):
            self.stop_validation(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.interruption.deferred = trainer.state.fn == "fit"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.interruption.deferred = False

    def on_exception(self, *args: Any) -> None:
        self.interruption.deferred = False

    def receive_signals(self) -> None:
        self.interruption.install()  # Lightning's handler would send SIGTERM on and wait for all processes in it
        self.interruption.deferred = True

    def asked(self, trainer: Trainer) -> bool:
        """Whether a signal has reached any of the processes."""
        received = self.interruption.signum is not None
        return trainer.strategy.reduce_boolean_decision(received, all=False)

    def has_trained_weights(self, trainer: Trainer, module: LightningModule) -> bool:
        """Puts trained weights back in whose place is an average; False where another callback has swapped them.

        A checkpoint of such weights would be one of another run: the signal waits for the end of the validation.
        """
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):
                callback.on_validation_epoch_end(trainer, module)
        return trainer.strategy.reduce_boolean_decision(checksums(module) == self.trained)

    def stop_validation(self, trainer: Trainer) -> None:
        """Stops with a checkpoint from which the validation is run again, if training goes on after it."""
        if trainer.state.fn == "fit":
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()  # as in its first step, which Lightning takes for a validation to go back to
            progress.increment_ready()
            progress.increment_started()
            trainer.save_checkpoint(self.checkpoint)
        self.stop()

    def stop(self) -> None:
        signum = self.interruption.signum or signal.SIGTERM  # another process may have received it
        stopped = Interrupted(signum, self.interruption.passed_on)
        stopped.together = True
        raise stopped
