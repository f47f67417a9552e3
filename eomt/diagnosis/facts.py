"""Gathers the facts of a run, from its files and from a network without weights, which is what the settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eomt.comparison.result_files import read_confusion, read_scores
from eomt.cost.training_cost import build_without_weights
from eomt.data.sources import spread
from eomt.diagnosis.checks import Channels
from eomt.diagnosis.inspection import (
    BACKBONE,
    by_number,
    inspect_model,
    name_in_folder,
    read,
    read_start_backbone,
    resample,
    stored_by_layer,
)
from eomt.diagnosis.pixels import count_labels, drawn_images, reaching_patches, training_images
from eomt.files import read_yaml
from eomt.fingerprints import Identity, base_tensors, identify_tensors, is_adapter
from eomt.inference.artefacts import PLAIN_BASE, read_lightning, set_settings
from eomt.inference.saved import BASE_FILE, find_weights
from eomt.models.checkpoint import (
    CLASS_HEAD,
    NOT_WEIGHTS,
    OPTIONAL_KEYS,
    POS_EMBED,
    describe,
    needs_pretrained,
    read_checkpoint,
)
from eomt.settings.backbone_choice import plain_backbone
from eomt.settings.eomt_names import bare
from eomt.settings.formats import EVALUATION, SUMMARY, read_format
from eomt.settings.hub import check_ckpt_path, local_path
from eomt.training.index_check import check_indices, indices_of

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SIZES = ("num_blocks", "num_classes", "num_q", "head")
ADAM = ("exp_avg", "exp_avg_sq")  # the moments of gradients that the optimiser keeps
LABEL_MAPS = 50  # how many are looked at


class NothingToCheck(Exception):
    """A check has nothing to look at, for the reason that the message gives."""


class RunFacts:
    """Gathers the facts of a run; methods for a check return its arguments, or raise `NothingToCheck`."""

    def __init__(
        self, path: Path, run: Path, data: SegmentationDataModule | None, no_data: str, ckpt_path: str | Path | None
    ) -> None:
        self.run, self.data, self.no_data, self.ckpt_path = run, data, no_data, ckpt_path
        check_ckpt_path(ckpt_path)
        try:
            self.path: Path | None = find_weights(path)
        except FileNotFoundError:
            if not (self.summary and path.is_dir()):
                raise
            self.path = None  # a run that failed before it saved anything
        self.content = read(self.path)[0] if self.path else {"state_dict": {}}
        self.state: dict[str, Tensor] = self.content["state_dict"]
        self.init: dict[str, Any] = self.content.get("hyper_parameters") or {}

    # For several checks

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The run's summary.json; empty if there is none."""
        return read_format(self.run / "summary.json", SUMMARY, {})

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's config.yaml; empty if there is none."""
        file = self.run / "config.yaml"
        content = read_yaml(file, {})
        if file.is_file() and not content:
            raise ValueError(f"{file} is empty, where names and values should be: look at it")
        return content

    def needs_weights(self) -> None:
        if self.path is None:
            raise NothingToCheck("the run left neither adapter/ nor model/")

    @cached_property
    def module(self) -> MaskClassificationSemantic:
        """Builds the network that the settings ask for, without values."""
        self.needs_weights()
        if not self.init:
            raise NothingToCheck("weights without a configuration")
        try:
            module = build_without_weights({**self.init, **PLAIN_BASE})  # files hold the base as it was
        except TypeError as error:
            raise NothingToCheck(f"these settings are of another version: {error}") from error
        set_settings(module, self.init)  # ckpt_path among them, which building without weights leaves out
        return module

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Lists the parameters that should train, by name, adapters included."""
        return {name: p for name, p in self.module.network.named_parameters() if p.requires_grad}

    @cached_property
    def last(self) -> dict[str, Any]:
        """Reads the checkpoint that the run could be resumed from."""
        file = self.run / "checkpoints" / "last.ckpt"
        if not file.is_file():
            raise NothingToCheck(f"no {file.parent.name}/{file.name}")
        return read_lightning(file)

    @property
    def start_path(self) -> Path:
        """Finds the weights that the run started from."""
        path = self.ckpt_path or self.init.get("ckpt_path") or self.init.get("backbone_weights")
        if not path:
            first = "timm's pretrained" if self.init.get("pretrained") else "random"
            raise NothingToCheck(f"the run started from {first} weights, which are not here")
        try:
            place = local_path(path)
            if not place.exists():
                raise NothingToCheck(f"the weights that the run started from are not there: {path}")
            return place if plain_backbone(place) else find_weights(place)
        except OSError as error:
            raise NothingToCheck(f"the run started from {path}, which holds no weights") from error

    def halves(self) -> tuple[set[str], set[str]]:
        """Returns the layers whose A the adapter holds, and those whose B it holds."""
        a, b = ({key.split(half)[0] for key in self.state if half in key} for half in (".lora_A.", ".lora_B."))
        return a, b

    @cached_property
    def misfit(self) -> str | None:
        """Says why the base is not the one that the adapter was trained on; None if it is, or if nothing tells."""
        a, b = self.halves()
        if not a or a != b:
            return None
        own = self.path / BASE_FILE
        try:
            fit = inspect_model(self.path, own if own.is_file() else self.start_path)["fit"]
        except NothingToCheck:
            return None
        return f"the base {fit['base']} does not fit: {fit['why']}" if fit["fits"] is False else None

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """Reads the weights that the run started from, at this network's image size."""
        path = self.start_path
        recorded = Identity.from_dict(self.summary.get("start_fingerprint"), self.summary.get("start_weights"))
        if plain_backbone(path):
            state, found = read_start_backbone(path, self.init)
            changed = recorded.stored not in (None, found.stored)
        else:
            state, size, *_ = read_checkpoint(path)
            own = self.module.network.state_dict().get(POS_EMBED)
            tokens = None if own is None else own.shape[1]
            resampled = resample(state, size, self.init["img_size"], self.init["patch_size"], tokens)
            found = self.identify_start(state, resampled) if recorded.exact else None
            changed = found and recorded.difference(found)
        if self.misfit or changed:
            raise NothingToCheck(f"the weights at {path} are no longer those that the run started from")
        return state

    def started_from_differences(self) -> bool:
        """Whether the start weights are differences to a pretrained backbone."""
        return not plain_backbone(self.start_path) and needs_pretrained(self.start_path, self.init.get("delta_weights"))

    def identify_start(self, state: Mapping[str, Tensor], resampled: Mapping[str, str]) -> Identity | None:
        """Identifies these weights as the run does before it trains; None if the run began with others, too."""
        names = base_tensors(self.module.network).keys()
        if self.started_from_differences() or self.fresh() or not names <= state.keys():
            return None
        tensors = {name: state[name].float() if state[name].is_floating_point() else state[name] for name in names}
        if not self.module.anneals:  # then masks are off from the first step
            tensors["attn_mask_probs"] = torch.zeros_like(tensors["attn_mask_probs"])
        return identify_tensors(tensors, resampled)

    def fresh(self) -> tuple[str, ...]:
        """Returns prefixes of the keys that the run did not take from its start weights."""
        if plain_backbone(self.start_path):
            return tuple(name for name in self.module.network.state_dict() if not name.startswith("encoder."))
        return () if self.init.get("load_ckpt_class_head", True) else (CLASS_HEAD,)

    def steps(self) -> int:
        """Counts the optimiser steps that the run took."""
        if "steps" not in self.summary:
            raise NothingToCheck("no summary.json of a run")
        if not self.summary["steps"]:
            raise NothingToCheck("the run took no step")
        return self.summary["steps"]

    # For each check

    def updates(self) -> tuple:
        """Computes the norm of each layer's update."""
        self.needs_weights()
        if method := (self.content.get("lora") or {}).get("method"):
            raise NothingToCheck(f"the adapter is no LoRA, but {method}")
        a, b = self.halves()
        if not (a or b):
            raise NothingToCheck("no adapter")
        if a != b:
            raise ValueError(
                f"the adapter holds lora_A of {len(a)} layers and lora_B of {len(b)}, {len(a & b)} in both"
            )
        updates = stored_by_layer(self.content["lora"], self.state)
        return ({name: updates[name]["norm"] for name in sorted(updates, key=by_number)},)

    def audit(self) -> tuple:
        """Reads the results of the LoRA audit from the summary."""
        if not self.summary:
            raise NothingToCheck("no summary.json of a run")
        if not self.summary.get("lora_audit"):
            raise NothingToCheck("trained without LoRA")
        return (self.summary["lora_audit"],)

    def parameters(self) -> tuple:
        """Counts the parameters that should train, and those that did."""
        self.steps()
        return sum(p.numel() for p in self.trainable.values()), self.summary["trainable_parameters"]

    def trained_weights(self) -> tuple:
        """Names the parameters that should train, and compares each with its start."""
        self.steps()
        parameters = {name for name, t in base_tensors(self.module.network).items() if isinstance(t, nn.Parameter)}
        start = self.start
        if self.started_from_differences():
            raise NothingToCheck("the run started from a file of differences to timm's weights, which are not here")
        fresh = self.fresh()
        unchanged = {
            key: torch.equal(tensor.float(), start[key].float())
            for key, tensor in self.state.items()
            if key in parameters and key in start and not key.startswith(fresh) and tensor.shape == start[key].shape
        }
        if not unchanged:
            raise NothingToCheck("no tensor has the name and shape that it had at the start")
        return {name.replace(".base_layer.", ".") for name in self.trainable}, unchanged

    def gradients(self) -> tuple:
        """Names the tensors that the optimiser should hold, and finds the largest moment of each that it held."""
        self.steps()
        optimizers = self.last.get("optimizer_states")
        if not optimizers:
            raise NothingToCheck("last.ckpt keeps no optimiser")
        names = {id(p): name for name, p in self.trainable.items()}
        wanted = [p for group in self.module.parameter_groups() for p in group["params"]]
        state = optimizers[0]["state"]
        held = [state.get(index, {}) for group in optimizers[0]["param_groups"] for index in group["params"]]
        moments = [max((_largest(adam[key]) for key in ADAM if key in adam), default=0.0) for adam in held]
        return [names[id(p)] for p in wanted], moments

    def keys(self) -> tuple:
        """Collects shapes by key, stored and loaded, of artefact and start weights, and why a base does not fit."""
        stored = {name_in_folder(key): tensor.shape for key, tensor in self.state.items()}
        sources = {self.path.name if self.path else "": (stored, self.loaded())}
        try:
            start = self.start
        except NothingToCheck:
            return sources, self.misfit
        network = base_tensors(self.module.network)
        other = (*OPTIONAL_KEYS, *self.fresh())
        sources["the start weights"] = (
            {key: t.shape for key, t in start.items() if not key.startswith((*NOT_WEIGHTS, *other))},
            {key: t.shape for key, t in network.items() if not key.startswith(other)},
        )
        return (sources,)

    def loaded(self) -> dict[str, torch.Size]:
        """Collects the shapes that opening the artefact reads from it; the base of an adapter is elsewhere."""
        module, wanted = self.module, self.module.state_dict()
        keys = wanted.keys()
        if self.init["use_lora"]:
            in_folder = (key for key in keys if is_adapter(key) or not bare(key).startswith(BACKBONE))
            keys = in_folder if self.path.is_dir() else module.trained_keys()
        return {name_in_folder(key): wanted[key].shape for key in keys}

    def sizes(self) -> tuple:
        """Collects sizes from weights, configurations, class names and data."""
        self.needs_weights()
        found = describe({key: tensor for key, tensor in self.state.items() if not is_adapter(key)})
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
            raise NothingToCheck("only the weights tell their sizes")
        return (sources,)

    def pixels(self) -> tuple:
        """Measures images before and after the network's own normalisation."""
        encoder = self.module.network.encoder
        config = encoder.backbone.pretrained_cfg
        for name, usual in (("pixel_mean", config["mean"]), ("pixel_std", config["std"])):
            stored = self.state.get(f"encoder.{name}", torch.tensor(usual).reshape(1, 3, 1, 1))
            setattr(encoder, name, stored.float())
        if self.data is not None:
            images, source, clipped = training_images(self.data)
        else:
            images, source, clipped = drawn_images(tuple(self.init["img_size"]), self.no_data)
        shown = images / 255  # as training and prediction do
        seen, expected = reaching_patches(encoder, shown), Channels(tuple(config["mean"]), tuple(config["std"]))
        return Channels.of(shown), Channels.of(seen), expected, source, clipped

    def labels(self) -> tuple:
        """Collects classes of the network and of the data, and counts the values of label maps."""
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
        """Resolves when the masks fade, as the module does for the whole run that was configured."""
        steps, module = self.steps(), self.module
        if not module.network.masked_attn_enabled:
            raise NothingToCheck("trained without masked attention")
        probabilities = self.state["attn_mask_probs"].tolist() if "attn_mask_probs" in self.state else []
        if not module.anneals:
            if not probabilities:
                raise NothingToCheck("the weights keep no attn_mask_probs, which say how masks were left")
            return None, steps, probabilities
        return module.annealing_of(self.planned_steps()), steps, probabilities

    def planned_steps(self) -> int:
        """Counts the optimiser steps that were planned, of which schedules are fractions."""
        if planned := self.summary.get("planned_steps"):
            return planned
        trainer = self.config.get("trainer") or {}  # a summary of an older version
        lengths = [trainer["max_steps"]] if (trainer.get("max_steps") or -1) > 0 else []
        if (trainer.get("max_epochs") or -1) > 0:
            try:
                lengths.append(round(trainer["max_epochs"] * self.last["global_step"] / (self.last["epoch"] + 1)))
            except NothingToCheck as why:
                raise NothingToCheck(f"the planned length is unknown: no planned_steps, and {why}") from why
        if not lengths:
            raise NothingToCheck("the planned length is unknown: neither summary.json nor config.yaml says it")
        return min(lengths)

    def classes(self) -> tuple:
        """Finds the classes that have pixels, in the run's validation and in `evaluation/`."""
        there = {"the run's validation": self.validated()} if self.summary.get("class_iou") else {}
        for file in sorted((self.run / "evaluation").glob("*.npz")):
            if facts := read_format(file.with_suffix(".json"), EVALUATION._replace(needs={}), {}):
                targets = read_confusion(file, facts).sum((0, 2))
                there[f"evaluation/{file.stem}"] = dict(zip(facts["classes"], (targets > 0).tolist(), strict=True))
        if not there:
            raise NothingToCheck("no validation in summary.json, and no evaluation/*.npz")
        return (there,)

    def validated(self) -> dict[str, bool | None]:
        """Finds the classes that had pixels in the run's validation: an IoU of 0 alone does not tell."""
        scores, pixels = self.summary["class_iou"], self.summary.get("class_pixels")
        if not pixels and 0 in scores.values() and self.validated_on_these():
            counts = count_labels(self.data.val_set, range(len(self.data.val_set))).tolist()
            pixels = dict(zip(self.data.classes.names, counts, strict=False))
        if pixels:
            return {name: pixels.get(name, 0) > 0 for name in scores}
        return {name: None if iou == 0 else iou is not None for name, iou in scores.items()}

    def validated_on_these(self) -> bool:
        """Says whether the data are there and are those that the run was validated on."""
        recorded = (self.summary.get("data") or {}).get("val")
        return self.data is not None and self.data.val_set.fingerprint() == recorded

    def scores(self) -> tuple:
        """Reads the results in `anomaly/`."""
        files = sorted((self.run / "anomaly").glob("*.json"))
        if not files:
            raise NothingToCheck("no anomaly/*.json, which scripts/evaluate_anomaly.py writes")
        found = map(read_scores, files)
        return ({facts["title"]: facts["results"] for facts in found},)


def _largest(tensor: Tensor) -> float:
    """Returns the largest absolute value; NaN if there is one."""
    return tensor.abs().max().item()
