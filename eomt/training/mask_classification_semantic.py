"""The module that users name in YAML: an EoMT for semantic segmentation, with or without LoRA, and how it trains."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from eomt.fingerprints import checksums, identify, is_adapter
from eomt.indices import IGNORE, OUTLIER
from eomt.inference.artefacts import Adapter, add_adapter, load_pretrained, precision, save_pretrained, use_adapter
from eomt.inference.bases import check_base, record_base
from eomt.inference.prediction import ImageLike, predict
from eomt.inference.windows import classify
from eomt.lora.adapting import adapt
from eomt.lora.files import BASE
from eomt.lora.merging import cast_base
from eomt.lora.methods import find_method
from eomt.lora.quantised import quantise_base
from eomt.models.checkpoint import attention_heads, load_checkpoint
from eomt.models.eomt import Prediction
from eomt.settings.model import ModelSettings, Part, check_same_settings
from eomt.training.adapter_checkpoints import leave_out_frozen, put_back_frozen
from eomt.training.build import build_loss, build_network, build_outlier_loss
from eomt.training.class_scores import scores_of, tell_counted
from eomt.training.finite_steps import check_weights
from eomt.training.index_check import check_start
from eomt.training.mask_classification_loss import Loss, total
from eomt.training.optimizer import build_scheduler, fused_adamw
from eomt.training.param_groups import param_groups
from eomt.training.schedules import mask_probability, resolve_annealing

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


class MaskClassificationSemantic(lightning.LightningModule):
    """EoMT for semantic segmentation.

    Its settings are those of `ModelSettings`: YAML names them, and `hparams` keeps them all. A subclass may have
    further arguments of plain values: it hands on `*args, **settings`, and `hparams` keeps them, too.

    Args:
        *args: `img_size` and `num_classes`, if they are not given by name.
        encoder: in place of timm's; see `eomt.models.eomt.Encoder`.
        loss: in place of `MaskClassificationLoss`; see `Loss`.
        outlier_loss: a name, or a loss of one's own; see `OutlierLoss`.
        optimizer: makes the optimiser from the parameter groups of `param_groups`; None: AdamW.
        **settings: see `ModelSettings`.

    Raises:
        ValueError: impossible values, before anything is built where that is possible.
    """

    settings_type = ModelSettings

    def __init__(
        self,
        *args: Any,
        encoder: nn.Module | None = None,
        loss: Loss | None = None,
        outlier_loss: str | Callable[[Prediction, Tensor], dict[str, Tensor]] | None = None,
        optimizer: Callable[[list[dict]], torch.optim.Optimizer] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        own_outlier_loss = outlier_loss if callable(outlier_loss) else None
        named_loss = None if own_outlier_loss else outlier_loss
        self.settings = chosen = ModelSettings(*args, **settings, outlier_loss=named_loss).with_backbone()
        self.save_hyperparameters(ignore=["encoder", "loss", "outlier_loss", "optimizer"])  # those of a subclass, too
        self.save_hyperparameters({field.name: getattr(chosen, field.name) for field in fields(chosen)})
        self.outlier_loss = own_outlier_loss or build_outlier_loss(chosen)
        self.criterion = loss or build_loss(chosen, outliers=self.outlier_loss is not None)
        self.make_optimizer = optimizer or fused_adamw

        self.network = build_network(chosen, encoder)
        if chosen.ckpt_path:  # weights before adapters: afterwards the names no longer fit
            self.load_start()
        self.base = identify(self.backbone) if chosen.use_lora else None
        self.lora: PeftModel | None = None
        self.adapters: dict[str, Adapter] = {}  # those not in use, and the base's heads
        self.trained_precision: str | None = None  # of the run that a saved network comes from
        self.artefact_id: str | None = None  # of what was opened or saved last
        self.merged_from: dict[str, str | None] = {}  # ids of the adapter and the base that were merged
        self.source: str | None = None  # its place on the hub, with its commit, if it was opened from there
        self.lora_settings = chosen.lora
        self.choose_trainable()

        self.cached_blocks = 0
        self.total_steps = 0
        self.validated_step: int | None = None
        self.scored: list[float] = []  # checksums of the weights that the last validation began with
        self.class_pixels: dict[str, int] = {}  # of the labels that were validated on
        self.counted: set[str] | None = None  # classes that the last mIoU is the mean of
        self.confusion = MulticlassConfusionMatrix(chosen.num_classes, ignore_index=IGNORE, validate_args=False)
        if chosen.compile:
            self.network.compile_parts()

    @classmethod
    def setting_names(cls) -> set[str]:
        """The names of all arguments that are plain settings; those of a subclass, too."""
        own = {name for base in cls.__mro__ for name in inspect.signature(base.__init__).parameters}
        return {field.name for field in fields(cls.settings_type)} | own - {"self", "args", "kwargs", "settings"}

    def load_start(self) -> None:
        """Loads the weights that training starts from."""
        settings = self.settings
        report = load_checkpoint(
            self.network, settings.ckpt_path, settings.load_ckpt_class_head, settings.delta_weights
        )
        logger.info("%s", report)
        self.network.drawn -= set(report.loaded)
        if not self.anneals:
            self.network.attn_mask_probs.zero_()

    def choose_trainable(self) -> None:
        """Adapters, the last blocks, or all of the backbone; then freezes what the settings say."""
        settings, last = self.settings, self.settings.unfreeze_last_n or 0
        if settings.use_lora and settings.random_base:
            logger.warning("use_lora without pretrained, backbone_weights or ckpt_path: the frozen backbone is random")
        if settings.use_lora or last or "backbone" in settings.freeze:
            lora, method = (settings.lora, find_method(settings.lora_method)) if settings.use_lora else (None, None)
            norm = () if lora or not last else [self.network.encoder.norm]
            blocks = self.network.encoder.blocks
            told = bool(lora and settings.random_base)
            adapted = adapt(self.backbone, lora, last, norm, self.network, method, blocks, expect_untrained=told)
            if adapted.handle:
                self.attach(adapted.handle)
                quantise_base(self.backbone, settings.base_quantisation)
        self.freeze_heads(settings.freeze)

    @property
    def backbone(self) -> nn.Module:
        """The pretrained part, which LoRA adapts: an encoder's `backbone`, or all of it."""
        encoder = self.network.encoder
        return getattr(encoder, "backbone", encoder)

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
        """The parts that EoMT adds to the backbone."""
        network = self.network
        parts = {"queries": network.q, "class_head": network.class_head, "mask_head": network.mask_head}
        return parts | {"upscale": network.upscale}

    def trained_heads(self) -> list[nn.Module]:
        """Lists the heads that are meant to train."""
        return [module for part, module in self.heads().items() if part not in self.hparams.freeze]

    def freeze_heads(self, parts: Sequence[Part]) -> None:
        """Heads that do not train."""
        for part in set(parts) - {"backbone"}:
            self.heads()[part].requires_grad_(False)
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError(f"freeze {list(parts)} leaves nothing to train: free a part, or set use_lora=true")

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters that adapters add to the backbone."""
        return [p for name, p in self.backbone.named_parameters() if is_adapter(name)]

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
        terms = self.losses(*batch)
        loss = total(terms)
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": term[-1] for name, term in self.terms.items()})
        return loss

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the loss of a batch, each with an entry for every prediction; see `training_step`."""
        if self.cached_blocks:
            predictions = self.network.predictions_from(images.float(), self.rope, self.cached_blocks)
        else:
            predictions = self.network.predictions(images / 255)
        terms = self.criterion(predictions, labels)
        return terms | self.outlier_loss(predictions[-1], labels) if self.outlier_loss else terms

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
            self.annealing = self.annealing_of(self.total_steps)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The random numbers of a batch follow from the seed and its place alone, so that a resumed run draws the same.
        count = self.current_epoch * self.trainer.num_training_batches + batch_idx
        torch.manual_seed((self.seed % 2**32 << 31) + count * self.trainer.world_size + self.global_rank)
        if self.anneals and self.network.masked_attn_enabled:
            probs = [mask_probability(self.global_step, *span) for span in self.annealing]
            self.network.attn_mask_probs.copy_(torch.tensor(probs))

    def annealing_of(self, total_steps: int) -> list[tuple[int, int]]:
        """Returns the steps at which the mask of each masked block starts and ends to fade in a run of this length."""
        settings = self.settings
        given = (settings.attn_mask_annealing_start, settings.attn_mask_annealing_end)
        return resolve_annealing(*given, self.network.num_blocks, total_steps)

    def count_steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") or steps < 1:
            raise ValueError("the length of the run is unknown: set trainer.max_epochs or trainer.max_steps")
        return int(steps)

    def configure_optimizers(self) -> dict:
        optimizer = self.optimizer()
        scheduler = build_scheduler(optimizer, self.settings, self.count_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimiser of the parameters that train."""
        return self.make_optimizer(self.parameter_groups())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the groups of parameters that the optimiser gets; see `param_groups`."""
        settings = self.settings
        return param_groups(
            self.network,
            self.adapter_parameters(),
            lr=settings.lr,
            lora_lr=settings.lora_lr or settings.lr,
            llrd=settings.llrd,
            decay_masked_blocks=settings.llrd_masked_blocks,
            weight_decay=settings.weight_decay,
        )

    # Evaluation

    def predict(self, image: ImageLike) -> Tensor:
        """Class map uint8 [H, W] of one image, on the CPU, at the image's own resolution; see `prediction.predict`."""
        return predict(self.network, image)

    def validation_step(self, batch: tuple[list[Tensor], list[Tensor]], batch_idx: int) -> dict[str, list[Tensor]]:
        """images uint8 [3, H, W] of any size and their label maps uint8 [H, W], judged at their own resolution.

        Outliers count as little as ignored pixels do. Returns the predicted class maps uint8 [H, W].
        """
        self.scored = self.scored if batch_idx else checksums(self)
        predictions = [classify(self.network, image) for image in batch[0]]
        for prediction, labels in zip(predictions, batch[1], strict=True):
            self.confusion.update(prediction[None], labels.masked_fill(labels == OUTLIER, IGNORE)[None])
        return {"predictions": predictions}

    def score(self) -> float:
        """mIoU of the validation, over all processes; `class_iou` and `class_pixels` say it by class.

        Raises:
            ValueError: no image had a labelled pixel.
        """
        confusion = self.confusion.compute().view_as(self.confusion.confmat)  # [target, prediction], also of one class
        miou, self.class_iou, self.class_pixels = scores_of(confusion, self.class_names)
        return miou

    def on_validation_epoch_end(self) -> None:
        looks = self.trainer.sanity_checking  # at a few images, which are not those of a validation
        self.validated_step = None if looks else self.global_step
        miou = self.score() if not looks or self.confusion.compute().any() else None
        self.confusion.reset()
        if miou is not None:
            self.counted = self.counted if looks else tell_counted(self.class_iou, self.counted)
            self.log("val/miou", miou, prog_bar=True)  # already summed over all processes
            self.log_dict({f"val/iou/{name}": value for name, value in self.class_iou.items() if value == value})

    # Checkpoints

    def trained_keys(self) -> set[str]:
        """State-dict keys that a LoRA run changes: trainable parameters and buffers."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return self.state_dict().keys() - frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_weights(self)
        checkpoint |= {"precision": precision(self), "num_heads": attention_heads(self.network)}
        if self.lora is not None:
            leave_out_frozen(checkpoint, self.trained_keys())
            checkpoint |= record_base(self.base)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_settings(checkpoint.get("hyper_parameters", {}), self.hparams)
        if self.lora is None:
            return
        check_base(checkpoint, self.base, "this checkpoint")
        put_back_frozen(checkpoint, self.trained_keys(), self.state_dict())

    def save_pretrained(self, directory: str | Path) -> str:
        """Writes an `adapter/` or a `model/` folder, and returns its id; see `eomt.inference.artefacts`."""
        return save_pretrained(self, directory)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, ckpt_path: str | Path | None = None, backbone_weights: str | Path | None = None
    ) -> MaskClassificationSemantic:
        """Restores a trained network, bit for bit, in evaluation mode.

        Args:
            path: an `adapter/` or `model/` folder, a run's folder, or its `checkpoints/best.ckpt`; or a repository of
                the hub, `user/name` or `user/name@revision`.
            ckpt_path, backbone_weights: the base weights of an adapter, if they have moved since.

        Raises:
            FileNotFoundError: nothing of the kind, or its base weights are gone.
            ValueError: the base has other weights than the adapter was trained on, or weights without configuration.
        """
        return load_pretrained(cls, path, {"ckpt_path": ckpt_path, "backbone_weights": backbone_weights})

    @property
    def adapter_names(self) -> list[str]:
        """The names that `use_adapter` takes: `default` first, and `base` if its heads are known."""
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
