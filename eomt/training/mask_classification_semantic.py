"""The module that users name in YAML: an EoMT for semantic segmentation, with or without LoRA, and how it trains."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from eomt.fingerprints import fingerprint
from eomt.indices import IGNORE, OUTLIER
from eomt.inference.artefacts import (
    Adapter,
    add_adapter,
    check_fingerprint,
    load_pretrained,
    precision,
    save_pretrained,
    use_adapter,
)
from eomt.inference.prediction import ImageLike, predict
from eomt.inference.windows import classify
from eomt.lora.files import BASE
from eomt.lora.merging import cast_base
from eomt.models.checkpoint import load_checkpoint
from eomt.models.eomt import EoMT
from eomt.models.vit import ViT
from eomt.settings.model import check_same_settings, check_values
from eomt.training.index_check import check_start
from eomt.training.mask_classification_loss import MaskClassificationLoss
from eomt.training.optimizer import build_optimizer, build_scheduler
from eomt.training.outlier_loss import OutlierLoss, OutlierLossName
from eomt.training.schedules import LRSchedule, mask_probability, resolve_annealing
from lora_config import LoRASettings, apply_lora

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

Part = Literal["backbone", "queries", "class_head", "mask_head", "upscale"]
Head = Literal["linear", "arcface"]


class MaskClassificationSemantic(lightning.LightningModule):
    """EoMT for semantic segmentation.

    Args:
        img_size: (height, width) of training crops and evaluation windows, multiples of `patch_size`.
        num_classes: K of the data set.
        lr: base learning rate of heads and backbone.
        use_lora: freeze the backbone and train low-rank adapters in it (see `lora_config`).
        lora_rank, lora_alpha, lora_dropout, lora_target_modules, lora_blocks, lora_options: see `LoRASettings`.
        lora_lr: learning rate of the adapters; None: `lr`.
        backbone_name, patch_size, pretrained, backbone_kwargs: see `ViT`.
        num_q, num_blocks, masked_attn_enabled: see `EoMT`.
        attn_mask_annealing_enabled: fade the attention masks out during training. None: yes, unless training starts
            from an EoMT checkpoint, which has learned to do without: then masks are off.
        attn_mask_annealing_start, attn_mask_annealing_end: when each masked block's mask starts and ends to fade, in
            steps or fractions of the run; None: evenly, as published.
        ckpt_path: EoMT weights to start from (see `load_checkpoint`).
        load_ckpt_class_head: False trains a fresh class head, for another set of classes or another `head`.
        delta_weights: `ckpt_path` holds differences to the pretrained backbone (published DINOv3 checkpoints).
        freeze: parts that do not train.
        unfreeze_last_n: of the backbone, train only the last N blocks and the final norm. Adapters take its place
            where `use_lora` is set, too.
        llrd: layer-wise learning-rate decay of the backbone; 1.0 is none.
        llrd_masked_blocks: False exempts the blocks that see the queries from it.
        weight_decay: of all but the adapters.
        lr_schedule, poly_power: decay after warm-up, see `lr_factor`.
        warmup_steps: warm-up of heads and adapters, then of the backbone, which waits for the first; in steps (int) or
            fractions of the run (float).
        head: "linear" class logits, or "arcface": cosines times `arcface_scale` (see `CosineHead`), with an angular
            margin for the known classes in the loss (see `add_margin`).
        arcface_scale, arcface_margin: of that head; the margin in radians.
        num_points .. no_object_coefficient: see `MaskClassificationLoss`.
        outlier_loss: what pixels labelled 254 train, and inliers beside them; see `OutlierLoss`. None: such labels are
            an error.
        outlier_weight, inlier_margin, outlier_margin: of that loss.
        class_weights, class_names, class_colors: K weights for the class loss; K names and RGB colours for reports.
        checkpoint_predictions: a step takes longer and keeps less; see `EoMT`.
        base_dtype: "bfloat16" keeps the frozen base of a LoRA run in half the bytes while it trains. The results are
            those of float32, which bf16-mixed rounds in every step. To predict or merge, load the saved adapter.
        compile: `torch.compile` the blocks and the upscaling.

    Raises:
        ValueError: impossible values, before anything is built where that is possible.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        num_classes: int,
        lr: float = 1e-4,
        use_lora: bool = False,
        lora_rank: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.05,
        lora_target_modules: Sequence[str] = ("attn.qkv", "attn.proj"),
        lora_blocks: int | Literal["all"] = "all",
        lora_options: Mapping[str, Any] | None = None,
        lora_lr: float | None = 3e-4,
        backbone_name: str = "vit_large_patch14_reg4_dinov2",
        patch_size: int = 16,
        pretrained: bool = True,
        backbone_kwargs: Mapping[str, Any] | None = None,
        num_q: int = 100,
        num_blocks: int = 4,
        masked_attn_enabled: bool = True,
        attn_mask_annealing_enabled: bool | None = None,
        attn_mask_annealing_start: Sequence[int | float] | None = None,
        attn_mask_annealing_end: Sequence[int | float] | None = None,
        ckpt_path: str | None = None,
        load_ckpt_class_head: bool = True,
        delta_weights: bool = False,
        head: Head = "linear",
        arcface_scale: float = 30.0,
        arcface_margin: float = 0.5,
        freeze: Sequence[Part] = (),
        unfreeze_last_n: int | None = None,
        llrd: float = 0.8,
        llrd_masked_blocks: bool = True,
        weight_decay: float = 0.05,
        lr_schedule: LRSchedule = "poly",
        poly_power: float = 0.9,
        warmup_steps: Sequence[int | float] = (0.025, 0.05),
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        mask_coefficient: float = 5.0,
        dice_coefficient: float = 5.0,
        class_coefficient: float = 2.0,
        no_object_coefficient: float = 0.1,
        outlier_loss: OutlierLossName | None = None,
        outlier_weight: float = 1.0,
        inlier_margin: float | None = None,
        outlier_margin: float | None = None,
        class_weights: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        class_colors: Sequence[Sequence[int]] | None = None,
        checkpoint_predictions: bool = False,
        base_dtype: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lora_settings = check_settings(**self.hparams)
        self.outlier_loss: OutlierLoss | None = None
        if outlier_loss:
            self.outlier_loss = OutlierLoss(outlier_loss, num_classes, outlier_weight, inlier_margin, outlier_margin)
        elif inlier_margin is not None or outlier_margin is not None:
            logger.warning("inlier_margin and outlier_margin are of outlier_loss, which is null: they do nothing")
        cosine_scale, margin = (arcface_scale, arcface_margin) if head == "arcface" else (None, 0.0)

        from_hub = pretrained and (delta_weights or not ckpt_path)  # a checkpoint replaces every weight
        encoder = ViT(img_size, patch_size, backbone_name, from_hub, backbone_kwargs)
        self.network = EoMT(
            encoder, num_classes, num_q, num_blocks, masked_attn_enabled, checkpoint_predictions, cosine_scale
        )
        if ckpt_path:  # weights before adapters: afterwards the names no longer fit
            report = load_checkpoint(self.network, ckpt_path, load_ckpt_class_head, delta_weights)
            logger.info("%s", report)
            if not self.anneals:
                self.network.attn_mask_probs.zero_()
        self.base_fingerprint = fingerprint(self.backbone) if use_lora else None
        self.lora: PeftModel | None = None
        self.adapters: dict[str, Adapter] = {}  # those not in use, and the base's heads
        self.trained_precision: str | None = None  # of the run that a saved network comes from
        if use_lora:
            if not (pretrained or ckpt_path):
                logger.warning("use_lora with pretrained=false and no ckpt_path: the frozen backbone is random")
            self.attach(apply_lora(self.backbone, self.lora_settings))
        self.freeze_parts(freeze)
        if unfreeze_last_n and use_lora:
            logger.warning(
                "use_lora and unfreeze_last_n %d: LoRA takes its place, no block is unfrozen", unfreeze_last_n
            )
        elif unfreeze_last_n:
            self.train_last_blocks(unfreeze_last_n)

        self.criterion = MaskClassificationLoss(
            num_classes,
            num_points,
            oversample_ratio,
            importance_sample_ratio,
            mask_coefficient,
            dice_coefficient,
            class_coefficient,
            no_object_coefficient,
            class_weights,
            cosine_scale or 1.0,
            margin,
            outliers=self.outlier_loss is not None,
        )
        self.cached_blocks = 0
        self.total_steps = 0
        self.validated_step: int | None = None
        self.class_pixels: dict[str, int] = {}  # of the labels that were validated on
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)
        if compile:
            for part in (*encoder.blocks, self.network.upscale):
                part.compile()

    @property
    def backbone(self) -> nn.Module:
        return self.network.encoder.backbone

    @property
    def class_names(self) -> list[str]:
        return list(self.hparams.class_names or map(str, range(self.hparams.num_classes)))

    @property
    def anneals(self) -> bool:
        """Whether the attention masks fade out during training."""
        enabled = self.hparams.attn_mask_annealing_enabled
        return self.hparams.ckpt_path is None if enabled is None else enabled

    def attach(self, lora: PeftModel) -> None:
        """Keeps PEFT's handle beside the network, not in it: as a submodule it would double the state dict."""
        self.__dict__["lora"] = lora
        self.strict_loading = False  # its checkpoints hold no frozen weights; on_load_checkpoint checks the rest

    def heads(self) -> dict[Part, nn.Module]:
        """What the network adds to the backbone."""
        network = self.network
        parts = {"queries": network.q, "class_head": network.class_head, "mask_head": network.mask_head}
        return parts | {"upscale": network.upscale}

    def trained_heads(self) -> list[nn.Module]:
        """Those of them that are meant to train."""
        return [module for part, module in self.heads().items() if part not in self.hparams.freeze]

    def freeze_parts(self, parts: Sequence[Part]) -> None:
        """Parts that do not train; adapters in the backbone do all the same."""
        modules = {"backbone": self.backbone, **self.heads()}
        adapters = {id(p) for p in self.adapter_parameters()}
        for part in parts:
            for p in modules[part].parameters():
                p.requires_grad_(id(p) in adapters)
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError(f"freeze {list(parts)} leaves nothing to train: free a part, or set use_lora=true")

    def train_last_blocks(self, count: int) -> None:
        """Freezes the backbone but for its last blocks and the final norm."""
        blocks = self.network.encoder.blocks
        if count > len(blocks):
            raise ValueError(
                f"unfreeze_last_n {count}: the backbone has {len(blocks)} blocks; leave it out to train all"
            )
        self.backbone.requires_grad_(False)
        for part in (*blocks[-count:], self.network.encoder.norm):
            part.requires_grad_(True)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What LoRA adds to the backbone."""
        return [p for name, p in self.backbone.named_parameters() if ".lora_" in name]

    # Training

    def configure_model(self) -> None:
        """Called by Lightning before it moves anything to a GPU."""
        if self.hparams.base_dtype == "bfloat16" and self.trainer.training:
            if self.trainer.precision != "bf16-mixed":
                raise ValueError(
                    f"base_dtype bfloat16 with trainer.precision {self.trainer.precision}: a base in bf16 gives the "
                    "same results under bf16-mixed only; set trainer.precision=bf16-mixed or model.base_dtype=float32"
                )
            cast_base(self.backbone, torch.bfloat16)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """images uint8 [B, 3, H, W] and label maps uint8 [B, H, W] -> the loss, summed over all predictions.

        After `train_from`, tokens [B, P + N, C] instead of images.
        """
        images, labels = batch
        if self.cached_blocks:
            predictions = self.network.predictions_from(images.float(), self.rope, self.cached_blocks)
        else:
            predictions = self.network.predictions(images / 255)
        terms = self.criterion(predictions, labels)
        if self.outlier_loss:
            terms |= self.outlier_loss(predictions[-1], labels)
        loss = sum(term.sum() for term in terms.values())
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": term[-1].detach() for name, term in terms.items()})
        return loss

    def train_from(self, depth: int) -> None:
        """Training batches hold the output of the first `depth` blocks from now on; see `TrunkCache`."""
        self.cached_blocks = depth
        height, width = self.hparams.img_size
        device = self.network.q.weight.device
        self.rope = self.network.encoder.embed(torch.zeros(1, 3, height, width, device=device))[1]

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_start(self, self.trainer.datamodule)

    def on_fit_start(self) -> None:
        self.seed = torch.initial_seed()
        self.total_steps = self.count_steps()
        if self.anneals and self.network.masked_attn_enabled:
            self.annealing = resolve_annealing(
                self.hparams.attn_mask_annealing_start,
                self.hparams.attn_mask_annealing_end,
                self.network.num_blocks,
                self.total_steps,
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # an epoch's random numbers follow from the seed alone, so that a resumed run draws the same
            epoch = self.current_epoch * self.trainer.world_size + self.global_rank
            torch.manual_seed((self.seed % 2**32 << 20) + epoch)
        if self.anneals and self.network.masked_attn_enabled:
            probs = [mask_probability(self.global_step, *span) for span in self.annealing]
            self.network.attn_mask_probs.copy_(torch.tensor(probs))

    def count_steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") or steps < 1:
            raise ValueError("the length of the run is unknown: set trainer.max_epochs or trainer.max_steps")
        return int(steps)

    def configure_optimizers(self) -> dict:
        optimizer = self.optimizer()
        scheduler = build_scheduler(optimizer, self.hparams, self.count_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer(self) -> torch.optim.AdamW:
        """For the parameters that train; see `build_optimizer`."""
        return build_optimizer(self.network, self.adapter_parameters(), self.hparams)

    # Evaluation

    def predict(self, image: ImageLike) -> Tensor:
        """Class map uint8 [H, W] of one image, on the CPU, at the image's own resolution; see `prediction.predict`."""
        return predict(self.network, image)

    def validation_step(self, batch: tuple[list[Tensor], list[Tensor]], batch_idx: int) -> None:
        """images uint8 [3, H, W] of any size and their label maps uint8 [H, W], judged at their own resolution.

        Outliers count as little as ignored pixels do.
        """
        for image, labels in zip(*batch, strict=True):
            labels = labels.masked_fill(labels == OUTLIER, IGNORE)
            self.confusion.update(classify(self.network, image)[None], labels[None])

    def on_validation_epoch_end(self) -> None:
        confusion = self.confusion.compute()  # [target, prediction]
        iou = iou_per_class(confusion)
        self.confusion.reset()
        self.class_iou = dict(zip(self.class_names, iou.tolist(), strict=True))
        self.class_pixels = dict(zip(self.class_names, confusion.sum(1).tolist(), strict=True))
        self.validated_step = self.global_step
        self.log("val/miou", iou.nanmean(), prog_bar=True)  # already summed over all processes
        self.log_dict({f"val/iou/{name}": value for name, value in self.class_iou.items() if value == value})

    # Checkpoints

    def trained_keys(self) -> set[str]:
        """State-dict keys that a LoRA run changes: trainable parameters and buffers."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return self.state_dict().keys() - frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["precision"] = precision(self)
        if self.lora is not None:
            keys = self.trained_keys()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keys}
            checkpoint["base_fingerprint"] = self.base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_settings(checkpoint.get("hyper_parameters", {}), self.hparams)
        if self.lora is None:
            return
        check_fingerprint(checkpoint.get("base_fingerprint"), self.base_fingerprint, "this checkpoint")
        wrong = self.trained_keys() ^ checkpoint["state_dict"].keys()
        if wrong:
            raise ValueError(
                f"this checkpoint does not fit the LoRA configuration: {len(wrong)} weights differ "
                f"({', '.join(sorted(wrong)[:3])}); resume with the settings it was trained with"
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes an `adapter/` folder with LoRA, otherwise a `model/` folder; see `eomt.inference.artefacts`."""
        save_pretrained(self, directory)

    @classmethod
    def from_pretrained(cls, path: str | Path, ckpt_path: str | None = None) -> MaskClassificationSemantic:
        """Restores a trained network, bit for bit, in evaluation mode.

        Args:
            path: an `adapter/` or `model/` folder, a run's folder, or its `checkpoints/best.ckpt`.
            ckpt_path: the base weights of an adapter, if they have moved since.

        Raises:
            FileNotFoundError: nothing of the kind, or its base weights are gone.
            ValueError: the base has other weights than the adapter was trained on, or weights without configuration.
        """
        return load_pretrained(cls, path, ckpt_path)

    @property
    def adapter_names(self) -> list[str]:
        """What `use_adapter` takes; the first is `default`, and `base` is there if its heads are known."""
        return [*(self.lora.peft_config if self.lora else ()), *([BASE] if BASE in self.adapters else ())]

    def add_adapter(self, directory: str | Path, name: str) -> None:
        """Loads a further adapter of the same base and classes beside those that are there; `use_adapter` switches.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: another base or other classes, or a name that is taken or impossible.
        """
        add_adapter(self, directory, name)

    def use_adapter(self, name: str) -> None:
        """Predicts, and saves, with this adapter and its heads from now on; `base` is the network without adapters.

        Adapters are frozen by it: each was trained by itself.

        Raises:
            ValueError: no such adapter.
        """
        use_adapter(self, name)


def iou_per_class(confusion: Tensor) -> Tensor:
    """Confusion counts [K, K] (target, prediction) -> IoU [K] in [0, 1], NaN for a class in neither."""
    hit = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return torch.where(union > 0, hit / union.clamp(min=1), torch.nan)


def check_settings(**settings: Any) -> LoRASettings:
    """The arguments of `MaskClassificationSemantic`, checked without building it; returns those of LoRA.

    Raises:
        ValueError: an impossible value.
    """
    bound = inspect.signature(MaskClassificationSemantic).bind(**settings)
    bound.apply_defaults()
    hp = bound.arguments
    check_values(hp)
    return LoRASettings(**{name: hp[f"lora_{name}"] for name in LoRASettings.__dataclass_fields__})
