"""Means of the runs of each variant, and intervals of their differences."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from eomt.anomaly.benchmarks import BENCHMARKS
from eomt.comparison.bootstrap import Units, bootstrap_iou, image_weights, mean_over_seeds, units
from eomt.comparison.counts import mean_iou, nanmean
from eomt.comparison.differences import UNKNOWN, Difference, differences, machinery_notes, run_names
from eomt.comparison.runs import AnomalyEvaluation, Evaluation, Run

USUAL = ("full", "baseline")  # what others are compared to, unless told otherwise
FEW_SEEDS = 3  # with fewer, nothing is measured but these seeds


@dataclass(frozen=True)
class Delta:
    """A difference to the baseline in [-1, 1], with its 95 % interval where images or seeds could be resampled."""

    value: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()  # the difference in each common seed

    @property
    def reading(self) -> str:
        """`above`, `below`, `no measurable difference`, `seeds disagree`, or `unknown` without an interval."""
        if self.low is None:
            return UNKNOWN
        if self.low <= 0 <= self.high:
            return "no measurable difference"
        if self.seeds_disagree:
            return "seeds disagree"
        return "above" if self.low > 0 else "below"

    @property
    def seeds_disagree(self) -> bool:
        """Whether some seeds are above the baseline and others below."""
        return min(self.seeds, default=0) < 0 < max(self.seeds, default=0)

    @property
    def few_seeds(self) -> str:
        """`one seed` or `2 seeds` where there are too few of them to say how another would turn out; else nothing."""
        count = len(self.seeds)
        return "" if count >= FEW_SEEDS else "one seed" if count == 1 else f"{count} seeds"

    @property
    def seed_sd(self) -> float | None:
        """Sample standard deviation of the seeds' differences; None for one seed."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None


def delta_of(seeds: Sequence[float], resampled: np.ndarray | None) -> Delta:
    """The mean over seeds, with the 2.5 and 97.5 percentiles of the resampled values [B]; NaN does not count."""
    value = statistics.fmean(seeds)
    if resampled is None or np.isnan(resampled).all():
        return Delta(value, seeds=tuple(seeds))
    low, high = np.clip(np.nanpercentile(resampled, [2.5, 97.5]), -1, 1)
    return Delta(value, float(low), float(high), tuple(seeds))


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and the sample standard deviation; None for one seed."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass
class Variant:
    """The runs of one variant, over seeds; failed ones count nowhere but in `failed`."""

    name: str
    runs: list[Run]
    failed: list[Run]
    miou: Spread | None = None
    delta: Delta | None = None  # None: no seed in common with the baseline
    delta_seeds: int = 0
    class_delta: dict[str, Delta] = field(default_factory=dict)
    source: Spread | None = None
    source_change: float | None = None  # source mIoU minus that of the untrained network
    marked: bool = False  # not comparable with the baseline

    @property
    def untrained(self) -> bool:
        return bool(self.runs) and all(run.steps == 0 for run in self.runs)

    @property
    def once(self) -> bool:
        """Whether one run without training is all there is of it."""
        return self.untrained and len(self.runs) == 1

    @property
    def uses_lora(self) -> bool:
        return any(run.uses_lora for run in self.runs)

    @property
    def seeds(self) -> str:
        """`3`, or `2 of 3` where a run failed."""
        total = len(self.runs) + len(self.failed)
        return f"{len(self.runs)} of {total}" if self.failed else str(total)

    def class_iou(self, name: str) -> "Spread | None":
        """The IoU of a class over seeds; None where no run has one."""
        return Spread.of(self.known(lambda run: run.target.class_iou.get(name)))

    def known(self, value: Callable[[Run], Any]) -> list[Any]:
        """Collects the values that the runs tell, without the silent ones."""
        return [v for v in map(value, self.runs) if v is not None]

    @property
    def trainable(self) -> int | None:
        return max(self.known(lambda run: run.trainable), default=None)

    @property
    def share(self) -> float | None:
        """The share of its parameters that train."""
        total = max(self.known(lambda run: run.summary.get("total_parameters")), default=0)
        return self.trainable / total if total and self.trainable is not None else None

    @property
    def memory(self) -> int | None:
        """The highest peak over seeds, bytes."""
        return max(self.known(lambda run: (run.summary.get("peak_memory") or {}).get("bytes")), default=None)


