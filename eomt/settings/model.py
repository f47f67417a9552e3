"""The settings of `MaskClassificationSemantic`, each with its default and its rule; torch is not needed to check them.

`ModelSettings` is what YAML and saved networks hold: flat names. The groups that it consists of are handed to what they
are settings of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

from eomt.indices import IGNORE
from eomt.lora.methods import METHODS, check_method_name
from eomt.settings.backbone_choice import check_backbone_weights, check_no_backbone, choose_backbone
from eomt.settings.formats import refuse_exported
from eomt.settings.hub import check_ckpt_path, local_path, pinned
from eomt.settings.start import taken_over
from lora_config import LoRASettings

Part = Literal["backbone", "queries", "class_head", "mask_head", "upscale"]
Head = Literal["linear", "arcface"]
OutlierLossName = Literal["rba", "mask2anomaly"]
LRSchedule = Literal["poly", "cosine"]
CHANGEABLE = {
    "ckpt_path",
    "backbone_weights",
    "delta_weights",
    "compile",
    "checkpoint_predictions",
    "base_dtype",
}  # where a run is continued


def check_img_size(img_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Returns (height, width), or raises ValueError naming the nearest valid size.

    The patch grid must be whole, otherwise border pixels would silently belong to no token.
    """
    if len(img_size) != 2:
        raise ValueError(f"img_size {list(img_size)}: two numbers are needed, [height, width]")
    if patch_size < 1:
        raise ValueError(f"patch_size {patch_size}: must be at least 1")
    height, width = img_size
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        valid = f"[{_nearest_multiple(height, patch_size)}, {_nearest_multiple(width, patch_size)}]"
        raise ValueError(
            f"img_size [{height}, {width}]: both sides must be multiples of patch_size {patch_size}; try {valid}"
        )
    return height, width


def _nearest_multiple(size: int, step: int) -> int:
    return max(step, step * round(size / step))


def check_length(name: str, value: int | float) -> None:
    """Raises ValueError for a negative length in steps (int), or a fraction of the run (float) that is none."""
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError(f"{name} {value}: a fraction of the run is from 0.0 to 1.0; give whole steps as an integer")
    if value < 0:
        raise ValueError(f"{name} {value}: a length cannot be negative")


