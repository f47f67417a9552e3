"""The one table that every format of the report shows."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from eomt.comparison.anomalies import METRICS, anomaly_notes, chance, difference, measured, spread
from eomt.comparison.bootstrap import FEW_UNITS, RESAMPLES
from eomt.comparison.differences import by_value, run_names
from eomt.comparison.runs import Run
from eomt.comparison.statistics import FEW_SEEDS, USUAL, Comparison, Delta, Spread, Variant

NONE = "\N{EN DASH}"  # what a table shows where there is nothing to show
MIOU = "mIoU, %"
UNTUNED = "Learning rates are the experiment's, tuned for no variant in particular."


@dataclass(frozen=True)
class Cell:
    """The text that readers see, and the values behind it, by the column names of the CSV."""

    text: str
    values: dict[str, Any]

    @property
    def empty(self) -> bool:
        return all(value is None for value in self.values.values())


@dataclass(frozen=True)
class Part:
    """Some columns of the table, as texts; each row begins with what it is about."""

    caption: str
    titles: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Table:
    """The one table that every format shows.

    A column's group is "scores", "anomalies", "differences" (of anomalies) or "costs".
    """

    captions: dict[str, str]  # by group
    columns: list[tuple[str, str]]  # (title, group)
    rows: list[list[Cell]]
    chance: dict[str, str]  # what a score that knows nothing reaches, by title
    classes: Part  # the IoU of every class
    footnotes: list[str]
    beside: list[Part] = field(default_factory=list)  # by the number of training images, and what was chosen

    def parts(self, *together: tuple[str, ...]) -> list[Part]:
        """A table for each of these groups of columns; none where there is nothing to show.

        Each begins with the variants; that of anomalies goes on with mIoU, and ends with chance.
        """
        parts = []
        for groups in together:
            columns = [k for k, (_, group) in enumerate(self.columns) if k and group in groups]
            beside = [k for k, (title, _) in enumerate(self.columns) if title == MIOU and "anomalies" in groups]
            if columns:
                shown = [0, *beside, *columns]
                titles = [self.columns[k][0] for k in shown]
                rows = [[row[k].text for k in shown] for row in self.rows]
                if "anomalies" in groups:
                    rows.append(["chance", *(self.chance.get(title, NONE) for title in titles[1:])])
                parts.append(Part(self.captions[groups[0]], titles, rows))
        return parts


def percent(value: float | None, signed: bool = False) -> str:
    """0.1234 -> `12.34`, with a typographic minus."""
    if value is None:
        return NONE
    return f"{100 * value:{'+' if signed else ''}.2f}".replace("-", "\N{MINUS SIGN}")


def percentage(value: float) -> str:
    """A share, with a digit behind the point where it is small: `13 %`, `0.4 %`."""
    return f"{100 * value:.{0 if value >= 0.0995 or value == 0 else 1}f} %"


def mebibytes(size: float | None) -> str:
    return NONE if size is None else f"{size / 2**20:,.1f}"


def interval_text(delta: Delta) -> str:
    """`−1.60 (−2.90 to −0.41)`, in percentage points."""
    value = percent(delta.value, signed=True)
    return value if delta.low is None else f"{value} ({percent(delta.low)} to {percent(delta.high)})"


def difference_text(delta: Delta, variant: Variant, base: Variant) -> str:
    """`interval_text`, and over how many seeds where there are more."""
    return interval_text(delta) + _seeds_words(len(delta.seeds), max(len(variant.runs), len(base.runs)))


def _spread_cell(key: str, spread: Spread | None) -> Cell:
    mean, sd = (None, None) if spread is None else (spread.mean, spread.sd)
    text = NONE if spread is None else f"{percent(mean)} ± {percent(sd)}"
    return Cell(text, {f"{key}_percent": _times(mean, 100), f"{key}_sd": _times(sd, 100)})


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else round(value * factor, 6)


def _number(key: str, value: float | None, form: str, scale: float = 1) -> Cell:
    return Cell(NONE if value is None else format(value * scale, form), {key: value})


def _scores(variant: Variant, comparison: Comparison) -> dict[str, Cell]:
    base = comparison[comparison.baseline]
    delta, reading = None if variant is base else variant.delta, reading_of(variant, comparison)
    anomaly_score = {"anomaly_score": comparison.score} if comparison.score else {}
    return {
        "variant": Cell(variant.name + " †" * variant.marked, {"variant": variant.name} | anomaly_score),
        "seeds": Cell(variant.seeds, {"seeds": len(variant.runs), "failed": len(variant.failed)}),
        MIOU: _spread_cell("miou", variant.miou),
        f"difference to {comparison.baseline} (95 % interval), points": _difference_cell("", delta, variant, base),
        "reading": Cell(reading, {"reading": reading}),
        "source mIoU, %": _spread_cell("source_miou", variant.source),
        "change on source, points": Cell(
            percent(variant.source_change, signed=True), {"source_change_points": _times(variant.source_change, 100)}
        ),
    }


def reading_of(variant: Variant, comparison: Comparison) -> str:
    """`above`, or `below in 2 seeds on one sequence`: no more than the runs show."""
    if variant.name == comparison.baseline:
        return "baseline"
    reading = variant.delta.reading if variant.delta else NONE
    if reading in ("above", "below"):
        few = "few images" if comparison.units.count < FEW_UNITS else comparison.few_sequences
        reading += f" in {variant.delta.few_seeds}" * bool(variant.delta.few_seeds) + f" on {few}" * bool(few)
    return reading


def _difference_cell(prefix: str, delta: Delta | None, variant: Variant, base: Variant) -> Cell:
    text, ends = NONE, dict.fromkeys(("difference", "low", "high", "difference_sd"))
    if delta:
        text = difference_text(delta, variant, base)
        ends = {"difference": delta.value, "low": delta.low, "high": delta.high, "difference_sd": delta.seed_sd}
    return Cell(text, {f"{prefix}{key}_points": _times(value, 100) for key, value in ends.items()})


def _anomalies(variant: Variant, comparison: Comparison) -> dict[str, Cell]:
    """AuPRC and FPR95 of every benchmark, by the one score and by the one that is shown beside it."""
    cells = {}
    for name, score, metric, title in _anomaly_columns(comparison):
        key = f"{name}_{metric}" if score == comparison.score else f"{name}_{score}_{metric}"
        cell = _spread_cell(key, spread(variant, name, metric, score))
        known = len(variant.known(partial(measured, benchmark=name, metric=metric, score=score)))
        values = cell.values | {f"{key}_seeds": known or None}
        cells[title] = Cell(cell.text + _seeds_words(known, len(variant.runs)), values)
    return cells


def _anomaly_columns(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Benchmark, score, metric and title of every column."""
    return [
        (name, score, metric, f"{found.title} {words}{'' if score == comparison.score else f' by {score}'}, %")
        for name, found in comparison.benchmarks.items()
        for score in comparison.scores
        for metric, words in METRICS.items()
    ]


