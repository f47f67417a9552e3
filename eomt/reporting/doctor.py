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
from zipfile import BadZipFile

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from eomt.command_line import one_sentence
from eomt.data.labels import IGNORE, OUTLIER
from eomt.data.toy_scene import draw_scene
from eomt.models.checkpoint import CLASS_HEAD, NOT_WEIGHTS, OPTIONAL_KEYS, clean_key, describe, read_checkpoint
from eomt.reporting.cost import build_without_weights
from eomt.reporting.inspection import BACKBONE, by_number, choose, inspect_model, read, resample_to
from eomt.training.index_check import check_indices, indices_of
from eomt.training.param_groups import param_groups
from eomt.training.pretrained import BASE_FILE, read_lightning, set_settings
from eomt.training.schedules import mask_probability, resolve_annealing
from lora_config import base_tensors, combine_hashes, hash_tensors, is_lora, listed, stored_updates

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.data.dataset import SegmentationDataset
    from eomt.models.vit import ViT
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SIZES = ("num_blocks", "num_classes", "num_q", "head")
ADAM = ("exp_avg", "exp_avg_sq")  # the moments of gradients that the optimiser keeps
CROPS, LABEL_MAPS, SCENES = 8, 50, 2  # how many are looked at
# Share of values at 0 or 255 from which images were clipped. CamVid has 0.11, its darkest image 0.30; toy streets have
# 0.001 by day, and 0.01 in fog at night. Normalised and saved, they have 0.87, 0.67 and 0.97; the least of them 0.51.
CLIPPED = 0.4
RESULT = {"score": str, "temperature": float | int, "auprc": float | int | None, "anomalous": int, "valid": int}


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


def check_checkpoint_keys(
    sources: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], misfit: str | None = None
) -> Finding:
    """Every stored tensor has its place in the network, and every place its tensor; an adapter fits its base.

    Args:
        sources: for each file or folder the shapes by key that it stores, and those that the network loads from it.
        misfit: why the base is not that of the adapter, if it is not.
    """
    problems = [misfit] if misfit else []
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
        elif len(found) > 1:
            agreed.append(f"{size} {next(iter(found.values()))}")
    return Finding(not problems, "; ".join(problems) or f"{', '.join(agreed)} in {', '.join(sources)}")


def check_normalisation(shown: Channels, seen: Channels, expected: Channels, source: str, clipped: float) -> Finding:
    """Pixels are normalised once, by the statistics that the backbone expects, and were not before they were saved.

    Args:
        shown: of images in [0, 1], as they are handed to the network.
        seen: of what then reaches its patch embedding.
        expected: what the backbone was pretrained with.
        source: what the images are.
        clipped: share of their values, before augmentation, that are exactly 0 or 255.
    """
    std = [a / b if b else math.inf for a, b in zip(shown.std, seen.std, strict=True)]
    mean = [m - s * y for m, s, y in zip(shown.mean, std, seen.mean, strict=True)]
    facts = f"{source}: mean {triple(shown.mean)} and deviation {triple(shown.std)} become {triple(seen.mean)} and "
    facts += f"{triple(seen.std)}; {100 * clipped:.1f} % of the stored values are 0 or 255"
    if min(shown.std) < 0.01:  # a picture of street scenes in fog at night has 0.05
        return Finding(False, f"images hardly differ from one grey, as if divided by 255 twice; {facts}")
    if clipped > CLIPPED:
        return Finding(False, f"images are clipped, as if normalised before they were saved; {facts}")
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


