"""The flags of `train_no_latent.py`: their defaults, their checks, and those of a run that goes on. Needs no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eomt.files import read_json
from lora_config import PRESETS, LoRASettings, preset_for

PARTS = ("vision", "text")
LORA = {"vision": (8, 16.0, 0.1), "text": (16, 32.0, 0.1)}  # rank, alpha and dropout, unless told otherwise
# what may be told a run that goes on
MAY_DIFFER = ("output_dir", "resume", "num_workers", "logger", "sample_every", "analyze_dataset")
DRAWN = "drawn"  # --start: a network that learns scenes by day before
EITHER_LORA = ("use_vision_lora", "use_text_lora")
NEEDS = {  # flags that do nothing without one of these
    "val_csv": ("train_csv",),
    "image_dir": ("train_csv",),
    "early_stopping_patience": ("early_stopping",),
    "use_type_loss": ("use_text_lora", "unfreeze_encoder_layers", "unfreeze_decoder", "train_all"),
    "lora_preset": EITHER_LORA,
    "lora_lr": EITHER_LORA,
    **{f"{part}_lora_{name}": (f"use_{part}_lora",) for part in PARTS for name in ("r", "alpha", "dropout")},
}
IDLE_WITH = {  # flags that do nothing with one of these
    "scenes": ("train_csv",),
    "domain": ("train_csv",),
    "val_split": ("val_csv",),
    "data_seed": ("val_csv",),
    "vision_weights": ("pretrained", "start"),
    **dict.fromkeys(("pretrained", "img_size", "config"), ("start",)),
    "unfreeze_decoder": ("train_all",),
    "unfreeze_encoder_layers": ("train_all",),
    **dict.fromkeys(EITHER_LORA, ("train_all",)),
}


def option(default: Any, kind: type, help: str, **more: Any) -> Any:
    """A flag with a value, or, of kind bool, without."""
    return field(default=default, metadata={"kind": kind, "help": help, **more})


@dataclass(frozen=True)
class Settings:
    """What a run is told."""

    train_csv: str | None = option(None, str, "in ViVQA's form; without it, scenes are drawn")
    val_csv: str | None = option(None, str, "for validation; without it, a part of the training pictures")
    val_split: float = option(0.1, float, "share of the pictures held out, if there is no --val_csv")
    image_dir: str | None = option(None, str, "folder with the pictures of both")
    scenes: int = option(300, int, "how many scenes are drawn, with four questions each")
    domain: str = option("night", str, "of the drawn scenes", choices=("day", "night"))
    config: str = option("tiny", str, "sizes of the network: tiny, base, or a YAML file")
    img_size: int | None = option(
        None, int, "pixels of a side that pictures are resized to; default: the configuration's"
    )
    pretrained: bool = option(False, bool, "take the weights of the hub that the configuration names")
    vision_weights: str | None = option(None, str, "a DINOv2 in a .safetensors file, for the image encoder")
    start: str | None = option(
        None, str, "a trained network (model/ of a run) to start from, or drawn: one that learns scenes by day before"
    )
    source_scenes: int | None = option(None, int, "scenes of the network of --start drawn; default: --scenes")
    source_epochs: int | None = option(None, int, "epochs of the network of --start drawn; default: --epochs")
    batch_size: int = option(16, int, "questions in a batch")
    gradient_accumulation_steps: int = option(1, int, "batches for a step of the optimiser")
    epochs: int = option(20, int, "times over the training questions")
    lr: float = option(5e-5, float, "learning rate")
    lora_lr: float | None = option(None, float, "of the adapters; default: --lr, or that of the preset")
    dropout: float = option(0.1, float, "of projection and fusion")
    weight_decay: float = option(0.01, float, "of everything but adapters")
    scheduler: str = option("cosine", str, "of the learning rate", choices=("cosine", "none"))
    use_vision_lora: bool = option(False, bool, "LoRA on query, key and value of the image encoder")
    vision_lora_r: int | None = option(None, int, "rank; default: 8")
    vision_lora_alpha: float | None = option(None, float, "default: 16")
    vision_lora_dropout: float | None = option(None, float, "default: 0.1")
    use_text_lora: bool = option(False, bool, "LoRA on query, key and value of the text encoder")
    text_lora_r: int | None = option(None, int, "rank; default: 16")
    text_lora_alpha: float | None = option(None, float, "default: 32")
    text_lora_dropout: float | None = option(None, float, "default: 0.1")
    lora_preset: str | None = option(
        None, str, "ranks and rate for a number of pictures", choices=("auto", *(preset.name for preset in PRESETS))
    )
    unfreeze_encoder_layers: int = option(0, int, "last layers of the text encoder that train, if it has no LoRA")
    unfreeze_decoder: bool = option(False, bool, "the decoder trains, and with its head the text encoder's embedding")
    train_all: bool = option(False, bool, "nothing is frozen: a network for others to start from")
    early_stopping: bool = option(False, bool, "end when val/loss no longer falls, and keep the best epoch")
    early_stopping_patience: int = option(5, int, "epochs without a lower val/loss")
    answer_weights: str | None = option(None, str, "file of compute_answer_weights.py")
    use_type_loss: bool = option(False, bool, "the text encoder also learns to tell the question's type")
    analyze_dataset: bool = option(False, bool, "print and draw the counts of types and answers")
    sample_every: int = option(0, int, "epochs between pictures of answers; 0: none")
    logger: str = option("csv", str, "beside metrics.csv", choices=("csv", "tensorboard", "wandb"))
    precision: str = option("32-true", str, "of training", choices=("32-true", "bf16-mixed", "16-mixed"))
    num_workers: int = option(0, int, "processes that load pictures")
    seed: int = option(0, int, "of new weights, order and dropout")
    data_seed: int = option(0, int, "of scenes and split")
    output_dir: str | None = option(None, str, "default: a new folder in outputs/vqa/")
    resume: bool = option(False, bool, "go on with the run in --output_dir; its settings need not be repeated")

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.start == DRAWN and self.train_csv:
            raise ValueError(f"--start drawn knows drawn scenes alone: leave --train_csv {self.train_csv} out")
        if self.start != DRAWN and (self.source_scenes or self.source_epochs):
            raise ValueError("--source_scenes and --source_epochs do nothing without --start drawn")
        if self.train_csv and not self.image_dir:
            raise ValueError(f"--train_csv {self.train_csv}: give the folder with its pictures as --image_dir")
        check_used(self, [one.name for one in fields(self) if getattr(self, one.name) != one.default])
        for part in PARTS:
            self.lora(part, 1)
        adapted = [part for part in PARTS if getattr(self, f"use_{part}_lora")]
        said = ["lora_lr", *(name for part in adapted for name in lora_flags(part))]
        if self.lora_preset and None not in [getattr(self, name) for name in said]:
            raise ValueError(f"--lora_preset does nothing with --{', --'.join(said)}: leave one of them out")

    def preset(self, pictures: int) -> Any:
        """The preset that is asked for, given the number of training pictures; None: none."""
        if self.lora_preset == "auto":
            return preset_for(pictures)
        return next((preset for preset in PRESETS if preset.name == self.lora_preset), None)

    def lora(self, part: str, pictures: int) -> dict[str, Any]:
        """Rank, alpha and dropout of a part's adapters, by flag: what is given, else the preset's, else the defaults.

        Raises:
            ValueError: one cannot be.
        """
        preset = self.preset(pictures)
        own = (preset.settings.rank, preset.settings.alpha, preset.settings.dropout) if preset else LORA[part]
        values = dict(zip(lora_flags(part), own, strict=True))
        values |= {name: getattr(self, name) for name in values if getattr(self, name) is not None}
        LoRASettings(*values.values())
        return values

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


def lora_flags(part: str) -> tuple[str, str, str]:
    """The flags of rank, alpha and dropout."""
    return (f"{part}_lora_r", f"{part}_lora_alpha", f"{part}_lora_dropout")


def check_used(settings: Settings, given: Collection[str]) -> None:
    """Raises ValueError for a flag that was given and does nothing, with the names of both flags."""
    for name in given:
        if (needed := NEEDS.get(name)) and not any(getattr(settings, other) for other in needed):
            raise ValueError(f"--{name} does nothing without --{' or --'.join(needed)}: add it, or leave --{name} out")
        drawn = settings.start == DRAWN and name in ("config", "img_size")  # then they say what is drawn for
        if other := next((other for other in IDLE_WITH.get(name, ()) if getattr(settings, other) and not drawn), None):
            raise ValueError(f"--{name} does nothing with --{other}: leave one of them out")


def _check_numbers(settings: Settings) -> None:
    at_least = dict.fromkeys(("scenes", "batch_size", "gradient_accumulation_steps", "epochs"), 1)
    at_least |= {"early_stopping_patience": 1, "sample_every": 0, "num_workers": 0, "unfreeze_encoder_layers": 0}
    at_least |= {"source_scenes": 1, "source_epochs": 1, "seed": 0, "data_seed": 0}
    for name, least in at_least.items():
        if (value := getattr(settings, name)) is not None and value < least:
            raise ValueError(f"--{name} {value}: it must be at least {least}")
    if settings.sample_every > settings.epochs:
        raise ValueError(f"--sample_every {settings.sample_every} does nothing in --epochs {settings.epochs}")
    for name in ("seed", "data_seed"):
        if (value := getattr(settings, name)) >= 2**32:
            raise ValueError(f"--{name} {value}: it must be below 2**32")
    for name in ("lr", "lora_lr"):
        if (value := getattr(settings, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value:g}: it must be above 0, for example 5e-5")
    if not 0 <= settings.weight_decay < math.inf:
        raise ValueError(f"--weight_decay {settings.weight_decay:g}: it cannot be negative")
    for name in ("dropout", "val_split"):
        if not 0 <= (value := getattr(settings, name)) < 1:
            raise ValueError(f"--{name} {value:g}: it must be at least 0 and below 1, for example 0.1")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `Settings`; those that are not given are left out of what is parsed."""
    for one in fields(Settings):
        kind, text, choices = one.metadata["kind"], one.metadata["help"], one.metadata.get("choices")
        if kind is bool:
            parser.add_argument(f"--{one.name}", action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        known = "" if one.default is None else f" (default: {one.default})"
        metavar = None if choices else {int: "N", float: "X", str: "TEXT"}[kind]
        parser.add_argument(
            f"--{one.name}", type=kind, choices=choices, metavar=metavar, default=argparse.SUPPRESS, help=text + known
        )


def settle(given: Mapping[str, Any]) -> Settings:
    """The settings of a run: the flags given, or, where it goes on, those that it was started with.

    Raises:
        ValueError: a flag contradicts the run that goes on.
    """
    if not given.get("resume"):
        settings = Settings(**given)
        check_used(settings, given)  # one that is given as it is by default does as little
        return settings
    if not given.get("output_dir"):
        raise ValueError("--resume: give the folder of the run that goes on as --output_dir")
    folder = Path(given["output_dir"])
    if not (folder / "settings.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'settings.json'} is missing: there is no run to go on with; leave --resume out, or name the "
            "folder of one"
        )
    recorded = read_json(folder / "settings.json")
    for name, value in given.items():
        if name not in MAY_DIFFER and value != recorded.get(name):
            raise ValueError(
                f"--{name} {value}: the run in {folder} was started with {recorded.get(name)}; leave it out, or start "
                "a new one"
            )
    return Settings(**{**recorded, **given})
