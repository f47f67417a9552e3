"""Looks for the faults that leave a run looking fine: each check is a small function of facts, and says its evidence.

What the files say comes from `inspection`, what the settings ask for from the network itself, built without weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from eomt.data.labels import IGNORE, OUTLIER
from eomt.data.toy_scene import draw_scene
from eomt.models.checkpoint import CLASS_HEAD, NOT_WEIGHTS, OPTIONAL_KEYS, clean_key, describe, read_checkpoint
from eomt.reporting.cost import build_without_weights
from eomt.reporting.inspection import BACKBONE, choose, inspect_model, read, resample_to
from eomt.training.index_check import check_indices, indices_of
from eomt.training.param_groups import param_groups
from eomt.training.pretrained import read_lightning, set_settings
from eomt.training.schedules import mask_probability, resolve_annealing
from lora_config import base_tensors, is_lora, listed

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.models.vit import ViT
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SIZES = ("num_blocks", "num_classes", "num_q", "head")
ADAM = ("exp_avg", "exp_avg_sq")  # the moments of gradients that the optimiser keeps
CROPS, LABEL_MAPS, SCENES = 8, 50, 2  # how many are looked at


@dataclass(frozen=True)
class Finding:
    """What a check found: `passed` is None where there was nothing to look at, and `evidence` says why."""

    passed: bool | None
    evidence: str

    @property
    def result(self) -> str:
        return {True: "passed", False: "failed", None: "not checked"}[self.passed]


class NothingThere(Exception):
    """There is nothing to look at; the sentence says why."""


@dataclass(frozen=True)
class Channels:
    """Mean and deviation of pixels, for each colour."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> Channels:
        """Those of float images [N, 3, H, W]."""
        std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
        return cls(tuple(mean.tolist()), tuple(std.tolist()))


# Checks --------------------------------------------------------------------------------------------------------------


def check_adapter_updates(norms: Mapping[str, float]) -> Finding:
    """Every adapted layer has an update; `norms` of scaling B A by layer."""
    still = [name for name, norm in norms.items() if not 0 < norm < math.inf]
    if still:
        odd = {f"{norms[name]:g}" for name in still}
        return Finding(False, f"{len(still)} of {len(norms)} updates have the norm {', '.join(odd)}: {listed(still)}")
    low, high = min(norms, key=norms.get), max(norms, key=norms.get)
    return Finding(True, f"{len(norms)} layers, norms {norms[low]:.3g} ({low}) to {norms[high]:.3g} ({high})")


def check_lora_audit(results: Mapping[str, Mapping[str, Any]]) -> Finding:
    """What `lora_audit` found while the run trained."""
    failed = [f"{name}: {check['detail']}" for name, check in results.items() if not check["passed"]]
    if failed:
        return Finding(False, f"{len(failed)} of {len(results)} checks failed; {'; '.join(failed)}")
    return Finding(True, f"all {len(results)} checks passed during training")


def check_trainable_parameters(asked: int, trained: int) -> Finding:
    """The run trained as many parameters as its settings ask for."""
    verb = "as the settings ask" if asked == trained else f"the settings ask for {asked:,}"
    return Finding(asked == trained, f"{trained:,} parameters trained, {verb}")


def check_trained_weights(trainable: Collection[str], unchanged: Mapping[str, bool]) -> Finding:
    """What should train differs from the weights that the run started from, and nothing else does.

    Args:
        trainable: names of the parameters that should train.
        unchanged: whether a parameter is bit for bit what it was; those that can be compared.
    """
    still = [name for name, same in unchanged.items() if same and name in trainable]
    moved = [name for name, same in unchanged.items() if not same and name not in trainable]
    problems = []
    if still:
        problems.append(f"{len(still)} tensors should train and are still those of the start: {listed(still)}")
    if moved:
        problems.append(f"{len(moved)} tensors should be frozen and have changed: {listed(moved)}")
    changed = sum(not same for same in unchanged.values())
    held = len(unchanged) - changed
    return Finding(not problems, "; ".join(problems) or f"{changed} tensors have changed, {held} frozen ones have not")