def check_evaluation_classes(there: Mapping[str, Mapping[str, bool | None]]) -> Finding:
    """Every class has pixels in what was evaluated.

    Args:
        there: whether it has, by evaluation and class; None where that cannot be told.
    """
    problems, doubts = [], []
    for source, classes in there.items():
        if empty := [name for name, has_pixels in classes.items() if has_pixels is False]:
            problems.append(f"{source}: {len(empty)} of {len(classes)} classes have no pixel: {listed(empty)}")
        if unknown := [name for name, has_pixels in classes.items() if has_pixels is None]:
            doubts.append(f"{source}: {listed(unknown)} may have no pixel: an IoU of 0, and no count of pixels")
    if problems:
        return Finding(False, "; ".join([*problems, *doubts]) + "; an mIoU over fewer classes is no mIoU over all")
    if doubts:
        return Finding(None, "; ".join(doubts))
    return Finding(
        True, "all have pixels: " + ", ".join(f"{len(c)} classes in {source}" for source, c in there.items())
    )


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
            elif not auprc > share * (1 + 1e-6):  # NaN is none either
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
    path: str | Path,
    run: str | Path,
    data: SegmentationDataModule | None = None,
    no_data: str = "none given",
    ckpt_path: str | Path | None = None,
) -> dict[str, Finding]:
    """Every check on what a run left, by name.

    Args:
        path: an adapter/ or model/ folder, a run's folder, a Lightning checkpoint or a file of weights.
        run: the run's folder, with `summary.json`, `config.yaml`, `checkpoints/`, `evaluation/` and `anomaly/`, as far
            as they are there.
        data: of the run, to look at images and labels; None: scenes are drawn, and labels are not looked at.
        no_data: why there are none.
        ckpt_path: the weights that the run started from, if they have moved.

    Raises:
        FileNotFoundError: neither weights nor a run are there, or nothing at `ckpt_path`.
        ValueError: weights that cannot be read.
    """
    patient = Patient(Path(path), Path(run), data, no_data, ckpt_path)
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
    """The check on its facts; what cannot be read or is wrong in itself is a fault, with its own sentence."""
    try:
        return check(*gather())
    except NothingThere as why:
        return Finding(None, str(why))
    except (ValueError, OSError) as error:
        return Finding(False, str(error))


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
            sources["config.yaml"] = {size: self.config.get("model", {}).get(size) for size in sizes}
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
        trainer = self.config.get("trainer", {})  # a summary of an older version
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


def read_evaluation(file: Path, facts: Mapping[str, Any]) -> dict[str, bool]:
    """Which classes have pixels in what `scripts/evaluate.py` wrote; ValueError if it is something else."""
    try:
        targets = np.load(file)["confusion"].sum((0, 2))  # of [N, target, prediction]
        return dict(zip(facts["classes"], (targets > 0).tolist(), strict=True))
    except (ValueError, LookupError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{file} and {file.stem}.json are not what scripts/evaluate.py writes: {error}") from error


def read_scores(file: Path) -> tuple[str, list[dict[str, Any]]]:
    """A benchmark's title and results as `scripts/evaluate_anomaly.py` writes them.

    Raises:
        ValueError: it is something else.
    """
    facts = read_json(file)
    title, results = facts.get("title"), facts.get("results")
    kinds = {"title": (title, str), "results": (results, list)}
    wrong = [name for name, (found, kind) in kinds.items() if not (found and isinstance(found, kind))]
    if not wrong:
        wrong = [name for name, kind in RESULT.items() if not all(holds(result, name, kind) for result in results)]
    if wrong:
        raise ValueError(f"{file} is not what scripts/evaluate_anomaly.py writes: look at {', '.join(wrong)} in it")
    return title, results


def holds(result: Any, name: str, kind: Any) -> bool:
    """Whether a result has a value of this kind."""
    return isinstance(result, dict) and name in result and isinstance(result[name], kind)


def read_json(path: Path) -> dict[str, Any] | None:
    """`read_settings` of a JSON file."""
    return read_settings(path, json.loads)


def read_settings(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    """The file's content; None if it is not there, ValueError if it cannot be parsed or is no mapping."""
    if not path.is_file():
        return None
    try:
        content = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({one_sentence(error)}): it may be half-written") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where names and values should be: look at it")
    return content


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