@dataclass
class Comparison:
    """Everything that a report says, before it is put into words and pictures."""

    runs: list[Run]
    variants: list[Variant]
    baseline: str
    differences: list[Difference]
    notes: list[str]
    same_machinery: bool  # machines, libraries and code are equal: times and memory can be compared
    score: str | None = None  # by which anomalies are ranked, in the whole table
    tuning_notes: list[str] = field(default_factory=list)  # what was chosen for which variants; none: nothing

    def __getitem__(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def seedless(self) -> list[str]:
        """The variants without training whose one run stands for every seed of the others."""
        seeds = {run.seed for variant in self.variants for run in variant.runs}
        return [
            v.name
            for v in self.variants
            if v.once and len(seeds) > 1 and all(stands_for(v.runs[0], run) for o in self.variants for run in o.runs)
        ]

    @property
    def failed(self) -> list[Run]:
        return [run for run in self.runs if run.error is not None]

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation of the baseline's first run."""
        return self[self.baseline].runs[0].target

    @cached_property
    def units(self) -> Units:
        """How the images of that evaluation are resampled."""
        base = self[self.baseline]
        return drawn_together(base).get(self.evaluation.images) or units(len(self.evaluation.images))

    @property
    def few_sequences(self) -> str:
        """`one sequence` or `3 sequences` where all images are frames of so few that blocks are drawn; else nothing."""
        runs = self[self.baseline].runs if self.units.kind == "blocks" else []
        count = len({name for run in runs for name in run.target.sequences if name is not None})
        return "" if not count else "one sequence" if count == 1 else f"{count} sequences"

    @cached_property
    def benchmarks(self) -> dict[str, AnomalyEvaluation]:
        """The anomaly benchmarks that were run, in the order of tables, each as its first run found it."""
        runs = [run for variant in self.variants for run in variant.runs]
        found = {name: run.anomalies[name] for run in reversed(runs) for name in run.anomalies}
        return {name: found[name] for name in BENCHMARKS if name in found}

    @property
    def scores(self) -> list[str]:
        """The anomaly scores that the table shows: the one, and beside `rba` or `max_logit` the other."""
        other = {"rba": "max_logit", "max_logit": "rba"}.get(self.score)
        told = {score for name in self.benchmarks for scores in self.known(name, lambda e: e.auprc) for score in scores}
        return [score for score in (self.score, other) if score in told]

    def known(self, benchmark: str, value: Callable[[AnomalyEvaluation], Any]) -> list[Any]:
        """Collects the values that the runs tell of a benchmark, without the silent ones."""
        found = [run.anomalies[benchmark] for v in self.variants for run in v.runs if benchmark in run.anomalies]
        return [v for v in map(value, found) if v is not None]

    @property
    def others(self) -> list[Variant]:
        """The variants with a score that are not the baseline."""
        return [v for v in self.variants if v.runs and v.name != self.baseline]


def compare(runs: Sequence[Run], baseline: str | None = None, score: str | None = None) -> Comparison:
    """Means over seeds, differences to the baseline, and costs.

    The difference is the mean over the seeds that both variants have of mIoU(variant) - mIoU(baseline). Its interval
    comes from 2,000 resamples of these seeds and, independently, of the images, the same ones for both variants and
    all seeds; see `mean_over_seeds`. Images are drawn as `units` groups them.

    Args:
        runs: see `load_runs`.
        baseline: a variant; None takes `full` or `baseline`, or else the one with most trainable parameters.
        score: of anomalies, one for all columns; None takes `rba`, or else the first that a run has.

    Raises:
        ValueError: two runs share variant and seed, no run has a score, the baseline is none of those that have, or no
            run has the anomaly score that was asked for.
    """
    check_unique(runs)
    names = list(dict.fromkeys(run.variant for run in runs))
    variants = [
        Variant(
            name,
            [run for run in runs if run.variant == name and run.error is None],
            [run for run in runs if run.variant == name and run.error is not None],
        )
        for name in names
    ]
    reference = _baseline(variants, baseline)
    found = differences(runs)
    marked = {name for difference in found for name in difference.variants(reference.name)}
    drawn = drawn_together(reference)
    weights = {names: image_weights(together) for names, together in drawn.items()}
    resampled = {  # IoU [1 + B, K] of every run that can be paired
        id(run): bootstrap_iou(run.target.counts, weights[run.target.images])
        for variant in variants
        for run in variant.runs
        if run.target.counts is not None and run.target.images in weights
    }
    start = next((variant for variant in variants if variant.untrained), None)
    for variant in variants:
        variant.marked = variant.name in marked
        variant.miou = Spread.of([run.target.miou for run in variant.runs])
        variant.source = Spread.of(
            [run.evaluations["source"].miou for run in variant.runs if "source" in run.evaluations]
        )
        _set_deltas(variant, reference, resampled, drawn)
        if start and variant is not start:
            variant.source_change = _source_change(variant, start)
    machinery = machinery_notes(runs)
    resumed = [run for run in runs if run.parts > 1]
    notes = [f"Resumed: {run_names(resumed)}."] if resumed else []
    return Comparison(
        runs=list(runs),
        variants=variants,
        baseline=reference.name,
        differences=found,
        notes=machinery + notes,
        same_machinery=not machinery,
        score=_score(runs, score),
    )


def check_unique(runs: Sequence[Run]) -> None:
    """Raises ValueError where two runs share variant, seed and number of training images."""
    seen: dict[tuple[str, int | None, int | None], Run] = {}
    for run in runs:
        other = seen.setdefault((run.variant, run.seed, run.subset), run)
        if other is not run:
            raise ValueError(f"{run} occurs twice, in {other.path} and {run.path}: leave one out or name its variant")


def _baseline(variants: Sequence[Variant], name: str | None) -> Variant:
    scored = {variant.name: variant for variant in variants if variant.runs}
    if not scored:
        reasons = [f"{run}: {run.error}" for variant in variants for run in variant.failed]
        raise ValueError("No run has a score to compare: " + ("; ".join(reasons) or "no run was given"))
    if name is not None and name not in scored:
        raise ValueError(f"baseline {name!r} is no variant with a score; choose from {', '.join(scored)}")
    if name is None:
        usual = [known for known in USUAL if known in scored]
        name = usual[0] if usual else max(scored, key=lambda key: scored[key].trainable or 0)
    return scored[name]


def _score(runs: Sequence[Run], name: str | None) -> str | None:
    known = dict.fromkeys(
        score for run in runs if run.error is None for found in run.anomalies.values() for score in found.auprc
    )
    if name is not None and name not in known:
        raise ValueError(
            f"score {name!r}: no run has anomaly results of it; choose from {', '.join(known) or 'none'}, or compute "
            "it with scripts/evaluate_anomaly.py RUN data=... scores=[...] temperatures=[...]"
        )
    return name or ("rba" if "rba" in known else next(iter(known), None))


def drawn_together(reference: Variant) -> dict[tuple[str, ...], Units]:
    """How the images are resampled that the baseline's runs were evaluated on; sequences are as one of them tells."""
    told: dict[tuple[str, ...], tuple[str | None, ...]] = {}
    for run in reference.runs:
        if run.target.counts is not None:
            told[run.target.images] = told.get(run.target.images) or run.target.sequences
    return {images: units(len(images), sequences) for images, sequences in told.items()}


def pairs(variant: Variant, other: Variant) -> list[tuple[Run, Run]]:
    """The runs of both, for each seed that they share; a single untrained run stands for all that start from it."""
    if variant.once:
        return [(variant.runs[0], run) for run in other.runs if stands_for(variant.runs[0], run)]
    if other.once:
        return [(run, other.runs[0]) for run in variant.runs if stands_for(other.runs[0], run)]
    theirs = {run.seed: run for run in other.runs}
    return [(run, theirs[run.seed]) for run in variant.runs if run.seed in theirs]


def stands_for(untrained: Run, run: Run) -> bool:
    """Whether an untrained run is what a run started from: of its seed, or known to have the same weights."""
    known = untrained.start.exact and run.start.exact
    return untrained.seed == run.seed or bool(known and untrained.start.difference(run.start) is None)


def _set_deltas(
    variant: Variant, baseline: Variant, resampled: Mapping[int, np.ndarray], drawn: Mapping[tuple[str, ...], Units]
) -> None:
    """Differences of mIoU and of every class IoU, with intervals where all runs have counts on the same images."""
    both = pairs(variant, baseline)
    if not both:
        return
    variant.delta_seeds = len(both)
    runs = [run for pair in both for run in pair]
    alike = len({(run.target.images, run.target.classes) for run in runs}) == 1
    paired = alike and all(id(run) in resampled for run in runs)
    resamples = np.stack([np.stack([resampled[id(a)], resampled[id(b)]]) for a, b in both]) if paired else None
    changes = per_class = None
    if resamples is not None:
        together, scores = drawn[runs[0].target.images], nanmean(resamples, -1)  # [seeds, 2, 1 + B]
        changes = mean_over_seeds(scores[:, 0] - scores[:, 1], together)
        per_class = mean_over_seeds(resamples[:, 0] - resamples[:, 1], together)
    variant.delta = delta_of([a.target.miou - b.target.miou for a, b in both], changes)
    for k, name in enumerate(variant.runs[0].target.classes):
        scores = [(a.target.class_iou.get(name), b.target.class_iou.get(name)) for a, b in both]
        known = [a - b for a, b in scores if a is not None and b is not None]
        if known:
            variant.class_delta[name] = delta_of(known, None if per_class is None else per_class[:, k])


def _source_change(variant: Variant, start: Variant) -> float | None:
    changes = [
        a.evaluations["source"].miou - b.evaluations["source"].miou
        for a, b in pairs(variant, start)
        if "source" in a.evaluations and "source" in b.evaluations
    ]
    return statistics.fmean(changes) if changes else None


def image_gains(run: Run, baseline: Run) -> np.ndarray | None:
    """mIoU(run) - mIoU(baseline) of every image [N]; None where they were not evaluated on the same ones."""
    ours, theirs = run.target, baseline.target
    if ours.counts is None or theirs.counts is None or (ours.images, ours.classes) != (theirs.images, theirs.classes):
        return None
    return mean_iou(ours.counts) - mean_iou(theirs.counts)