def _chance(comparison: Comparison) -> dict[str, str]:
    benchmarks = comparison.benchmarks
    return {title: percent(chance(benchmarks[name])[metric]) for name, _, metric, title in _anomaly_columns(comparison)}


def class_table(comparison: Comparison) -> Part:
    """A row for each class, a column for each variant."""
    shown = [variant for variant in comparison.variants if variant.runs]
    names = dict.fromkeys(name for variant in shown for run in variant.runs for name in run.target.classes)
    rows = [[name, *(_spread_cell("", variant.class_iou(name)).text for variant in shown)] for name in names]
    titles = ["class", *(variant.name + " †" * variant.marked for variant in shown)]
    return Part("IoU of every class, %: mean ± sample standard deviation over seeds.", titles, rows)


def _anomaly_differences(variant: Variant, comparison: Comparison) -> dict[str, Cell]:
    base, cells = comparison[comparison.baseline], {}
    for name, evaluation in comparison.benchmarks.items():
        for metric, title in METRICS.items():
            delta = None if variant is base else difference(variant, base, name, metric, comparison.score)
            cell = _difference_cell(f"{name}_{metric}_", delta, variant, base)
            cells[f"{evaluation.title} {title} difference, points"] = cell
    return cells


def _seeds_words(count: int, total: int) -> str:
    """` over 2 seeds` where there are more."""
    return f" over {count} seed{'s' * (count > 1)}" if 0 < count < total else ""


