"""The settings of a run: a YAML file, a preset, and overrides on the command line. Importing this needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from eomt.files import read_yaml
from eomt.settings.backbone_choice import check_backbone_weights
from eomt.settings.model import check_img_size
from eomt.suggestions import did_you_mean
from lora_config import PRESETS, LoRASettings, Preset, preset_for

DRAWN = "drawn"  # in place of a folder, or of a file of weights
MADE = (DRAWN, "none")  # weights that no file of the user's holds
ADAPTER = {"lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}  # which a saved adapter carries
EPOCHS = {"small": 30, "medium": 20, "large": 10}  # of the presets
WHAT_TRAINS = {"use_lora": "false", "unfreeze_last_n": "0", "freeze_strategy": "backbone_only"}
FULL = WHAT_TRAINS | {"freeze_strategy": "none"}
VARIANTS = {  # of a comparison: each says all of what trains
    "frozen": WHAT_TRAINS,
    "last_block": WHAT_TRAINS | {"unfreeze_last_n": "1"},
    "lora": WHAT_TRAINS | {"use_lora": "true"},
    "full": FULL,
    "full_without_pretraining": FULL | {"weights": "none"},
}
Rate = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Settings:
    """Settings of a run, checked; `configs/drawn.yaml` says in comments what they mean.

    Raises:
        ValueError: values that are impossible, or contradict each other.
    """

    data: str = DRAWN
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    identities: Annotated[int, Field(ge=4)] = 150
    pictures: PositiveInt = 4
    data_seed: NonNegativeInt = 0
    img_size: PositiveInt = 64
    num_workers: NonNegativeInt = 0

    backbone_name: str = "vit_tiny_patch16_224"
    backbone_kwargs: dict[str, int] = field(default_factory=lambda: {"embed_dim": 64, "depth": 6, "num_heads": 4})
    patch_size: PositiveInt = 8
    weights: str = DRAWN
    mae_steps: PositiveInt = 300
    mae_batch_size: PositiveInt = 64

    freeze_strategy: Literal["backbone_only", "none"] = "backbone_only"
    unfreeze_last_n: NonNegativeInt = 0
    use_lora: bool = True
    lora_r: int = 4
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    lora_targets: list[str] = field(default_factory=lambda: ["query", "key", "value"])
    preset: Literal["auto", "small", "medium", "large"] | None = None

    epochs: PositiveInt = 16
    batch_size: Annotated[int, Field(ge=2)] = 32
    lr: PositiveFloat = 1e-3
    lora_lr: PositiveFloat = 2e-3
    backbone_lr: PositiveFloat = 3e-4
    weight_decay: Rate = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    logger: Literal["tensorboard", "wandb", "csv"] = "tensorboard"
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_img_size((self.img_size, self.img_size), self.patch_size)
        self.lora()
        if self.freeze_strategy == "none" and self.use_lora:
            raise ValueError(
                "freeze_strategy=none trains the whole backbone, use_lora=true keeps it frozen: set use_lora=false, or "
                "freeze_strategy=backbone_only"
            )
        if self.freeze_strategy == "none" and self.unfreeze_last_n:
            raise ValueError(
                f"freeze_strategy=none trains the whole backbone, unfreeze_last_n={self.unfreeze_last_n} a part of it: "
                "leave one out"
            )

    def lora(self) -> LoRASettings | None:
        """Those of the adapters; None: there are none."""
        if not self.use_lora:
            return None
        return LoRASettings(self.lora_r, self.lora_alpha, self.lora_dropout, tuple(self.lora_targets))

    def check_files(self) -> None:
        """Raises ValueError or OSError where the data or the weights are not there, or are not what they should be."""
        if self.data != DRAWN and not Path(self.data).is_dir():
            raise FileNotFoundError(f"data {self.data}: there is no such folder; give one, or data={DRAWN}")
        if self.weights not in (DRAWN, "hub", "none"):
            if not Path(self.weights).exists():
                raise FileNotFoundError(
                    f"weights {self.weights}: there is no such file; give one, or {DRAWN}, hub or none"
                )
            check_backbone_weights(self.weights, self.backbone_name, self.backbone_kwargs)


def read_settings(
    config: str | Path, overrides: Sequence[str] = (), count: Callable[[Settings], int] | None = None
) -> Settings:
    """Settings of a YAML file; a preset goes before what the file says, overrides go before both.

    Args:
        config: the file. overrides: `lora_r=8` and the like.
        count: counts the training images, for `preset=auto`.

    Raises:
        ValueError: an unknown name, a value of the wrong type, or values that contradict each other.
        FileNotFoundError: there is no such file.
    """
    given, changes = read_yaml(config), read_overrides(overrides)
    settings = make_settings(given | changes, str(config))
    if settings.preset is None:
        return settings
    preset = chosen_preset(settings, count)
    own = {"lora_r": preset.settings.rank, "lora_alpha": preset.settings.alpha, "epochs": EPOCHS[preset.name]}
    own |= {"lora_dropout": preset.settings.dropout, "lora_lr": preset.lr, "preset": preset.name}
    return make_settings(given | own | {name: value for name, value in changes.items() if name != "preset"})


def chosen_preset(settings: Settings, count: Callable[[Settings], int] | None) -> Preset:
    """The preset that is named, or for `auto` the one for the number of training images.

    Raises:
        ValueError: `auto`, and nothing counts.
    """
    if settings.preset == "auto":
        if count is None:
            raise ValueError("preset=auto counts training images, and nothing counts them here: name a preset")
        return preset_for(count(settings))
    return next(preset for preset in PRESETS if preset.name == settings.preset)


def read_variants(
    names: Sequence[str], seeds: Sequence[int], config: str | Path, overrides: Sequence[str], count: Callable
) -> dict[tuple[str, int], Settings]:
    """The settings of each variant and seed of a comparison; the arguments are as for `read_settings`.

    Raises:
        ValueError: an override says what the variants say; and what `read_settings` raises.
    """
    if taken := [name for name in read_overrides(overrides) if name in (*WHAT_TRAINS, "seed")]:
        remedy = "give --seeds" if taken[0] == "seed" else f"choose by --variants among {', '.join(VARIANTS)}"
        raise ValueError(f"override {taken[0]}: a comparison sets it for each of its runs; leave it out, and {remedy}")
    cells = {}
    for name in names:
        own = [f"{setting}={value}" for setting, value in VARIANTS[name].items()]
        for seed in seeds:
            cells[name, seed] = read_settings(config, [*overrides, *own, f"seed={seed}"], count)
    return cells


def idle(settings: Settings, names: Collection[str]) -> dict[str, str]:
    """Those of the settings that do nothing beside the others, and what each belongs to."""
    s = settings
    trains = s.freeze_strategy == "none" or (s.unfreeze_last_n and not s.use_lora)
    rules = (
        (("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_lr"), s.use_lora, "use_lora=true"),
        (("unfreeze_last_n",), not s.use_lora, "use_lora=false"),
        (("backbone_lr",), trains, "unfreeze_last_n or freeze_strategy=none"),
        (("identities", "pictures"), s.data == DRAWN, f"data={DRAWN}"),
        (("data_seed",), DRAWN in (s.data, s.weights), f"data={DRAWN} or weights={DRAWN}"),
        (("mae_steps", "mae_batch_size"), s.weights == DRAWN, f"weights={DRAWN}"),
    )
    return {name: owner for group, heeded, owner in rules if not heeded for name in group if name in names}


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["lora_r=8"]` as `{"lora_r": "8"}`; ValueError for a word without a name or a value."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"override {word!r}: NAME=VALUE is meant, for example lora_r=8")
        try:
            found[name] = yaml.load(value, yaml.BaseLoader)  # all values are texts, which the settings' types read
        except yaml.YAMLError as error:
            raise ValueError(f"override {word!r}: its value is no YAML; put it in quotes") from error
    return found


def make_settings(values: Mapping[str, Any], place: str = "settings") -> Settings:
    """Settings from plain values, or texts that say them; ValueError names what is unknown or of the wrong type."""
    names = [field.name for field in dataclasses.fields(Settings)]
    for name in values:
        if name not in names:
            raise ValueError(f"{place}: there is no setting {name!r}{did_you_mean(name, names)}")
    try:
        return TypeAdapter(Settings).validate_python({name: _plain(value) for name, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of our own
            raise ValueError(str(first["ctx"]["error"])) from None
        name = ".".join(map(str, first["loc"][:1]))
        wanted = first["msg"].removeprefix("Input should be ")
        raise ValueError(f"{name} {first['input']!r}: should be {wanted}") from None


def _plain(value: Any) -> Any:
    """Truth as a text, which no number is made of; `null` as None."""
    if isinstance(value, bool):
        return str(value).lower()
    return None if value in ("null", "~", "") else value
