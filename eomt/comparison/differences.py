"""Finds the runs that may not stand in one table."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eomt.comparison.runs import AnomalyEvaluation, Evaluation, Run
from eomt.data.identity import OF_CONTENT

UNKNOWN = "unknown"
OTHER_KIND = f"; {OF_CONTENT} is of contents, the others are of archives' checksums or, by an earlier version, of sizes"
PIXELS = 0.01  # relative distance that whole numbers explain, where images were resized on different processors


@dataclass(frozen=True)
class Difference:
    """A condition that runs do not share, or are not known to share: each value with the runs that have it."""

    aspect: str
    seed: int | None  # the seed it is about, for what only runs of one seed must share
    values: dict[str, tuple[Run, ...]]

    def __str__(self) -> str:
        where = "" if self.seed is None else f" of seed {self.seed}"
        kinds = Counter(value.startswith(OF_CONTENT) for value in self.values if value != UNKNOWN)
        verb = "differ" if max(kinds.values(), default=0) > 1 else "are not known to be equal"
        return (
            f"{self.aspect}{where} {verb}: "
            + "; ".join(f"{v} in {run_names(runs)}" for v, runs in self.values.items())
            + OTHER_KIND * (len(kinds) > 1)
        )

    def variants(self, baseline: str) -> set[str]:
        """Names the variants that differ from the baseline; all, where the baseline itself is unclear."""
        ours = {value for value, runs in self.values.items() for run in runs if run.variant == baseline}
        alike = ours if len(ours) == 1 and UNKNOWN not in ours else set()
        return {run.variant for value, runs in self.values.items() if value not in alike for run in runs}


@dataclass(frozen=True)
class Aspect:
    """Something that runs must share to be compared; `value` is None where a run does not tell."""

    name: str
    value: Callable[[Run], Any]
    per_seed: bool = False
    of_training: bool = False  # says nothing about a run of 0 steps
    among: Callable[[Run], Any] = lambda run: None  # only runs that agree in this must share it
    if_told: bool = False  # runs that do not tell are left aside
    alike: Callable[[Run, Run], bool] | None = None  # where values may differ between machines, by rounding


def short_hash(digest: str | None) -> str | None:
    """The first letters of a hash, behind what says its kind."""
    kind, colon, digits = (digest or "").rpartition(":")
    return digest and f"{kind}{colon}{digits[:12]}"


def _evaluation_aspects(domain: str, prefix: str) -> list[Aspect]:
    def of(value: Callable[[Evaluation], Any]) -> Callable[[Run], Any]:
        return lambda run: value(run.evaluations[domain])

    return [
        Aspect(f"{prefix}evaluated images", of(lambda e: short_hash(e.data))),
        Aspect(f"{prefix}classes", of(lambda e: ", ".join(e.classes))),
        Aspect(f"{prefix}evaluation sizes", of(lambda e: "x".join(map(str, e.img_size)))),
        Aspect(f"{prefix}evaluation precisions", of(lambda e: e.precision)),
    ]


def _anomaly_aspects(benchmark: str, title: str) -> list[Aspect]:
    def of(value: Callable[[AnomalyEvaluation], Any]) -> Callable[[Run], Any]:
        return lambda run: value(run.anomalies[benchmark])

    return [
        Aspect(f"{title}: evaluated images", of(lambda a: short_hash(a.data)), if_told=True),
        Aspect(f"{title}: numbers of images", of(lambda a: a.images)),
        Aspect(f"{title}: labels", of(lambda a: f"{a.anomalous:,} of {a.valid:,} pixels anomalous")),
        Aspect(f"{title}: evaluation sizes", of(lambda a: "x".join(map(str, a.img_size)))),
        Aspect(f"{title}: evaluation precisions", of(lambda a: a.precision)),
    ]


ASPECTS = [
    Aspect("choices of the evaluated network", lambda run: run.kept, of_training=True),
    Aspect("images per step", lambda run: run.images_per_step, of_training=True),
    Aspect("training data", lambda run: short_hash((run.summary.get("data") or {}).get("train"))),
    Aspect("validation data", lambda run: short_hash((run.summary.get("data") or {}).get("val"))),
    *_evaluation_aspects("target", ""),
    Aspect(
        "start weights",
        lambda run: short_hash(run.summary.get("start_fingerprint")),
        alike=lambda a, b: a.start.difference(b.start) is None,
        per_seed=True,
        among=lambda run: run.class_head,
    ),
    Aspect(
        "training batches",
        lambda run: short_hash(run.summary.get("batches")),
        alike=lambda a, b: a.batches.difference(b.batches, PIXELS) is None,
        per_seed=True,
        of_training=True,
        among=lambda run: run.pasted,
    ),
    Aspect("numbers of steps", lambda run: run.steps, of_training=True),
]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Lists the conditions that keep these runs out of one table: unequal or, in old runs, unknown.

    Failed runs are left aside. Start weights and training batches must be equal among the runs of a seed, everything
    else among all; a run of 0 steps has neither steps nor batches to compare. Another class head starts from other
    weights, and objects pasted on the scenes make other batches: each is compared among the runs that agree in that.
    Evaluations on the source domain, and of an anomaly benchmark, are compared among the runs that have one.
    """
    scored = [run for run in runs if run.error is None]
    titles = {name: found.title for run in scored for name, found in run.anomalies.items()}
    parts = [
        (ASPECTS, scored),
        (_evaluation_aspects("source", "source "), [run for run in scored if "source" in run.evaluations]),
        *((_anomaly_aspects(name, titles[name]), [run for run in scored if name in run.anomalies]) for name in titles),
    ]
    return [d for aspects, group in parts for aspect in aspects for d in _disagreements(aspect, group)]


