"""The mIoU of a saved network, computed as in training, and what it is made of: confusion counts of every image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from eomt.command_line import memory_explained
from eomt.files import replacing_files, write_json
from eomt.inference.prediction import need_less
from eomt.settings.formats import EVALUATION, stamped
from eomt.training.class_scores import iou_per_class
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


@dataclass
class Evaluation:
    """Scores of a network on a data set's validation images.

    `confusion` is [N, K, K]: for each image, pixels by target (row) and prediction (column), ignored ones left out.
    """

    confusion: Tensor
    facts: dict[str, Any]

    @property
    def iou(self) -> Tensor:
        """[K] in [0, 1] over all images; NaN for a class that is neither predicted nor there."""
        return iou_per_class(self.confusion.sum(0))

    @property
    def miou(self) -> float:
        return self.iou.nanmean().item()

    @property
    def class_iou(self) -> dict[str, float]:
        return dict(zip(self.facts["classes"], self.iou.tolist(), strict=True))

    def save(self, directory: str | Path, name: str) -> None:
        """Writes `NAME.json`, and the counts of every image to `NAME.npz`."""
        class_iou = {name: None if iou != iou else iou for name, iou in self.class_iou.items()}
        counted = sum(iou is not None for iou in class_iou.values())
        facts = {"domain": name, "miou": self.miou, "miou_classes": counted, "class_iou": class_iou, **self.facts}
        with replacing_files(directory) as draft:  # neither without the other
            np.savez_compressed(draft / f"{name}.npz", confusion=self.confusion.numpy())
            write_json(draft / f"{name}.json", stamped(EVALUATION, facts))


class ImageConfusions(lightning.Callback):
    """Keeps the confusion counts of each validation image apart."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.total: Tensor | int = 0

    def on_validation_batch_end(self, trainer: lightning.Trainer, module: MaskClassificationSemantic, *_: Any) -> None:
        total = module.confusion.confmat.cpu().clone()
        self.images.append(total - self.total)
        self.total = total


def evaluate(
    module: MaskClassificationSemantic,
    datamodule: lightning.LightningDataModule,
    precision: str = "bf16-mixed",
    accelerator: str = "auto",
    progress: bool = False,
    description: str = "",
) -> Evaluation:
    """Validates on the data set's validation images.

    Args:
        module: a network, for example from `from_pretrained`.
        datamodule: its data; the classes must be those that the network was trained on.
        precision, accelerator: as in the `trainer` of the run, to get its number again.
        progress: show a progress bar.
        description: what the data are, for the records.

    Raises:
        ValueError: the classes differ, no pixel is labelled, or the network's outputs are not finite.
        RunError: memory ran out.
    """
    classes = datamodule.classes
    if list(classes.names) != module.class_names:
        raise ValueError(
            f"the network knows {len(module.class_names)} classes ({', '.join(module.class_names[:3])}, ...), the data "
            f"set has {len(classes)} ({', '.join(classes.names[:3])}, ...): scores over different classes mean nothing"
        )
    counts = ImageConfusions()
    torch.set_float32_matmul_precision("high")  # as in training
    trainer = lightning.Trainer(
        precision=precision,
        accelerator=accelerator,
        devices=1,
        callbacks=[counts],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    with memory_explained(lambda: need_less(module.hparams.img_size, precision)):
        trainer.validate(module, datamodule, verbose=False)
    facts = {
        "description": description,
        "classes": list(classes.names),
        "class_colors": [list(color) for color in classes.colors],
        "images": datamodule.val_set.names,
        "sequences": datamodule.val_set.sequences,
        "data": datamodule.val_set.fingerprint(),
        "img_size": list(module.hparams.img_size),
        "precision": precision,
        "artefact_id": module.artefact_id,
    }
    return Evaluation(torch.stack(counts.images), facts)
