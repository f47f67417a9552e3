"""Gathers the facts: what the files say comes from `inspection`, what the settings ask for from the network itself,
built without weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from eomt.cost.training_cost import build_without_weights
from eomt.diagnosis.checks import Channels
from eomt.diagnosis.files import read_evaluation, read_json, read_scores, read_settings
from eomt.diagnosis.inspection import BACKBONE, by_number, choose, inspect_model, read, resample_to
from eomt.fingerprints import base_tensors, combine_hashes, hash_tensors, is_lora
from eomt.inference.artefacts import BASE_FILE, read_lightning, set_settings
from eomt.lora.updates import stored_updates
from eomt.models.checkpoint import CLASS_HEAD, NOT_WEIGHTS, OPTIONAL_KEYS, clean_key, describe, read_checkpoint
from eomt.toys.scene import draw_scene
from eomt.training.index_check import check_indices, indices_of
from eomt.training.param_groups import param_groups
from eomt.training.schedules import resolve_annealing

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.data.dataset import SegmentationDataset
    from eomt.models.vit import ViT
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SIZES = ("num_blocks", "num_classes", "num_q", "head")
ADAM = ("exp_avg", "exp_avg_sq")  # the moments of gradients that the optimiser keeps
CROPS, LABEL_MAPS, SCENES = 8, 50, 2  # how many are looked at


class NothingThere(Exception):
    """There is nothing to look at; the sentence says why."""


class Patient:
    """Gathers the facts; each method returns the arguments of one check, or raises `NothingThere`."""

    def __init__(
        self, path: Path, run: Path, data: SegmentationDataModule | None, no_data: str, ckpt_path: str | Path | None
    ) -> None:
        self.run, self.data, self.no_data, self.ckpt_path = run, data, no_data, ckpt_path
        if ckpt_path and not Path(ckpt_path).expanduser().exists():
            raise FileNotFoundError(f"ckpt_path {ckpt_path}: no such file or folder")
        try:
            self.path: Path | None = choose(path)
        except FileNotFoundError:
            if not (self.summary and path.is_dir()):
                raise
            self.path = None  # a run that failed before it saved anything
        self.content = read(self.path)[0] if self.path else {"state_dict": {}}
        self.state: dict[str, Tensor] = self.content["state_dict"]
        self.init: dict[str, Any] = self.content.get("hyper_parameters") or {}

    # What is needed by several

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the run wrote at its end; empty without it."""
        return read_json(self.run / "summary.json") or {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the run was configured with; empty without it."""
        return read_settings(self.run / "config.yaml", yaml.safe_load) or {}

    def needs_weights(self) -> None:
        if self.path is None:
            raise NothingThere("the run left neither adapter/ nor model/")

    @cached_property
    def module(self) -> MaskClassificationSemantic:
        """The network that the settings ask for, without values."""
        self.needs_weights()
        if not self.init:
            raise NothingThere("weights without a configuration")
        try:
            module = build_without_weights(self.init)
        except TypeError as error:
            raise NothingThere(f"these settings are of another version: {error}") from error
        set_settings(module, self.init)  # ckpt_path among them, which building without weights leaves out
        return module

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of the network that should train, by name; adapters included."""
        return {name: p for name, p in self.module.network.named_parameters() if p.requires_grad}

    @cached_property
    def last(self) -> dict[str, Any]:
        """The checkpoint that the run could be resumed from."""
        file = self.run / "checkpoints" / "last.ckpt"
        if not file.is_file():
            raise NothingThere(f"no {file.parent.name}/{file.name}")
        return read_lightning(file)

    @property
    def start_path(self) -> Path:
        """Where the weights are that the run started from."""
        path = self.ckpt_path or self.init.get("ckpt_path")
        if not path:
            first = "timm's pretrained" if self.init.get("pretrained") else "random"
            raise NothingThere(f"the run started from {first} weights, which are not here")
        if not Path(path).expanduser().exists():
            raise NothingThere(f"the weights that the run started from are not there: {path}")
        try:
            return choose(path)
        except FileNotFoundError as error:
            raise NothingThere(f"the run started from {path}, which holds no weights") from error

    def halves(self) -> tuple[set[str], set[str]]:
        """Layers of which the adapter holds A, and of which it holds B."""
        a, b = ({key.split(half)[0] for key in self.state if half in key} for half in (".lora_A.", ".lora_B."))
        return a, b

    @cached_property
    def misfit(self) -> str | None:
        """Why the base is not the one that the adapter was trained on; None where it is, or cannot be told."""
        a, b = self.halves()
        if not a or a != b:
            return None
        own = self.path / BASE_FILE
        try:
            fit = inspect_model(self.path, own if own.is_file() else self.start_path)["fit"]
        except NothingThere:
            return None
        return f"the base {fit['base']} does not fit: {fit['why']}" if fit["fits"] is False else None

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The weights that the run started from, at this network's image size."""
        path = self.start_path
        state, size = read_checkpoint(path)
        resample_to(state, size, tuple(self.init["img_size"]), self.init["patch_size"])
        recorded = self.summary.get("start_fingerprint")
        found = self.start_fingerprint(state) if recorded else None
        if self.misfit or found not in (None, recorded):
            raise NothingThere(f"the weights at {path} are no longer those that the run started from")
        return state

    def start_fingerprint(self, state: Mapping[str, Tensor]) -> str | None:
        """What the run's summary calls so, of these weights; None if it began with others, too."""
        names = base_tensors(self.module.network).keys()
        if self.init.get("delta_weights") or self.fresh() or not names <= state.keys():
            return None
        tensors = {name: state[name].float() if state[name].is_floating_point() else state[name] for name in names}
        if not self.module.anneals:  # then masks are off from the first step
            tensors["attn_mask_probs"] = torch.zeros_like(tensors["attn_mask_probs"])
        return combine_hashes(hash_tensors(tensors))

    def fresh(self) -> tuple[str, ...]:
        """Beginnings of the keys that the run did not take from its start."""
        return () if self.init.get("load_ckpt_class_head", True) else (CLASS_HEAD,)

    def steps(self) -> int:
        """Optimiser steps that the run took."""
        if "steps" not in self.summary:
            raise NothingThere("no summary.json of a run")
        if not self.summary["steps"]:
            raise NothingThere("the run took no step")
        return self.summary["steps"]

    # For each check

    def updates(self) -> tuple:
        """The norm of each layer's update."""
        self.needs_weights()
        a, b = self.halves()
        if not (a or b):
            raise NothingThere("no adapter")
        if a != b:
            raise ValueError(
                f"the adapter holds lora_A of {len(a)} layers and lora_B of {len(b)}, {len(a & b)} in both"
            )
        lora, options = self.content["lora"], self.content["lora"]["options"]
        factors = {key.removeprefix(BACKBONE): tensor for key, tensor in self.state.items() if is_lora(key)}
        scaling = (lora["alpha"], options.get("use_rslora", False), options.get("alpha_pattern"))
        updates = stored_updates(factors, *scaling)
        return ({name: updates[name]["norm"] for name in sorted(updates, key=by_number)},)

    def audit(self) -> tuple:
        """The results in the summary."""
        if not self.summary:
            raise NothingThere("no summary.json of a run")
        if not self.summary.get("lora_audit"):
            raise NothingThere("trained without LoRA")
        return (self.summary["lora_audit"],)

    def parameters(self) -> tuple:
        """How many should train, and how many did."""
        self.steps()
        return sum(p.numel() for p in self.trainable.values()), self.summary["trainable_parameters"]

    def trained_weights(self) -> tuple:
        """Which parameters should train, and which are what they were at the start."""
        self.steps()
        parameters = {name for name, t in base_tensors(self.module.network).items() if isinstance(t, nn.Parameter)}
        start = self.start
        if self.init.get("delta_weights"):
            raise NothingThere("the run started from a file of differences to timm's weights, which are not here")
        fresh = self.fresh()
        unchanged = {
            key: torch.equal(tensor.float(), start[key].float())
            for key, tensor in self.state.items()
            if key in parameters and key in start and not key.startswith(fresh) and tensor.shape == start[key].shape
        }
        if not unchanged:
            raise NothingThere("no tensor has the name and shape that it had at the start")
        return {name.replace(".base_layer.", ".") for name in self.trainable}, unchanged

    def gradients(self) -> tuple:
        """Names of the tensors that the optimiser should hold, and the largest moment of each that it held."""
        self.steps()
        optimizers = self.last.get("optimizer_states")
        if not optimizers:
            raise NothingThere("last.ckpt keeps no optimiser")
        names = {id(p): name for name, p in self.trainable.items()}
        wanted = [p for group in self.groups() for p in group["params"]]
        state = optimizers[0]["state"]
        held = [state.get(index, {}) for group in optimizers[0]["param_groups"] for index in group["params"]]
        moments = [max((largest(adam[key]) for key in ADAM if key in adam), default=0.0) for adam in held]
        return [names[id(p)] for p in wanted], moments

    def groups(self) -> list[dict]:
        """The optimiser's groups, as the settings ask for them."""
        module, hp = self.module, self.module.hparams
        rates = (hp.lr, hp.lora_lr or hp.lr, hp.llrd, hp.llrd_masked_blocks, hp.weight_decay)
        return param_groups(module.network, module.adapter_parameters(), *rates)

    def keys(self) -> tuple:
        """Shapes by key, stored and loaded, of the artefact and of the start weights; and whether a base fits."""
        stored = {plain(key): tensor.shape for key, tensor in self.state.items()}
        sources = {self.path.name if self.path else "": (stored, self.loaded())}
        try:
            start = self.start
        except NothingThere:
            return sources, self.misfit
        network = base_tensors(self.module.network)
        other = (*OPTIONAL_KEYS, *self.fresh())
        sources["the start weights"] = (
            {key: t.shape for key, t in start.items() if not key.startswith((*NOT_WEIGHTS, *other))},
            {key: t.shape for key, t in network.items() if not key.startswith(other)},
        )
        return (sources,)

    def loaded(self) -> dict[str, torch.Size]:
        """Shapes of what opening the artefact reads from it; the base of an adapter is elsewhere."""
        module, wanted = self.module, self.module.state_dict()
        keys = wanted.keys()
        if self.init["use_lora"]:
            in_folder = (key for key in keys if is_lora(key) or not clean_key(key).startswith(BACKBONE))
            keys = in_folder if self.path.is_dir() else module.trained_keys()
        return {plain(key): wanted[key].shape for key in keys}

    def sizes(self) -> tuple:
        """What weights, configurations, class names and data say."""
        self.needs_weights()
        found = describe({key: tensor for key, tensor in self.state.items() if not is_lora(key)})
        sizes = (*SIZES, "arcface_scale") if found.get("head") == "arcface" else SIZES
        sources = {"the weights": {size: found.get(size) for size in sizes}}
        if self.init:
            sources["their configuration"] = {size: self.init.get(size) for size in sizes}
        if self.init.get("class_names"):
            sources["the class names"] = {"num_classes": len(self.init["class_names"])}
        if self.config:
            sources["config.yaml"] = {size: (self.config.get("model") or {}).get(size) for size in sizes}
        if self.data:
            sources["the data"] = {"num_classes": self.data.num_classes}
        said = [name for values in sources.values() for name, value in values.items() if value is not None]
        if len(said) == len(set(said)):
            raise NothingThere("only the weights tell their sizes")
        return (sources,)

    def pixels(self) -> tuple:
        """Statistics of images before and after the network's own normalisation."""
        encoder = self.module.network.encoder
        config = encoder.backbone.pretrained_cfg
        for name, usual in (("pixel_mean", config["mean"]), ("pixel_std", config["std"])):
            stored = self.state.get(f"encoder.{name}", torch.tensor(usual).reshape(1, 3, 1, 1))
            setattr(encoder, name, stored.float())
        images, source, clipped = self.images()
        shown = images / 255  # as training and prediction do
        seen, expected = reaching_patches(encoder, shown), Channels(tuple(config["mean"]), tuple(config["std"]))
        return Channels.of(shown), Channels.of(seen), expected, source, clipped

    def images(self) -> tuple[Tensor, str, float]:
        """Some training crops [N, 3, H, W], or drawn scenes of that size, what they are, and the share clipped."""
        if self.data is not None:
            train_set = self.data.train_set
            indices = spread(len(train_set), CROPS)
            crops = [train_set[index, 0][0] for index in indices]
            clipped = [share_clipped(train_set.image(index)) for index in indices]  # crops are padded with 0
            return torch.stack(crops), f"{len(crops)} training crops", float(np.mean(clipped))
        size = tuple(self.init["img_size"])
        scenes = [draw_scene(np.random.default_rng(seed), size, "clear")[0] for seed in range(SCENES)]
        images = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)
        return images, f"drawn scenes (no data: {self.no_data})", share_clipped(images)

    def labels(self) -> tuple:
        """Classes of the network and of the data, and values of label maps."""
        check_indices(indices_of(self.module, self.data))
        num_classes, names = self.module.hparams.num_classes, self.init.get("class_names")
        if self.data is None:
            return num_classes, names
        pixels = sum(
            count_labels(dataset, spread(len(dataset), LABEL_MAPS))
            for dataset in (self.data.train_set, self.data.val_set)
        )
        found = {value: count for value, count in enumerate(pixels.tolist()) if count}
        return num_classes, names, self.data.classes.names, found

    def annealing(self) -> tuple:
        """When the masks fade, as the module resolves it for the whole run that was configured."""
        steps, module = self.steps(), self.module
        if not module.network.masked_attn_enabled:
            raise NothingThere("trained without masked attention")
        probabilities = self.state["attn_mask_probs"].tolist() if "attn_mask_probs" in self.state else []
        if not module.anneals:
            if not probabilities:
                raise NothingThere("the weights keep no attn_mask_probs, which say how masks were left")
            return None, steps, probabilities
        given = (module.hparams.attn_mask_annealing_start, module.hparams.attn_mask_annealing_end)
        fading = resolve_annealing(*given, module.network.num_blocks, self.planned_steps())
        return fading, steps, probabilities

    def planned_steps(self) -> int:
        """Optimiser steps that the run was to take: the schedules are fractions of these."""
        if planned := self.summary.get("planned_steps"):
            return planned
        trainer = self.config.get("trainer") or {}  # a summary of an older version
        lengths = [trainer["max_steps"]] if (trainer.get("max_steps") or -1) > 0 else []
        if (trainer.get("max_epochs") or -1) > 0:
            try:
                lengths.append(round(trainer["max_epochs"] * self.last["global_step"] / (self.last["epoch"] + 1)))
            except NothingThere as why:
                raise NothingThere(f"the planned length is unknown: no planned_steps, and {why}") from why
        if not lengths:
            raise NothingThere("the planned length is unknown: neither summary.json nor config.yaml says it")
        return min(lengths)

    def classes(self) -> tuple:
        """Which classes have pixels, in the run's validation and in `evaluation/`."""
        there = {"the run's validation": self.validated()} if self.summary.get("class_iou") else {}
        for file in sorted((self.run / "evaluation").glob("*.npz")):
            facts = read_json(file.with_suffix(".json"))
            if facts is not None:
                there[f"evaluation/{file.stem}"] = read_evaluation(file, facts)
        if not there:
            raise NothingThere("no validation in summary.json, and no evaluation/*.npz")
        return (there,)

    def validated(self) -> dict[str, bool | None]:
        """Which classes had pixels in the run's validation: an IoU of 0 alone does not tell."""
        scores, pixels = self.summary["class_iou"], self.summary.get("class_pixels")
        if not pixels and 0 in scores.values() and self.validated_on_these():
            counts = count_labels(self.data.val_set, range(len(self.data.val_set))).tolist()
            pixels = dict(zip(self.data.classes.names, counts, strict=False))
        if pixels:
            return {name: pixels.get(name, 0) > 0 for name in scores}
        return {name: None if iou == 0 else iou is not None for name, iou in scores.items()}

    def validated_on_these(self) -> bool:
        """Whether the data are there, and those that the run was validated on."""
        recorded = (self.summary.get("data") or {}).get("val")
        return self.data is not None and self.data.val_set.fingerprint() == recorded

    def scores(self) -> tuple:
        """What `anomaly/` holds."""
        files = sorted((self.run / "anomaly").glob("*.json"))
        if not files:
            raise NothingThere("no anomaly/*.json, which scripts/evaluate_anomaly.py writes")
        return (dict(read_scores(file) for file in files),)