def check_gradients(names: Sequence[str], moments: Sequence[float]) -> Finding:
    """Every parameter that should train has had a gradient: Adam keeps its moments, the largest of each given here."""
    if len(names) != len(moments):
        return Finding(
            False, f"the optimiser held {len(moments)} tensors, {len(names)} should train: look at what is frozen"
        )
    without = [name for name, moment in zip(names, moments, strict=True) if not 0 < moment < math.inf]
    if without:
        return Finding(False, f"{len(without)} of {len(names)} tensors had no finite gradient: {listed(without)}")
    return Finding(True, f"{len(names)} tensors had gradients, the smallest moment is {min(moments):.1e}")


def check_checkpoint_keys(sources: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Finding:
    """Every stored tensor has its place in the network, and every place its tensor.

    Args:
        sources: for each file or folder the shapes by key that it stores, and those that the network loads from it.
    """
    problems = []
    for source, (stored, loaded) in sources.items():
        ignored, missing = sorted(stored.keys() - loaded.keys()), sorted(loaded.keys() - stored.keys())
        shapes = [key for key in stored.keys() & loaded.keys() if tuple(stored[key]) != tuple(loaded[key])]
        for what, keys in (("ignored", ignored), ("missing", missing), ("of another shape", sorted(shapes))):
            if keys:
                problems.append(f"{source}: {len(keys)} of {len(stored)} keys {what}: {listed(keys)}")
    fits = ", ".join(f"{len(stored)} of {source}" for source, (stored, _) in sources.items())
    return Finding(not problems, "; ".join(problems) or f"every key has its place: {fits}")


def check_sizes(sources: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Masked blocks, classes and queries are as many in the weights as wherever else they are said, and the head alike.

    Args:
        sources: what each says; None where it does not.
    """
    problems, agreed = [], []
    for size in dict.fromkeys(name for values in sources.values() for name in values):
        found = {source: values[size] for source, values in sources.items() if values.get(size) is not None}
        if len(set(found.values())) > 1:
            problems.append(f"{size} is " + ", ".join(f"{value} in {source}" for source, value in found.items()))
        elif found:
            agreed.append(f"{size} {next(iter(found.values()))}")
    return Finding(not problems, "; ".join(problems) or f"{', '.join(agreed)} in {', '.join(sources)}")


def check_normalisation(shown: Channels, seen: Channels, expected: Channels, source: str) -> Finding:
    """Pixels are normalised once, by the statistics that the backbone expects.

    Args:
        shown: of images in [0, 1], as they are handed to the network.
        seen: of what then reaches its patch embedding.
        expected: what the backbone was pretrained with.
        source: what the images are.
    """
    std = [a / b if b else math.inf for a, b in zip(shown.std, seen.std, strict=True)]
    mean = [m - s * y for m, s, y in zip(shown.mean, std, seen.mean, strict=True)]
    facts = f"{source}: mean {triple(shown.mean)} and deviation {triple(shown.std)} become {triple(seen.mean)} and "
    facts += triple(seen.std)
    if min(shown.std) < 0.01:  # a picture of street scenes in fog at night has 0.05
        return Finding(False, f"images hardly differ from one grey, as if divided by 255 twice; {facts}")
    once, ways = (expected.mean, expected.std), {}
    ways["once"] = once
    ways["not at all"] = ((0.0,) * 3, (1.0,) * 3)
    ways["twice"] = tuple(m * (1 + s) for m, s in zip(*once, strict=True)), tuple(s * s for s in expected.std)
    way = next((name for name, (m, s) in ways.items() if near(mean, m) and near(std, s)), None)
    used = f"minus {triple(mean)} over {triple(std)}, the backbone expects {triple(expected.mean)} over "
    used += triple(expected.std)
    if way == "once":
        return Finding(True, f"normalised once; {facts}")
    return Finding(False, f"normalised {way or 'otherwise than the backbone expects'}: {used}; {facts}")


def near(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-3) for x, y in zip(a, b, strict=True))


def triple(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in values) + ")"


def check_label_indices(
    num_classes: int,
    names: Sequence[str] | None = None,
    names_of_data: Sequence[str] | None = None,
    pixels: Mapping[int, int] | None = None,
) -> Finding:
    """Classes, "no object", outliers and ignored pixels have labels of their own, in the network and in the data.

    Args:
        num_classes: K; the classes are 0..K-1 and "no object" is K.
        names, names_of_data: of the classes, in their order.
        pixels: how many have each value, in label maps of the data; None without data.
    """
    indices = f"classes 0..{num_classes - 1}, no object {num_classes}, outlier {OUTLIER}, ignored {IGNORE}"
    problems = []
    if num_classes >= OUTLIER:
        problems.append(f"classes and no object reach {num_classes}, and {OUTLIER} means outlier")
    if names and names_of_data and list(names) != list(names_of_data):
        first = next((i for i, (a, b) in enumerate(zip(names, names_of_data, strict=False)) if a != b), None)
        what = (
            f"{len(names)} and {len(names_of_data)} of them"
            if first is None
            else f"{first} is {names[first]!r} here and {names_of_data[first]!r} there"
        )
        problems.append(f"network and data differ in their classes: {what}")
    strange = [value for value in sorted(pixels or ()) if num_classes <= value < OUTLIER]
    for value in strange:
        meaning = "no object" if value == num_classes else "nothing"
        problems.append(f"{pixels[value]:,} pixels have the label {value}, which means {meaning} to the network")
    if pixels is not None and not any(value < num_classes for value in pixels):
        problems.append("no pixel has the label of a class")
    looked = "no data to compare with" if pixels is None else f"labels in the data: {spans(sorted(pixels))}"
    return Finding(not problems, "; ".join([*problems, indices, looked]))


def spans(values: Sequence[int]) -> str:
    """[0, 1, 2, 255] -> `0..2, 255`."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def check_mask_annealing(
    fading: Sequence[tuple[int, int]] | None, steps: int, probabilities: Sequence[float]
) -> Finding:
    """Attention masks have faded out when training ends, since the deployed network has none.

    Args:
        fading: for each masked block, the steps at which its mask starts and ends to fade; None: masks do not fade.
        steps: that the run took.
        probabilities: of a mask in each block, as they are stored.
    """
    if fading is None:
        masked = any(p > 0 for p in probabilities)
        shown = ", ".join(f"{p:g}" for p in probabilities)
        why = "never fade, though the deployed network has none" if masked else "are off, as in the deployed network"
        return Finding(not masked, f"attention masks {why}: probabilities {shown}")
    late = [i for i, (_, end) in enumerate(fading) if end > steps]
    if late:
        start, end = fading[late[-1]]
        left = mask_probability(steps, start, end)
        return Finding(
            False,
            f"{len(late)} of {len(fading)} masks had not faded when the run ended at step {steps:,}: the last one "
            f"fades from step {start:,} to {end:,} and was still at {left:.2f}; the deployed network has none",
        )
    return Finding(True, f"the last mask faded out at step {max(end for _, end in fading):,} of {steps:,}")


def check_evaluation_classes(there: Mapping[str, Mapping[str, bool]]) -> Finding:
    """Every class has pixels in what was evaluated; `there` says so by evaluation and class."""
    problems = []
    for source, classes in there.items():
        if empty := [name for name, has_pixels in classes.items() if not has_pixels]:
            problems.append(f"{source}: {len(empty)} of {len(classes)} classes have no pixel: {listed(empty)}")
    seen = ", ".join(f"{len(classes)} classes in {source}" for source, classes in there.items())
    meaning = "; an mIoU over fewer classes is no mIoU over all"
    return Finding(not problems, "; ".join(problems) + meaning if problems else f"all have pixels: {seen}")


def check_anomaly_scores(benchmarks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Finding:
    """Every score ranks anomalous pixels above others: its AuPRC is above their share, which chance reaches.

    Args:
        benchmarks: results as `scripts/evaluate_anomaly.py` writes them, by benchmark.
    """
    problems, best, number = [], [], 0
    for title, results in benchmarks.items():
        for result in results:
            share, auprc = result["anomalous"] / max(result["valid"], 1), result["auprc"]
            name = f"{result['score']} (T {result['temperature']:g}) on {title}"
            number += 1
            if auprc is None:
                problems.append(f"{name} has no AuPRC")
            elif auprc <= share * (1 + 1e-6):
                kind = "constant" if math.isclose(auprc, share, rel_tol=1e-6) else "inverted, or knows nothing"
                figures = f"AuPRC {100 * auprc:.2f} % where {100 * share:.2f} % of the pixels are anomalous"
                problems.append(f"{name} is {kind}: {figures}")
            else:
                best.append((auprc / share, f"{name}: {100 * auprc:.2f} % at a share of {100 * share:.2f} %"))
    if problems:
        return Finding(False, f"{len(problems)} of {number} scores; {'; '.join(problems)}")
    return Finding(True, f"all {number} are above chance, the least of them {min(best)[1]}")


# Facts ---------------------------------------------------------------------------------------------------------------


def examine(
    path: str | Path, run: str | Path, data: SegmentationDataModule | None = None, no_data: str = "none given"
) -> dict[str, Finding]:
    """Every check on what a run left, by name.

    Args:
        path: an adapter/ or model/ folder, a run's folder, a Lightning checkpoint or a file of weights.
        run: the run's folder, with `summary.json`, `config.yaml`, `checkpoints/`, `evaluation/` and `anomaly/`, as far
            as they are there.
        data: of the run, to look at images and labels; None: scenes are drawn, and labels are not looked at.
        no_data: why there are none.

    Raises:
        FileNotFoundError: neither weights nor a run are there. ValueError: weights that cannot be read.
    """
    patient = Patient(Path(path), Path(run), data, no_data)
    facts: dict[Callable[..., Finding], Callable[[], tuple]] = {
        check_adapter_updates: patient.updates,
        check_lora_audit: patient.audit,
        check_trainable_parameters: patient.parameters,
        check_trained_weights: patient.trained_weights,
        check_gradients: patient.gradients,
        check_checkpoint_keys: patient.keys,
        check_sizes: patient.sizes,
        check_normalisation: patient.pixels,
        check_label_indices: patient.labels,
        check_mask_annealing: patient.annealing,
        check_evaluation_classes: patient.classes,
        check_anomaly_scores: patient.scores,
    }
    return {name_of(check): attempt(check, gather) for check, gather in facts.items()}


def name_of(check: Callable[..., Finding]) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")


def attempt(check: Callable[..., Finding], gather: Callable[[], tuple]) -> Finding:
    """The check on its facts; a ValueError in gathering them is a fault by itself, with its own sentence."""
    try:
        return check(*gather())
    except NothingThere as why:
        return Finding(None, str(why))
    except ValueError as error:
        return Finding(False, str(error))


class Patient:
    """Gathers the facts; each method returns the arguments of one check, or raises `NothingThere`."""

    def __init__(self, path: Path, run: Path, data: SegmentationDataModule | None, no_data: str) -> None:
        self.run, self.data, self.no_data = run, data, no_data
        self.summary: dict[str, Any] = read_json(run / "summary.json") or {}
        config = run / "config.yaml"
        self.config: dict[str, Any] = (yaml.safe_load(config.read_text()) if config.is_file() else None) or {}
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

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The weights that the run started from, at this network's image size."""
        path = self.init.get("ckpt_path")
        if not path:
            first = "timm's pretrained" if self.init.get("pretrained") else "random"
            raise NothingThere(f"the run started from {first} weights, which are not here")
        if not Path(path).expanduser().exists():
            raise NothingThere(f"the weights that the run started from are not there: {path}")
        state, size = read_checkpoint(choose(path))
        resample_to(state, size, tuple(self.init["img_size"]), self.init["patch_size"])
        return state

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
        factors = [sum(f".lora_{letter}" in key for key in self.state) for letter in "AB"]
        if not any(factors):
            raise NothingThere("no adapter")
        if factors[0] != factors[1]:
            raise ValueError("the adapter holds {} tensors lora_A and {} tensors lora_B".format(*factors))
        return ({name: update["norm"] for name, update in inspect_model(self.path)["updates"].items()},)

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
        """Shapes by key: stored and loaded, of the artefact and of the start weights."""
        stored = {plain(key): tensor.shape for key, tensor in self.state.items()}
        sources = {self.path.name if self.path else "": (stored, self.loaded())}
        try:
            start = self.start
        except NothingThere:
            return (sources,)
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
            sources["config.yaml"] = {size: self.config.get("model", {}).get(size) for size in sizes}
        if self.data:
            sources["the data"] = {"num_classes": self.data.num_classes}
        return (sources,)

    def pixels(self) -> tuple:
        """Statistics of images before and after the network's own normalisation."""
        encoder = self.module.network.encoder
        config = encoder.backbone.pretrained_cfg
        for name, usual in (("pixel_mean", config["mean"]), ("pixel_std", config["std"])):
            stored = self.state.get(f"encoder.{name}", torch.tensor(usual).reshape(1, 3, 1, 1))
            setattr(encoder, name, stored.float())
        images, source = self.images()
        shown = images / 255  # as training and prediction do
        seen = reaching_patches(encoder, shown)
        return Channels.of(shown), Channels.of(seen), Channels(tuple(config["mean"]), tuple(config["std"])), source

    def images(self) -> tuple[Tensor, str]:
        """Some training crops [N, 3, H, W], or drawn scenes of that size, and what they are."""
        if self.data is not None:
            crops = [self.data.train_set[index, 0][0] for index in spread(len(self.data.train_set), CROPS)]
            return torch.stack(crops), f"{len(crops)} training crops"
        size = tuple(self.init["img_size"])
        scenes = [draw_scene(np.random.default_rng(seed), size, "clear")[0] for seed in range(SCENES)]
        return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2), f"drawn scenes (no data: {self.no_data})"

    def labels(self) -> tuple:
        """Classes of the network and of the data, and values of label maps."""
        check_indices(indices_of(self.module, self.data))
        num_classes, names = self.module.hparams.num_classes, self.init.get("class_names")
        if self.data is None:
            return num_classes, names
        pixels = torch.zeros(256, dtype=torch.int64)
        for dataset in (self.data.train_set, self.data.val_set):
            for index in spread(len(dataset), LABEL_MAPS):
                pixels += torch.bincount(dataset.labels(index).flatten(), minlength=256)
        found = {value: count for value, count in enumerate(pixels.tolist()) if count}
        return num_classes, names, self.data.classes.names, found

    def annealing(self) -> tuple:
        """When the masks fade, as the module resolves it for the whole run that was configured."""
        steps, module = self.steps(), self.module
        if not module.network.masked_attn_enabled:
            raise NothingThere("trained without masked attention")
        probabilities = self.state["attn_mask_probs"].tolist() if "attn_mask_probs" in self.state else []
        if not module.anneals:
            return None, steps, probabilities
        given = (module.hparams.attn_mask_annealing_start, module.hparams.attn_mask_annealing_end)
        fading = resolve_annealing(*given, module.network.num_blocks, self.planned_steps(steps))
        return fading, steps, probabilities

    def planned_steps(self, steps: int) -> int:
        """Optimiser steps that the configuration asked for: the schedules are fractions of these."""
        trainer = self.config.get("trainer", {})
        lengths = [trainer["max_steps"]] if (trainer.get("max_steps") or -1) > 0 else []
        if (trainer.get("max_epochs") or -1) > 0 and (self.run / "checkpoints" / "last.ckpt").is_file():
            lengths.append(round(trainer["max_epochs"] * self.last["global_step"] / (self.last["epoch"] + 1)))
        return min(lengths, default=steps)

    def classes(self) -> tuple:
        """Which classes have pixels, in the run's validation and in `evaluation/`."""
        there: dict[str, dict[str, bool]] = {}
        if self.summary.get("class_iou"):
            there["the run's validation"] = {name: iou is not None for name, iou in self.summary["class_iou"].items()}
        for file in sorted((self.run / "evaluation").glob("*.npz")):
            facts = read_json(file.with_suffix(".json"))
            if facts is not None:
                targets = np.load(file)["confusion"].sum((0, 2))  # of [N, target, prediction]
                there[f"evaluation/{file.stem}"] = dict(zip(facts["classes"], (targets > 0).tolist(), strict=True))
        if not there:
            raise NothingThere("no validation in summary.json, and no evaluation/*.npz")
        return (there,)

    def scores(self) -> tuple:
        """What `anomaly/` holds."""
        files = [read_json(file) for file in sorted((self.run / "anomaly").glob("*.json"))]
        benchmarks = {facts["title"]: facts["results"] for facts in files if facts.get("results")}
        if not benchmarks:
            raise NothingThere("no anomaly/*.json, which scripts/evaluate_anomaly.py writes")
        return (benchmarks,)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content; None if it is not there, ValueError if it is no JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be half-written") from error


def plain(key: str) -> str:
    """A state-dict key under the name that it has in a run's folder: PEFT's files leave the adapter's own name out."""
    key = clean_key(key).removeprefix("base_model.model.")
    if not is_lora(key):
        return key
    return key.removeprefix(BACKBONE).replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices, evenly over the whole length."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


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
