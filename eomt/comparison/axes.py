"""What a matrix varies beside variants and seeds: numbers of training images, and settings that it chooses."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

from eomt.comparison.formats import records
from eomt.comparison.plots import Plot, finish, legend_title, log_axis, new_axes, page_style, styles
from eomt.comparison.runs import Run
from eomt.comparison.statistics import Comparison, Variant, compare
from eomt.comparison.table import (
    NONE,
    Part,
    difference_text,
    not_comparable,
    percent,
    reading_of,
    table,
    warnings_of,
)
from eomt.comparison.tuning import edge_words

Tuning = Mapping[str, Any]  # as `eomt.comparison.tuning.read_tuning` returns it, of one variant


def by_images(runs: Sequence[Run]) -> dict[int | None, list[Run]]:
    """Runs by how many training images they were given, fewest first; None, all, comes last."""
    sizes = sorted({run.subset for run in runs}, key=lambda size: (size is None, size))
    return {size: [run for run in runs if run.subset == size] for size in sizes}


def compare_fewer(runs: Sequence[Run], baseline: str, score: str | None) -> dict[int, Comparison]:
    """A comparison for each number of training images but the largest with which a run has a score.

    Where the baseline has none, the comparison has another one, and its differences are not shown.
    """
    found = {}
    for size, group in list(by_images(runs).items())[:-1]:
        scored = [run for run in group if run.error is None]
        base = baseline if any(run.variant == baseline for run in scored) else None
        known = any(score in found.auprc for run in scored for found in run.anomalies.values())
        if scored:
            found[size] = compare(group, base, score if known else None)
    return found


def images_of(comparison: Comparison) -> int | None:
    """How many training images its runs had; None where they do not tell."""
    counts = [(run.summary.get("data") or {}).get("train_images") for v in comparison.variants for run in v.runs]
    return max((count for count in counts if count), default=None)


def images_table(fewer: Mapping[int, Comparison], largest: Comparison) -> Part | None:
    """mIoU of every variant and its difference to the baseline, by the number of training images."""
    if not fewer:
        return None
    rows = []
    for comparison in (*fewer.values(), largest):
        base, same = comparison[comparison.baseline], comparison.baseline == largest.baseline
        for variant in (v for v in comparison.variants if v.miou):
            name = f"{images_of(comparison) or '?'}, {variant.name}" + " †" * variant.marked
            score = f"{percent(variant.miou.mean)} ± {percent(variant.miou.sd)}"
            paired = same and variant.delta and variant is not base
            against = difference_text(variant.delta, variant, base) if paired else NONE
            reading = reading_of(variant, comparison) if same else NONE
            rows.append([name, variant.seeds, steps_words(variant), score, against, reading])
    difference = f"difference to {largest.baseline} (95 % interval), points"
    titles = ["training images, variant", "seeds", "steps", "mIoU, %", difference, "reading"]
    caption = "By the number of training images: fewer are a part of more, drawn with one seed, and nothing tells how "
    return Part(caption + "other ones would turn out.", titles, rows)


def steps_words(variant: Variant) -> str:
    """`364`, or `90 to 364` where its runs differ."""
    steps = variant.known(lambda run: run.steps)
    return " to ".join(f"{count:,}" for count in dict.fromkeys((min(steps), max(steps)))) if steps else NONE


def fewer_notes(fewer: Mapping[int, Comparison], largest: Comparison) -> list[str]:
    """What a reader must know of fewer training images beside what is said of the most."""
    lines = []
    for size, comparison in fewer.items():
        images = f"{images_of(comparison) or size} training images"
        if comparison.baseline != largest.baseline:
            lines.append(f"No difference with {images}: {largest.baseline} has no score there.")
            continue
        words = [*warnings_of(comparison), *not_comparable(comparison)]
        lines += [f"With {images}: {text}" for text in words if text not in warnings_of(largest)]
    return lines


def fewer_records(comparison: Comparison, baseline: str) -> list[dict[str, Any]]:
    """What `records` returns, without differences to another baseline than that of the whole report."""
    rows = records(comparison, table(comparison))
    if comparison.baseline == baseline:
        return rows
    of_a_difference = re.compile(r"(\w+_)?(difference|low|high|difference_sd)_points")
    return [
        {key: None if of_a_difference.fullmatch(key) else value for key, value in row.items()} | {"reading": NONE}
        for row in rows
    ]


def images_plot(fewer: Mapping[int, Comparison], largest: Comparison) -> Plot | None:
    """mIoU against the number of training images: means over seeds joined, seeds small and hollow."""
    sizes = [(images_of(c), c) for c in (*fewer.values(), largest)]
    if not fewer or any(size is None for size, _ in sizes):
        return None
    variants = {v.name: v for _, c in reversed(sizes) for v in c.variants if v.miou}
    look = styles(list(variants))
    words = []
    with page_style():
        figure, axes, columns = new_axes([legend_title(v, largest) for v in variants.values()])
        for variant in variants.values():
            style = look[variant.name]
            points = [(n, v) for n, c in sizes for v in c.variants if v.name == variant.name and v.miou]
            means = [100 * v.miou.mean for _, v in points]
            label = legend_title(variant, largest)
            axes.plot([n for n, _ in points], means, style.line, color=style.color, marker=style.marker, label=label)
            seeds = [(n, 100 * run.target.miou) for n, v in points for run in v.runs]
            axes.plot(*zip(*seeds, strict=True), style.marker, color=style.color, markerfacecolor="none", markersize=4)
            words.append(f"{variant.name} {', '.join(f'{mean:.1f}' for mean in means)}")
        log_axis(axes)
        axes.xaxis.set_major_locator(FixedLocator([n for n, _ in sizes]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("training images")
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
    counts = ", ".join(str(n) for n, _ in sizes)
    alt = f"mIoU against {counts} training images. Means in percent: {'; '.join(words)}."
    return finish(figure, alt, "mIoU against the number of training images. Small and hollow: a seed; joined: means.")


def tuning_table(tunings: Sequence[Tuning]) -> Part | None:
    """What was chosen for each variant, and on what."""
    if not tunings:
        return None
    rows = []
    for tuning in tunings:
        data, trials = tuning.get("data") or {}, tuning["trials"]
        chosen = ", ".join(f"{key} {value:g}{edge_words(tuning, key)}" for key, value in tuning["chosen"].items())
        failed = sum(trial["miou"] is None for trial in trials)
        best = max(trial["miou"] for trial in trials if trial["miou"] is not None)
        tried = f"{len(trials)}" + f", {failed} failed" * bool(failed)
        steps = next((f"{trial['steps']:,}" for trial in trials if trial["steps"]), NONE)
        held = f"{data.get('val_images', '?')} of {data.get('val_images', 0) + data.get('train_images', 0) or '?'}"
        rows.append([tuning["variant"], chosen, tried, steps, held, percent(best)])
    titles = ["variant", "chosen", "trials", "steps of a trial", "held-out training images", "mIoU on them, %"]
    return Part("What was chosen, and on what.", titles, rows)


def tuning_notes(tunings: Sequence[Tuning], comparison: Comparison, fewer: bool) -> list[str]:
    """Says which variants have settings of their own, chosen on which images, and which trials failed.

    `fewer`: whether other runs had fewer training images.
    """
    if not tunings:
        return []
    tuned = [tuning["variant"] for tuning in tunings]
    others = [v.name for v in comparison.variants if v.name not in tuned and v.runs and not v.untrained]
    lines = [
        f"Settings were chosen for {', '.join(tuned)} on training images that were held out; the validation images "
        "chose nothing."
    ]
    if others:
        lines[0] += f" {', '.join(others)} {'have' if len(others) > 1 else 'has'} the experiment's, tuned for no "
        lines[0] += "variant in particular."
    data = tunings[0].get("data") or {}
    if fewer and {"train_images", "val_images"} <= data.keys():
        images = f"{data['train_images']} images to train on and {data['val_images']} held out"
        lines.append(f"Runs with fewer training images have the same settings, chosen with {images}.")
    for tuning in tunings:
        for trial in (trial for trial in tuning["trials"] if trial["miou"] is None):
            settings = ", ".join(f"{key} {value:g}" for key, value in trial["settings"].items())
            reason = str(trial.get("error") or "unknown why").rstrip(".")
            lines.append(f"A trial of {tuning['variant']} with {settings} has no score: {reason}.")
    return lines


def edge_notes(tunings: Sequence[Tuning]) -> list[str]:
    """Says which choices are the lowest or the highest value that was tried."""
    edges = [
        f"{tuning['variant']} {key} {tuning['chosen'][key]:g} (the {edge})"
        for tuning in tunings
        for key, edge in tuning.get("edges", {}).items()
    ]
    words = "Chosen at the edge of what was tried, so that a better value may lie beyond: "
    return [f"{words}{', '.join(edges)}."] if edges else []


def tuned_keys(tunings: Sequence[Tuning]) -> dict[str, list[Tuning]]:
    """The settings that were chosen, each with the variants that it was chosen for."""
    keys = dict.fromkeys(key for tuning in tunings for key in tuning["chosen"])
    return {key: [tuning for tuning in tunings if key in tuning["chosen"]] for key in keys}


def best_by_value(tuning: Tuning, key: str) -> dict[float, float | None]:
    """For each value of a setting mIoU in percent, the best over the other settings; None where all trials failed."""
    found: dict[float, list[float]] = {}
    for trial in tuning["trials"]:
        found.setdefault(trial["settings"][key], []).extend([] if trial["miou"] is None else [100 * trial["miou"]])
    return {value: max(found[value], default=None) for value in sorted(found)}


def over_the_others(tunings: Sequence[Tuning]) -> str:
    return ", the best over the other settings" * any(len(tuning["chosen"]) > 1 for tuning in tunings)


def values_tables(tunings: Sequence[Tuning]) -> list[Part]:
    """For each setting, mIoU on the held-out images by its value, a row for each variant: what the plots show."""
    parts = []
    for key, group in tuned_keys(tunings).items():
        curves = {tuning["variant"]: best_by_value(tuning, key) for tuning in group}
        values = sorted({value for curve in curves.values() for value in curve})
        taken = {tuning["variant"]: tuning["chosen"][key] for tuning in group}
        rows = []
        for name, curve in curves.items():
            rows.append([name, *(_value_cell(curve, value) + " (taken)" * (value == taken[name]) for value in values)])
        caption = f"mIoU on held-out training images, %, by {key}{over_the_others(group)}."
        parts.append(Part(caption, ["variant", *(f"{value:g}" for value in values)], rows))
    return parts


def _value_cell(curve: Mapping[float, float | None], value: float) -> str:
    score = curve.get(value)
    return f"{score:.2f}" if score is not None else "failed" if value in curve else NONE


def tuning_plots(tunings: Sequence[Tuning], names: Sequence[str]) -> list[Plot]:
    """For each setting, mIoU on the held-out images against its value: the best over the other settings."""
    return [tuning_plot(group, key, names) for key, group in tuned_keys(tunings).items()]


def tuning_plot(tunings: Sequence[Tuning], key: str, names: Sequence[str]) -> Plot:
    """mIoU on the held-out images against one setting, a line for each variant; what was taken is large."""
    look = styles(names)
    words = []
    with page_style():
        figure, axes, columns = new_axes([tuning["variant"] for tuning in tunings])
        for tuning in tunings:
            style = look.get(tuning["variant"]) or styles([tuning["variant"]])[tuning["variant"]]
            best = {value: score for value, score in best_by_value(tuning, key).items() if score is not None}
            line = {"color": style.color, "marker": style.marker, "label": tuning["variant"]}
            axes.plot(list(best), list(best.values()), style.line, **line)
            taken = tuning["chosen"][key]
            axes.plot(taken, best[taken], style.marker, color=style.color, markersize=12, alpha=0.5)
            words.append(f"{tuning['variant']} {taken:g}{edge_words(tuning, key)}")
        if all(value > 0 for tuning in tunings for trial in tuning["trials"] for value in [trial["settings"][key]]):
            axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.set_ylabel("mIoU on held-out training images, %")
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
    alt = f"mIoU on held-out training images against {key}. Taken: {'; '.join(words)}."
    caption = f"Choice of {key}{over_the_others(tunings)}: large is what was taken, {', '.join(words)}."
    return finish(figure, alt, caption)
