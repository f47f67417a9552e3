"""Each check is a small function of facts, and says its evidence."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eomt.indices import IGNORE, OUTLIER
from eomt.training.schedules import mask_probability
from lora_config import listed

# Share of values at 0 or 255 from which images were clipped. CamVid has 0.11, its darkest image 0.30; toy streets have
# 0.001 by day, and 0.01 in fog at night. Normalised and saved, they have 0.87, 0.67 and 0.97; the least of them 0.51.
CLIPPED = 0.4


@dataclass(frozen=True)
class Finding:
    """The result of a check: `passed` is None where there was nothing to look at, and `evidence` says why."""

    passed: bool | None
    evidence: str

    @property
    def result(self) -> str:
        return {True: "passed", False: "failed", None: "not checked"}[self.passed]


@dataclass(frozen=True)
class Channels:
    """Mean and deviation of pixels, for each colour."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> Channels:
        """Measures float images [N, 3, H, W]."""
        std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
        return cls(tuple(mean.tolist()), tuple(std.tolist()))


def check_adapter_updates(norms: Mapping[str, float]) -> Finding:
    """Every adapted layer has an update; `norms` of scaling B A by layer."""
    still = [name for name, norm in norms.items() if not 0 < norm < math.inf]
    if still:
        odd = {f"{norms[name]:g}" for name in still}
        return Finding(False, f"{len(still)} of {len(norms)} updates have the norm {', '.join(odd)}: {listed(still)}")
    low, high = min(norms, key=norms.get), max(norms, key=norms.get)
    return Finding(True, f"{len(norms)} layers, norms {norms[low]:.3g} ({low}) to {norms[high]:.3g} ({high})")


def check_lora_audit(results: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Every check that `lora_audit` made while the run trained has passed."""
    failed = [f"{name}: {check['detail']}" for name, check in results.items() if not check["passed"]]
    if failed:
        return Finding(False, f"{len(failed)} of {len(results)} checks failed; {'; '.join(failed)}")
    return Finding(True, f"all {len(results)} checks passed during training")


def check_trainable_parameters(asked: int, trained: int) -> Finding:
    """The run trained as many parameters as its settings ask for."""
    verb = "as the settings ask" if asked == trained else f"the settings ask for {asked:,}"
    return Finding(asked == trained, f"{trained:,} parameters trained, {verb}")


def check_trained_weights(trainable: Collection[str], unchanged: Mapping[str, bool]) -> Finding:
    """Tensors that should train differ from the weights that the run started from, and no others do.

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
    facts = f"{source}: mean {_triple(shown.mean)} and deviation {_triple(shown.std)} become {_triple(seen.mean)} and "
    facts += f"{_triple(seen.std)}; {100 * clipped:.1f} % of the stored values are 0 or 255"
    if min(shown.std) < 0.01:  # a picture of street scenes in fog at night has 0.05
        return Finding(False, f"images hardly differ from one grey, as if divided by 255 twice; {facts}")
    if clipped > CLIPPED:
        return Finding(False, f"images are clipped, as if normalised before they were saved; {facts}")
    once, ways = (expected.mean, expected.std), {}
    ways["once"] = once
    ways["not at all"] = ((0.0,) * 3, (1.0,) * 3)
    ways["twice"] = tuple(m * (1 + s) for m, s in zip(*once, strict=True)), tuple(s * s for s in expected.std)
    way = next((name for name, (m, s) in ways.items() if _near(mean, m) and _near(std, s)), None)
    used = f"minus {_triple(mean)} over {_triple(std)}, the backbone expects {_triple(expected.mean)} over "
    used += _triple(expected.std)
    if way == "once":
        return Finding(True, f"normalised once; {facts}")
    return Finding(False, f"normalised {way or 'otherwise than the backbone expects'}: {used}; {facts}")


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-3) for x, y in zip(a, b, strict=True))


def _triple(values: Iterable[float]) -> str:
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


def spans(values: Sequence[int], dash: str = "..") -> str:
    """Returns `0..2, 255` for [0, 1, 2, 255]."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}{dash}{run[-1]}" for run in runs)


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