def _costs(variant: Variant) -> dict[str, Cell]:
    def first(value: Callable[[Run], Any], of: Callable = statistics.median) -> Any:
        known = variant.known(value)
        return of(known) if known else None

    trainable, share = variant.trainable, variant.share
    parameters = NONE if trainable is None else f"{trainable:,}"
    parameters += "" if share is None else f" ({percentage(share)})"
    return {
        "trainable parameters": Cell(parameters, {"trainable_parameters": trainable, "trainable_share": share}),
        "artefact, MiB": _mebibyte_cell("artefact_bytes", first(lambda run: run.artefact_bytes, max)),
        "last.ckpt, MiB": _mebibyte_cell("checkpoint_bytes", first(lambda run: run.checkpoint_bytes, max)),
        "peak memory, MiB": _mebibyte_cell("peak_memory_bytes", variant.memory),
        "compute, s/step": _number("compute_seconds_per_step", first(lambda run: run.seconds("compute")), ".3f"),
        "data, s/step": _number("data_seconds_per_step", first(lambda run: run.seconds("data")), ".3f"),
        "wall time, min": _number(
            "wall_seconds", first(lambda run: run.summary.get("wall_seconds"), statistics.fmean), ".1f", 1 / 60
        ),
        "GFLOP/step": _number(
            "flops_per_step", first(lambda run: run.summary.get("flops_per_step") if run.steps else None), ",.1f", 1e-9
        ),
    }


def _mebibyte_cell(key: str, size: int | None) -> Cell:
    return Cell(mebibytes(size), {key: size})


def table(comparison: Comparison) -> Table:
    """A row for each variant; columns of which no variant has a value are left out."""
    groups = {
        "scores": [_scores(variant, comparison) for variant in comparison.variants],
        "anomalies": [_anomalies(variant, comparison) for variant in comparison.variants],
        "differences": [_anomaly_differences(variant, comparison) for variant in comparison.variants],
        "costs": [_costs(variant) for variant in comparison.variants],
    }
    columns = [
        (title, group)
        for group, rows in groups.items()
        for title in rows[0]
        if not all(row[title].empty for row in rows)
    ]
    evaluation = comparison.evaluation
    where = f" on {evaluation.description}" if evaluation.description else ""
    images = f", {len(evaluation.images)} images" if evaluation.images else ""
    by_scores = f"by the score{'s' * (len(comparison.scores) > 1)} {' and '.join(comparison.scores)}"
    captions = {
        "scores": f"Scores{where}{images}, and what they cost. Baseline: {comparison.baseline}.",
        "anomalies": f"Anomaly segmentation, {by_scores}.",
        "differences": f"Anomaly segmentation, by the score {comparison.score}: differences to {comparison.baseline}, "
        "with 95 % intervals over seeds.",
        "costs": "What the variants cost.",
    }
    return Table(
        captions,
        columns,
        [[groups[group][k][title] for title, group in columns] for k in range(len(comparison.variants))],
        _chance(comparison),
        class_table(comparison),
        footnotes(comparison),
    )


def footnotes(comparison: Comparison) -> list[str]:
    """Returns notes that a reader of the table must know, a sentence or two each."""
    lines = [
        f"mIoU: mean ± sample standard deviation over seeds; {NONE} for one seed.",
        "Difference: over the seeds that both variants have. Its 95 % interval comes from a paired two-way bootstrap: "
        f"seeds and images are both drawn again with replacement ({RESAMPLES:,} resamples, percentiles), and widened "
        "to Student's t where there are few of them. Where the interval holds 0, no difference was measurable.",
        drawn_words(comparison),
        *(comparison.tuning_notes or [UNTUNED]),
    ]
    lines += warnings_of(comparison)
    if comparison.seedless:
        lines.append(f"{', '.join(comparison.seedless)} depends on no seed: its one run stands beside every seed.")
    if any(variant.source_change is not None for variant in comparison.variants):
        lines.append(
            "Change on source: mIoU on the source domain minus that of the network before training, over the common "
            "seeds; what is negative was forgotten."
        )
    timed = any(run.summary.get("wall_seconds") for run in comparison.runs)
    lines.append(
        "Costs: parameters that train, with their share of all; bytes of the folder to ship and of the checkpoint to "
        f"resume from; peak memory, the most over seeds{_measured(comparison)}; seconds per step, medians, waiting for "
        f"data apart{'; mean wall time of the whole run' * timed}."
    )
    lines += map(failure, comparison.failed)
    lines += anomaly_notes(comparison)
    return lines + not_comparable(comparison) + comparison.notes


