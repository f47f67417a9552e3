"""Pictures of what the network sees while it trains."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from eomt.files import Tolerated
from eomt.training.callbacks import SaveBest
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

Row = tuple[Tensor, Tensor, Tensor]  # image uint8 [3, H, W]; labels and prediction uint8 [H, W]


class SamplePictures(Callback):
    """Every few epochs: image, target and prediction of some validation images, in `samples/` and the loggers.

    The predictions are those that were scored. `kept.png` shows those of the network that `SaveBest` keeps.

    Args:
        directory: where the PNG files go.
        every_n_epochs: how often; 0 never.
        num_images: rows of a picture, spread over the images that the first process validates.
    """

    def __init__(self, directory: str | Path, every_n_epochs: int = 10, num_images: int = 4) -> None:
        self.directory, self.every_n_epochs, self.num_images = Path(directory), every_n_epochs, num_images
        self.tolerated = Tolerated("samples/")
        self.rows: list[Row] = []
        self.chosen: set[int] = set()  # batches

    def on_validation_start(self, trainer: Trainer, module: MaskClassificationSemantic) -> None:
        count = int(sum(trainer.num_val_batches))
        places = torch.linspace(0, count - 1, min(self.num_images, count)).round().int().tolist()
        self.rows, self.chosen = [], set(places) if self.every_n_epochs and trainer.is_global_zero else set()

    def on_validation_batch_end(
        self, trainer: Trainer, module: MaskClassificationSemantic, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx in self.chosen and outputs:  # a module of somebody else's may return nothing
            shown = (batch[0][0], batch[1][0], outputs["predictions"][0])
            self.rows.append(tuple(tensor.cpu() for tensor in shown))

    def on_validation_end(self, trainer: Trainer, module: MaskClassificationSemantic) -> None:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        last = trainer.should_stop or trainer.global_step >= module.total_steps
        if not self.rows or trainer.sanity_checking:
            return
        title = f"step {trainer.global_step}, mIoU {100 * float(trainer.callback_metrics['val/miou']):.2f}"
        savers = [callback for callback in trainer.callbacks if isinstance(callback, SaveBest)]
        if any(saver.best.get("step") == trainer.global_step for saver in savers):
            self.draw(trainer, "kept", f"{title}: the network that is kept")
        if due or last:
            self.draw(trainer, f"epoch_{trainer.current_epoch:04d}_step_{trainer.global_step:06d}", title)

    def draw(self, trainer: Trainer, name: str, title: str) -> None:
        """Writes and logs the picture."""
        from eomt.reporting.pictures import prediction_picture

        path = self.directory / f"{name}.png"
        with self.tolerated:
            prediction_picture(self.rows, trainer.datamodule.val_set.classes, path, title=title)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):  # TensorBoard and wandb
                    logger.log_image("kept" if name == "kept" else "samples", [str(path)], step=trainer.global_step)