class Checked:
    """Settings that are checked where they are made: each group adds its rules to `check`."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ValueError for an impossible value; FileNotFoundError for a file that is not there."""
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{field.name} {value}: a number is meant, nan and inf are none")

    def not_negative(self, *names: str) -> None:
        """Raises ValueError where a setting is below 0."""
        for name in names:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: cannot be negative")

    def positive(self, *names: str) -> None:
        """Raises ValueError where a setting that is given is not above 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value}: must be greater than 0")

    def chosen(self, name: str, choices: Iterable[Any]) -> None:
        """Raises ValueError where a setting is none of the choices."""
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} {getattr(self, name)!r}: choose from {', '.join(map(str, choices))}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Any:
        """The settings of this group, out of flat ones; an object that YAML describes is no setting."""
        names = [field.name for field in fields(cls) if field.name in settings]
        described = [name for name in names if isinstance(settings[name], Mapping) and "_target_" in settings[name]]
        return cls(**{name: settings[name] for name in names if name not in described})


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Checked):
    """LoRA under the names of the flat settings; see `LoRASettings`. `lora_lr` is the adapters' rate; None: `lr`.

    `lora_method` puts another method in the place of LoRA: a name in `eomt.lora.methods.METHODS`, or `module.Class`.
    """

    use_lora: bool = False
    lora_method: str = "lora"
    lora_rank: int = LoRASettings.rank
    lora_alpha: float = LoRASettings.alpha
    lora_dropout: float = LoRASettings.dropout
    lora_target_modules: Sequence[str] = LoRASettings.target_modules
    lora_blocks: int | Literal["all"] = LoRASettings.blocks
    lora_options: Mapping[str, Any] | None = None
    lora_lr: float | None = 3e-4

    @property
    def lora(self) -> LoRASettings:
        """The settings for `apply_lora`."""
        return LoRASettings(**{field.name: getattr(self, f"lora_{field.name}") for field in fields(LoRASettings)})

    def check(self) -> None:
        """See `Checked.check`."""
        super().check()
        self.positive("lora_lr")
        check_method_name(self.lora_method)
        _ = self.lora  # which checks itself


@dataclass(frozen=True, kw_only=True)
class LossSettings(Checked):
    """See `MaskClassificationLoss`."""

    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    mask_coefficient: float = 5.0
    dice_coefficient: float = 5.0
    class_coefficient: float = 2.0
    no_object_coefficient: float = 0.1

    def check(self) -> None:
        """See `Checked.check`."""
        super().check()
        self.positive("num_points", "no_object_coefficient")
        terms = ("mask_coefficient", "dice_coefficient", "class_coefficient")
        self.not_negative(*terms)
        if not any(getattr(self, name) for name in terms):
            raise ValueError("mask_coefficient, dice_coefficient and class_coefficient are 0: nothing would train")
        if not 0 <= self.importance_sample_ratio <= 1:
            raise ValueError(f"importance_sample_ratio {self.importance_sample_ratio}: a share of the points, 0 to 1")
        if self.oversample_ratio < 1:
            raise ValueError(f"oversample_ratio {self.oversample_ratio}: candidates per point, at least 1")


@dataclass(frozen=True, kw_only=True)
class OutlierSettings(Checked):
    """The loss on pixels labelled 254 and on inliers; see `OutlierLoss`. None: such labels are an error."""

    outlier_loss: OutlierLossName | None = None
    outlier_weight: float = 1.0
    inlier_margin: float | None = None
    outlier_margin: float | None = None

    def check(self) -> None:
        """See `Checked.check`."""
        super().check()
        self.positive("outlier_weight")
        self.chosen("outlier_loss", (None, "rba", "mask2anomaly"))


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Checked):
    """Learning rates and decay.

    Args:
        lr: base learning rate of heads and backbone.
        llrd: layer-wise learning-rate decay of the backbone; 1.0 is none.
        llrd_masked_blocks: False exempts the blocks that see the queries from it.
        weight_decay: of all but the adapters.
        lr_schedule, poly_power: decay after warm-up, see `lr_factor`.
        warmup_steps: warm-up of heads and adapters, then of the backbone, which waits for the first; in steps (int) or
            fractions of the run (float).
    """

    lr: float = 1e-4
    llrd: float = 0.8
    llrd_masked_blocks: bool = True
    weight_decay: float = 0.05
    lr_schedule: LRSchedule = "poly"
    poly_power: float = 0.9
    warmup_steps: Sequence[int | float] = (0.025, 0.05)

    def check(self) -> None:
        """See `Checked.check`."""
        super().check()
        self.positive("lr", "llrd", "poly_power")
        if self.llrd > 1:
            raise ValueError(f"llrd {self.llrd}: a decay per block lies between 0 and 1; 1.0 is none")
        self.not_negative("weight_decay")
        if len(self.warmup_steps) != 2:
            raise ValueError(
                f"warmup_steps {list(self.warmup_steps)}: two lengths are needed, of the heads and of the backbone"
            )
        for length in self.warmup_steps:
            check_length("warmup_steps", length)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Checked):
    """Encoder, queries and class head.

    Args:
        backbone_name: see `ViT`; None: what `backbone_weights` tells, or else `DEFAULT_BACKBONE`.
        patch_size, pretrained, backbone_kwargs: see `ViT`.
        backbone_weights: a file with a plain backbone, in the place of `pretrained`; see `read_backbone_file`.
        num_q, num_blocks, masked_attn_enabled: see `EoMT`.
        attn_mask_annealing_enabled: fade the attention masks out during training. None: yes, unless training starts
            from an EoMT checkpoint, which has learned to do without: then masks are off.
        attn_mask_annealing_start, attn_mask_annealing_end: when each masked block's mask starts and ends to fade, in
            steps or fractions of the run; None: the published shares of the run, see `default_annealing`.
        head: "linear" class logits, or "arcface": cosines times `arcface_scale` (see `CosineHead`), with an angular
            margin for the known classes in the loss (see `add_margin`).
        arcface_scale, arcface_margin: of that head; the margin in radians.
    """

    backbone_name: str | None = None
    patch_size: int = 16
    pretrained: bool = True
    backbone_weights: str | None = None
    backbone_kwargs: Mapping[str, Any] | None = None
    num_q: int = 100
    num_blocks: int = 4
    masked_attn_enabled: bool = True
    attn_mask_annealing_enabled: bool | None = None
    attn_mask_annealing_start: Sequence[int | float] | None = None
    attn_mask_annealing_end: Sequence[int | float] | None = None
    head: Head = "linear"
    arcface_scale: float = 30.0
    arcface_margin: float = 0.5

    @property
    def cosine_scale(self) -> float | None:
        """The scale of the class logits; None for a linear head."""
        return self.arcface_scale if self.head == "arcface" else None

    def check(self) -> None:
        """See `Checked.check`."""
        super().check()
        self.positive("num_q", "num_blocks", "arcface_scale")
        if self.backbone_weights:
            check_backbone_weights(self.backbone_weights, self.backbone_name, self.backbone_kwargs)
        self.chosen("head", ("linear", "arcface"))
        for name in ("attn_mask_annealing_start", "attn_mask_annealing_end"):
            for length in getattr(self, name) or ():
                check_length(name, length)
        if not 0 <= self.arcface_margin < math.pi / 2:
            raise ValueError(f"arcface_margin {self.arcface_margin}: an angle in radians, from 0 up to pi / 2 (1.57)")


@dataclass(frozen=True)
class ModelSettings(NetworkSettings, AdapterSettings, OptimizerSettings, LossSettings, OutlierSettings):
    """All settings of `MaskClassificationSemantic`, flat.

    Args:
        img_size: (height, width) of training crops and evaluation windows, multiples of `patch_size`.
        num_classes: K of the data set.
        ckpt_path: EoMT weights to start from (see `load_checkpoint`): a path, or `hf://user/name@revision/file`.
        load_ckpt_class_head: False trains a fresh class head, for another set of classes or another `head`; the number
            of queries is then that of `ckpt_path`, see `taken_over`.
        delta_weights: `ckpt_path` holds differences to the pretrained backbone (published DINOv3 checkpoints), which
            `pretrained` or `backbone_weights` gives;
            None: as the file says.
        freeze: parts that do not train.
        unfreeze_last_n: of the backbone, train only the last N blocks and the final norm. Adapters take its place
            where `use_lora` is set, too.
        class_weights, class_names, class_colors: K weights for the class loss; K names and RGB colours for reports.
        checkpoint_predictions: a step takes longer and keeps less; see `EoMT`.
        base_dtype: "bfloat16" keeps the frozen base of a LoRA run in half the bytes while it trains. The results are
            those of float32, which bf16-mixed rounds in every step. To predict or merge, load the saved adapter.
        base_quantisation: "8bit" or "4bit" keeps the linear layers of the frozen base of a LoRA run in that many bits,
            by bitsandbytes; the network that is trained, scored and saved is the one with the rounded weights.
        compile: `torch.compile` the blocks and the upscaling.

    Raises:
        ValueError: an impossible value. FileNotFoundError: `ckpt_path` or `backbone_weights` is not there.
    """

    img_size: Sequence[int]
    num_classes: int
    ckpt_path: str | None = None
    load_ckpt_class_head: bool = True
    delta_weights: bool | None = None
    freeze: Sequence[Part] = ()
    unfreeze_last_n: int | None = None
    class_weights: Sequence[float] | None = None
    class_names: Sequence[str] | None = None
    class_colors: Sequence[Sequence[int]] | None = None
    checkpoint_predictions: bool = False
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    base_quantisation: Literal["8bit", "4bit"] | None = None
    compile: bool = False

    def check(self) -> None:
        """See `Checked.check`."""
        check_img_size(self.img_size, self.patch_size)
        check_ckpt_path(self.ckpt_path)
        if self.ckpt_path:
            refuse_exported(local_path(self.ckpt_path))
            check_no_backbone(self.ckpt_path)
        super().check()
        self.positive("num_classes", "unfreeze_last_n")
        if self.num_classes >= IGNORE:
            raise ValueError(
                f"num_classes {self.num_classes}: label maps are uint8 and {IGNORE} is ignored; at most 254"
            )
        self._check_base_dtype()
        self._check_base_quantisation()
        self._check_lengths()
        if self.class_weights and (min(self.class_weights) < 0 or not any(self.class_weights)):
            raise ValueError(f"class_weights {list(self.class_weights)}: none is negative, and not all are 0")
        for color in self.class_colors or ():
            if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
                raise ValueError(f"class_colors {list(color)}: three channels from 0 to 255 are meant")

    @property
    def random_base(self) -> bool:
        """Whether the backbone begins with random weights."""
        return not (self.pretrained or self.backbone_weights or self.ckpt_path)

    def with_backbone(self) -> ModelSettings:
        """The same settings with what they come to: `backbone_name`, commits on the hub, and what is `taken_over`."""
        places = {"ckpt_path": pinned(self.ckpt_path), "backbone_weights": pinned(self.backbone_weights)}
        name = choose_backbone(self.backbone_name, self.backbone_weights)
        found = taken_over(self.ckpt_path, self.load_ckpt_class_head, self.num_q, self.backbone_kwargs)
        return replace(self, backbone_name=name, **places, **found)

    def _check_base_dtype(self) -> None:
        if self.base_dtype == "float32":
            return
        if not self.use_lora:
            raise ValueError(
                f"base_dtype {self.base_dtype} without use_lora: weights that train stay in float32; leave it out"
            )
        if self.random_base:
            raise ValueError(
                f"base_dtype {self.base_dtype} with a random base: the adapter folder would have to hold it"
            )
        if (self.lora_options or {}).get("use_dora"):
            raise ValueError("base_dtype bfloat16 with use_dora: DoRA takes norms of the base weights; use float32")

    def _check_base_quantisation(self) -> None:
        kind = self.base_quantisation
        self.chosen("base_quantisation", (None, "8bit", "4bit"))
        for wrong, reason in (
            (not self.use_lora, "without use_lora: weights that train are not rounded; leave it out"),
            (self.random_base, "with a random base: it exists nowhere else to be rounded again; give a ckpt_path"),
            (self.base_dtype != "float32", f"with base_dtype {self.base_dtype}: one of them rounds the base"),
            (self.compile, "with compile: the compiler cannot look into the decoding of weights; leave one out"),
            ((self.lora_options or {}).get("use_dora"), "with use_dora: DoRA takes norms of the base weights"),
            (self.lora_method not in METHODS, f"with lora_method {self.lora_method}: it may read the base weights"),
        ):
            if kind and wrong:
                raise ValueError(f"base_quantisation {kind} {reason}")

    def _check_lengths(self) -> None:
        for name, length in (
            ("class_names", "num_classes"),
            ("class_colors", "num_classes"),
            ("class_weights", "num_classes"),
            ("attn_mask_annealing_start", "num_blocks"),
            ("attn_mask_annealing_end", "num_blocks"),
        ):
            value, wanted = getattr(self, name), getattr(self, length)
            if value is not None and len(value) != wanted:
                raise ValueError(f"{name} has {len(value)} entries, {length} is {wanted}")


def check_same_settings(trained_with: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError when a resumed run asks for other settings: the checkpoint's optimiser would overrule them."""
    for name in trained_with.keys() & now.keys() - CHANGEABLE:
        before, after = json.dumps(trained_with[name]), json.dumps(now[name])
        if before != after:
            raise ValueError(
                f"resume: the checkpoint was trained with {name} {before}, now it is {after}; a run goes on with its "
                "own settings: leave that out, or start another run in a new folder"
            )


def completed(settings: Mapping[str, Any], kind: type = ModelSettings) -> dict[str, Any]:
    """Returns settings of any version, with the defaults of those that it did not have."""
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING} | dict(settings)
