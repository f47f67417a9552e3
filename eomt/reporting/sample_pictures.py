"""Pictures of what the network sees while it trains."""

from pathlib import Path

import torch
from lightning import Callback, Trainer

from eomt.files import Tolerated
from eomt.inference.windows import classify
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


class SamplePictures(Callback):
    """Every few epochs: image, target and prediction of the first validation images, in `samples/` and the loggers.

    Args:
        directory: where the PNG files go.
        every_n_epochs: how often; 0 never.
        num_images: rows of a picture.
    """

    def __init__(self, directory: str | Path, every_n_epochs: int = 10, num_images: int = 4) -> None:
        self.directory, self.every_n_epochs, self.num_images = Path(directory), every_n_epochs, num_images
        self.tolerated = Tolerated("samples/")

    def on_validation_end(self, trainer: Trainer, module: MaskClassificationSemantic) -> None:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        last = self.every_n_epochs and (trainer.should_stop or trainer.global_step >= module.total_steps)
        if trainer.is_global_zero and (due or last) and not trainer.sanity_checking:
            self.draw(trainer, module)

    def draw(self, trainer: Trainer, module: MaskClassificationSemantic) -> None:
        """Predicts for images spread over the validation set, and writes and logs the picture."""
        from eomt.reporting.pictures import prediction_picture

        dataset = trainer.datamodule.val_set
        rows = []
        for i in torch.linspace(0, len(dataset) - 1, min(self.num_images, len(dataset))).round().int().tolist():
            image, labels = dataset[i]
            with trainer.precision_plugin.forward_context():
                prediction = classify(module.network, image.to(module.device)).cpu()
            rows.append((image, labels, prediction))
        path = self.directory / f"epoch_{trainer.current_epoch:04d}_step_{trainer.global_step:06d}.png"
        with self.tolerated:
            prediction_picture(rows, dataset.classes, path, title=f"step {trainer.global_step}")
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):  # wandb
                    logger.log_image("samples", [str(path)])