def _disagreements(aspect: Aspect, runs: Sequence[Run]) -> Iterator[Difference]:
    if aspect.of_training:
        runs = [run for run in runs if run.steps != 0]
    if aspect.if_told:
        runs = [run for run in runs if aspect.value(run)]
    for alike in by_value(runs, aspect.among).values():
        for seed in sorted({run.seed for run in alike}, key=str) if aspect.per_seed else [None]:
            group = [run for run in alike if not aspect.per_seed or run.seed == seed]
            values = by_value(group, lambda run: aspect.value(run) or UNKNOWN)
            if aspect.alike:
                values = _merged(values, aspect.alike)
            if len(group) > 1 and (len(values) > 1 or UNKNOWN in values):
                yield Difference(aspect.name, seed, values)


def _merged(values: dict[str, tuple[Run, ...]], alike: Callable[[Run, Run], bool]) -> dict[str, tuple[Run, ...]]:
    """Puts values together that are the same but for rounding, under the first of them."""
    merged: dict[str, tuple[Run, ...]] = {}
    for value, runs in values.items():
        known = [] if value == UNKNOWN else [first for first in merged if first != UNKNOWN]
        name = next((first for first in known if alike(merged[first][0], runs[0])), value)
        merged[name] = (*merged.get(name, ()), *runs)
    return merged


def by_value(runs: Sequence[Run], value: Callable[[Run], Any]) -> dict[str, tuple[Run, ...]]:
    groups: dict[str, tuple[Run, ...]] = {}
    for run in runs:
        groups[str(value(run))] = (*groups.get(str(value(run)), ()), run)
    return groups


def run_names(runs: Sequence[Run]) -> str:
    """`full, lora_r8 seeds 0, 1, 2 and head seed 0`"""
    by_seeds: dict[tuple[str, ...], list[str]] = {}
    for name, group in by_value(runs, lambda run: run.variant).items():
        by_seeds.setdefault(tuple(str(run.seed) for run in group), []).append(name)
    return " and ".join(
        f"{', '.join(names)} seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" for seeds, names in by_seeds.items()
    )


def machinery_notes(runs: Sequence[Run]) -> list[str]:
    """Machines, libraries and code that differ: no matter for the scores, but times cannot be compared then."""
    found = []
    for subject, value in (
        ("Machines", lambda run: machine_name(run.summary.get("machine"))),
        ("Library versions", lambda run: versions_name(run.summary.get("versions"))),
        ("Versions of this code", lambda run: (run.summary.get("git_commit") or UNKNOWN)[:12]),
    ):
        values = by_value([run for run in runs if run.error is None], value)
        if len(values) > 1:
            found.append(f"{subject} differ: " + "; ".join(f"{v} in {run_names(g)}" for v, g in values.items()) + ".")
    if found:
        found.append("Times and peak memory are therefore not comparable between these runs.")
    return found


def machine_name(machine: dict[str, Any] | None) -> str:
    """GPUs, or threads of a CPU, and the platform."""
    if not machine:
        return UNKNOWN
    processor = machine.get("processor") or "CPU"
    threads = machine.get("threads")
    processors = ", ".join(machine.get("gpus") or []) or f"{processor}, {threads} thread{'s' * (threads != 1)}"
    return f"{processors} ({machine.get('platform')})"


def versions_name(versions: dict[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else UNKNOWN