def plain(key: str) -> str:
    """A state-dict key under the name that it has in a run's folder: PEFT's files leave the adapter's own name out."""
    key = clean_key(key).removeprefix("base_model.model.")
    if not is_lora(key):
        return key
    return key.removeprefix(BACKBONE).replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices, evenly over the whole length."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def share_clipped(images: Tensor) -> float:
    """Share of the values of uint8 images that are the lowest or the highest possible."""
    return ((images == 0) | (images == 255)).double().mean().item()


def count_labels(dataset: SegmentationDataset, indices: Iterable[int]) -> Tensor:
    """How many pixels have each label value, int64 [256], in these label maps."""
    return sum(torch.bincount(dataset.labels(index).flatten(), minlength=256) for index in indices)


def largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    return tensor.abs().max().item()


class Reached(Exception):
    """Ends a forward pass that has got far enough."""


def reaching_patches(encoder: ViT, images: Tensor) -> Tensor:
    """What images [N, 3, H, W] in [0, 1] have become where they enter the patch embedding; weights need no values.

    Raises:
        ValueError: images that the encoder refuses.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise Reached

    handle = encoder.backbone.patch_embed.register_forward_pre_hook(catch)
    try:
        encoder.embed(images)
    except Reached:
        pass
    finally:
        handle.remove()
    return caught[0]