def failure(run: Run) -> str:
    return f"{run} failed and counts in no mean: {run.error}"


def not_comparable(comparison: Comparison) -> list[str]:
    """Says what the mark † means here; nothing where all runs are comparable."""
    marks = "; ".join(map(str, comparison.differences))
    return [f"† Not comparable with the other variants: {marks}."] if marks else []


def warnings_of(comparison: Comparison) -> list[str]:
    """Says why intervals are missing, or mean little, and where another baseline had to be taken."""
    lines = []
    missing = [v.name for v in comparison.variants if v.name in USUAL and not v.runs]
    if missing and comparison.baseline not in USUAL:
        lines.append(f"{missing[0]}, the usual baseline, has no score: differences are to {comparison.baseline}.")
    if 0 < comparison.units.count < FEW_UNITS:
        lines.append(f"Only {comparison.units.words} were evaluated: the intervals mean little.")
    if few := comparison.few_sequences:
        lines.append(f"All images come from {few}: nothing here says how another would turn out.")
    for v in comparison.others:
        theirs, ours = (classes_scored(comparison[name].runs[0]) for name in (comparison.baseline, v.name))
        if theirs != ours:
            lines.append(
                f"{v.name} and {comparison.baseline} are not averaged over the same classes: a class that no image has "
                f"counts once it is predicted ({', '.join(sorted(theirs ^ ours))})."
            )
    unpaired = [v.name for v in comparison.others if v.delta and v.delta.low is None]
    if unpaired:
        lines.append(
            f"No interval for {', '.join(unpaired)}: it needs evaluation/target.npz of both, on the same images."
        )
    lines += seed_warnings(comparison)
    alone = [v.name for v in comparison.others if v.delta is None]
    if alone:
        lines.append(f"No difference for {', '.join(alone)}: no seed in common with {comparison.baseline}.")
    return lines


def seed_warnings(comparison: Comparison) -> list[str]:
    """Says what few seeds leave unknown."""
    lines = []
    single = [v.name for v in comparison.variants if len(v.runs) == 1 and v.name not in comparison.seedless]
    if single:
        lines.append(f"One seed of {', '.join(single)}: how far another would move the score is unknown.")
    paired = [v for v in comparison.others if v.delta and v.delta.low is not None]
    if once := [v.name for v in paired if len(v.delta.seeds) == 1]:
        lines.append(f"One seed in the difference of {', '.join(once)}: its interval is over images alone.")
    if few := [v.name for v in paired if 1 < len(v.delta.seeds) <= FEW_SEEDS]:
        lines.append(
            f"Few seeds in the difference of {', '.join(few)}: two or three tell little of how seeds vary, "
            "which makes the interval wide where they do."
        )
    return lines


def drawn_words(comparison: Comparison) -> str:
    """Says what was drawn as one piece, since frames of a video are not independent."""
    together = comparison.units
    if together.kind == "images":
        named = "Every image is drawn by itself"
        if comparison.evaluation.sequences:
            return f"{named}: no two are known to be of one sequence."
        return f"{named}: no sequences are known here. For neighbouring frames of a video that is too narrow."
    if together.kind == "sequences":
        return f"Images of one sequence are drawn together: {together.words}."
    return f"Images are drawn in {together.words} of one sequence, which are more alike than others."


def classes_scored(run: Run) -> set[str]:
    """The classes that have an IoU, being there or predicted."""
    return {name for name, score in run.target.class_iou.items() if score is not None}


def _measured(comparison: Comparison) -> str:
    """Says what the peak memory was measured of."""
    scored = [run for run in comparison.runs if run.error is None and run.summary.get("peak_memory")]
    kinds = by_value(scored, lambda run: run.summary["peak_memory"].get("of"))
    if len(kinds) == 1:
        return f" ({next(iter(kinds))})"
    return "".join(f" ({kind}: {run_names(runs)})" for kind, runs in kinds.items())
