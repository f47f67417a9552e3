"""Compares variants on anomaly benchmarks, by one score for the whole table."""

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from eomt.anomaly.benchmarks import BENCHMARKS
from eomt.comparison.differences import by_value, run_names
from eomt.comparison.runs import AnomalyEvaluation, Run
from eomt.comparison.statistics import Comparison, Delta, Spread, Variant, pairs

METRICS = {"auprc": "AuPRC", "fpr95": "FPR95"}


def measured(run: Run, benchmark: str, metric: str, score: str | None) -> float | None:
    """A share in [0, 1]; None where the run has no such result, or it is undefined."""
    evaluation = run.anomalies.get(benchmark)
    return getattr(evaluation, metric).get(score) if evaluation else None


def chance(evaluation: AnomalyEvaluation) -> dict[str, float]:
    """What a score that knows nothing reaches, by metric, in [0, 1].

    Any threshold then keeps the same share of anomalous and of normal pixels.
    """
    return {"auprc": evaluation.anomalous / max(evaluation.valid, 1), "fpr95": 0.95}


def spread(variant: Variant, benchmark: str, metric: str, score: str | None) -> Spread | None:
    """Over the seeds that were evaluated on this benchmark."""
    return Spread.of(variant.known(lambda run: measured(run, benchmark, metric, score)))


def difference(variant: Variant, baseline: Variant, benchmark: str, metric: str, score: str | None) -> Delta | None:
    """The mean of the common seeds' differences to the baseline, with its interval over seeds; None without any."""
    both = [[measured(run, benchmark, metric, score) for run in pair] for pair in pairs(variant, baseline)]
    changes = [ours - theirs for ours, theirs in both if ours is not None and theirs is not None]
    if not changes:
        return None
    return Delta(statistics.fmean(changes), *seed_interval(changes), seeds=tuple(changes))


def seed_interval(changes: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Student's 95 % interval of the mean of paired differences; None for one seed, which tells nothing of others."""
    n = len(changes)
    if n < 2:
        return None, None
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(changes) / math.sqrt(n)
    return statistics.fmean(changes) - half, statistics.fmean(changes) + half


def anomaly_notes(comparison: Comparison) -> list[str]:
    """Returns notes that a reader of the anomaly columns must know."""
    if comparison.score is None:
        return _failed(comparison)
    notes = [
        f"Anomalies: pixels are ranked by the score {comparison.score} in every column and row"
        + "".join(f" but those by {score}" for score in comparison.scores[1:])
        + "; choosing the best for each would compare what is not comparable. AuPRC (average precision): higher is "
        "better. FPR95, the share of normal pixels taken for anomalous where 95 % of the anomalous ones are found: "
        "lower is better. Mean ± sample standard deviation over seeds.",
        "Differences of AuPRC and FPR95: over the seeds that both variants have. Their 95 % interval is Student's t "
        "over the seeds, wide for few, none for one; the images are fixed in it.",
    ]
    for name, evaluation in comparison.benchmarks.items():
        share = 100 * chance(evaluation)["auprc"]
        text = f"{evaluation.title}: {evaluation.images} images, {share:.2f} % of their pixels anomalous, which is the "
        text += "AuPRC of a score that knows nothing (chance); its FPR95 is 95 %"
        if error := max(comparison.known(name, lambda found: found.error.get(comparison.score)), default=0):
            text += f"; counted in bins, within {100 * error:.2g} points"
        notes.append(text + ".")
    return notes + _missing(comparison) + _failed(comparison) + _training(comparison)


def _missing(comparison: Comparison) -> list[str]:
    """Runs that lack what others have."""
    lines = []
    for name, evaluation in comparison.benchmarks.items():
        runs = [run for variant in comparison.variants for run in variant.runs]
        without = [run for run in runs if measured(run, name, "auprc", comparison.score) is None]
        if without:
            lines.append(f"No result of {comparison.score} on {evaluation.title}: {run_names(without)}.")
    return lines


def _failed(comparison: Comparison) -> list[str]:
    """Benchmarks that could not be scored, and why."""
    runs, lines = [run for variant in comparison.variants for run in variant.runs], []
    for name, benchmark in BENCHMARKS.items():
        without = [run for run in runs if name in run.anomaly_errors]
        for error, group in by_value(without, lambda run, name=name: run.anomaly_errors[name]).items():
            lines.append(f"{benchmark.title} could not be scored for {run_names(group)}: {error}")
    return lines


def _training(comparison: Comparison) -> list[str]:
    """Says how the variants were trained differently, on purpose, beside what trains."""
    runs = [run for variant in comparison.variants for run in variant.runs if run.steps != 0]
    lines = []
    for what, value in (
        ("Trained on scenes with pasted objects", lambda run: run.pasted is not None),
        ("With the class head of ArcFace", lambda run: run.class_head == "arcface"),
    ):
        groups = by_value(runs, value)
        if "True" in groups:
            lines.append(f"{what}: {run_names(groups['True'])}.")
    if lines:
        lines.append(
            "First batches are compared among runs with the same pasted objects, start weights among those with the "
            "same class head."
        )
    return lines
