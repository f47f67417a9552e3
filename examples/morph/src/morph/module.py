"""The detector: a ViT pretrained by masking, with or without LoRA, and a head of two classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from eomt.fingerprints import Identity, identify
from eomt.lora.adapting import Adapted, adapt, load_adapted
from eomt.lora.groups import parameter_groups
from eomt.models.vit import ViT
from eomt.training.adapter_checkpoints import leave_out_frozen, put_back_frozen
from eomt.training.schedules import lr_factor
from morph.metrics import detection_metrics
from morph.settings import Settings


class MorphDetector(LightningModule):
    """Logits [B, 2], bona fide and morph, of pictures [B, 3, H, W] in [0, 1].

    Args:
        settings: of the run.
        base: the file of weights to start from; None: timm's, or random ones, as `settings.weights` says.
        adapter: a folder with a saved adapter to take in the place of a fresh one.

    Raises:
        ValueError: weights or adapter do not fit. ConnectionError: timm's weights could not be had.
    """

    def __init__(self, settings: Settings, base: str | Path | None = None, adapter: str | Path | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.save_hyperparameters(dataclasses.asdict(settings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # random weights are those of the seed, also where they are made again
            self.encoder = build_encoder(settings, base)
            width = self.encoder.embed_dim
            self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, 2))
            self.base = identify(self.encoder.backbone)
            self.adapted = self._adapt(adapter)
        self.scores: list[tuple[Tensor, Tensor]] = []

    def _adapt(self, adapter: str | Path | None) -> Adapted | None:
        """What trains in the backbone; None: all of it."""
        s = self.settings
        if s.freeze_strategy == "none":
            return None
        if adapter:
            return load_adapted(self.encoder.backbone, adapter)
        return adapt(self.encoder.backbone, s.lora(), s.unfreeze_last_n, network=self)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder.backbone.forward_features(self.encoder.normalize(images))  # [B, prefix + N, C]
        return self.head(tokens[:, self.encoder.num_prefix_tokens :].mean(1))

    def score(self, images: Tensor) -> Tensor:
        """How sure it is of a morph [B], the difference of the logits."""
        logits = self(images).float()
        return logits[:, 1] - logits[:, 0]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout of a batch follows from the seed and its place alone, so that a resumed run draws the same.
        torch.manual_seed((self.settings.seed % 2**32 << 31) + self.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self.score(images)
        self.scores.append((scores.cpu(), labels.cpu()))
        self.log("val/loss", F.binary_cross_entropy_with_logits(scores, labels.float()), batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        scores, labels = (torch.cat(part) for part in zip(*self.scores, strict=True))
        self.scores.clear()
        if (eer := detection_metrics(scores, labels)["d_eer"]) is not None:
            self.log("val/d_eer", eer, prog_bar=True)

    def groups(self) -> list[dict[str, Any]]:
        """What trains, for the optimiser: head, adapters and the backbone's own weights at rates of their own."""
        s = self.settings
        rates = {id(p): s.backbone_lr for p in self.encoder.parameters()}
        return parameter_groups(self, s.lr, s.lora_lr, s.weight_decay, rates)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.groups())
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.settings.warmup * steps)
        schedule = LambdaLR(optimizer, lambda step: lr_factor(step, steps, 0, warmup, "cosine"))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Files -----------------------------------------------------------------------------------------------------------

    def trained_state(self) -> dict[str, Tensor]:
        """The tensors that the base weights do not say: what trains, and the head's statistics."""
        trains = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: t for k, t in self.state_dict().items() if k in trains or k.startswith("head.")}

    def base_record(self) -> dict[str, Any]:
        """What says which base weights these are, for files."""
        return {"exact": self.base.exact, **self.base.as_dict()}

    def check_base(self, record: Mapping[str, Any] | None, place: str) -> None:
        """Raises ValueError where what `place` names was trained on other base weights."""
        known = Identity.from_dict((record or {}).get("exact"), record)
        if difference := known.difference(self.base):
            raise ValueError(
                f"{place} was trained on other base weights than weights={self.settings.weights} ({difference}): give "
                "those as weights=FILE"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        leave_out_frozen(checkpoint, self.trained_state().keys())
        checkpoint["base"] = self.base_record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_base(checkpoint.get("base"), "the checkpoint")
        put_back_frozen(checkpoint, self.trained_state().keys(), self.state_dict())


def build_encoder(settings: Settings, base: str | Path | None) -> ViT:
    """The ViT with its base weights: those of the file, timm's, or random ones.

    Raises:
        ValueError: the file holds others. ConnectionError: timm's could not be had.
    """
    s = settings
    if base is None and s.weights not in ("hub", "none"):
        raise ValueError(f"weights {s.weights} are in a file: give what `base_weights(settings)` returns as base")
    size, from_hub = (s.img_size, s.img_size), s.weights == "hub"
    try:
        return ViT(size, s.patch_size, s.backbone_name, from_hub, s.backbone_kwargs, weights=base)
    except ConnectionError as error:
        raise ConnectionError(
            f"weights=hub: timm's {s.backbone_name} could not be had ({type(error.__cause__).__name__}); connect to "
            "the hub, or give weights=FILE, or weights=none for random ones"
        ) from error
