"""The mIoU of a saved network, computed as in training."""

from typing import Any

import lightning

from eomt.training.mask_classification_semantic import MaskClassificationSemantic


def evaluate(
    module: MaskClassificationSemantic,
    datamodule: lightning.LightningDataModule,
    precision: str = "bf16-mixed",
    progress: bool = False,
) -> dict[str, Any]:
    """Validates on the data set's validation images.

    Args:
        module: a network, for example from `from_pretrained`.
        datamodule: its data; the classes must be those that the network was trained on.
        precision: as `trainer.precision` of the run, to get its number again.
        progress: show a progress bar.

    Returns:
        `miou` and `class_iou` (NaN for a class that is neither predicted nor there), from 0 to 1.

    Raises:
        ValueError: the classes differ.
    """
    names = list(datamodule.classes.names)
    if names != module.class_names:
        raise ValueError(
            f"the network knows {len(module.class_names)} classes ({', '.join(module.class_names[:3])}, ...), the data "
            f"set has {len(names)} ({', '.join(names[:3])}, ...): scores over different classes mean nothing"
        )
    trainer = lightning.Trainer(
        precision=precision,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    scores = trainer.validate(module, datamodule, verbose=False)[0]
    return {"miou": scores["val/miou"], "class_iou": module.class_iou}
