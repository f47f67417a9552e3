"""What a matrix varies beside variants and seeds: numbers of training images, and settings that it chooses."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

from eomt.comparison.plots import Plot, finish, legend_title, log_axis, new_axes, page_style, styles
from eomt.comparison.runs import Run
from eomt.comparison.statistics import Comparison, compare
from eomt.comparison.table import NONE, TUNED, Part, difference_text, percent

Tuning = Mapping[str, Any]  # as `eomt.comparison.tuning.read_tuning` returns it, of one variant


def by_images(runs: Sequence[Run]) -> dict[int | None, list[Run]]:
    """Runs by how many training images they were given, fewest first; None, all, comes last."""
    sizes = sorted({run.subset for run in runs}, key=lambda size: (size is None, size))
    return {size: [run for run in runs if run.subset == size] for size in sizes}


def compare_fewer(runs: Sequence[Run], baseline: str, score: str | None) -> dict[int, Comparison]:
    """A comparison for each number of training images but the largest, where the baseline has a score."""
    groups = list(by_images(runs).items())[:-1]
    scored = [(size, group) for size, group in groups if any(r.variant == baseline and not r.error for r in group)]
    return {size: compare(group, baseline, score) for size, group in scored}


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
        base = comparison[comparison.baseline]
        for variant in (v for v in comparison.variants if v.miou):
            against = difference_text(variant.delta, variant, base) if variant.delta and variant is not base else NONE
            score = f"{percent(variant.miou.mean)} ± {percent(variant.miou.sd)}"
            rows.append([f"{images_of(comparison) or '?'}, {variant.name}", variant.seeds, score, against])
    titles = ["training images, variant", "seeds", "mIoU, %", f"difference to {largest.baseline}, points"]
    return Part("By the number of training images: fewer are a part of more, drawn with one seed.", titles, rows)


def images_plot(fewer: Mapping[int, Comparison], largest: Comparison) -> Plot | None:
    """mIoU against the number of training images: means over seeds joined, seeds small and hollow."""
    sizes = [(images_of(c), c) for c in (*fewer.values(), largest)]
    if not fewer or any(size is None for size, _ in sizes):
        return None
    variants = [v for v in largest.variants if v.miou]
    look = styles([v.name for v in largest.variants])
    words = []
    with page_style():
        figure, axes, columns = new_axes([legend_title(v, largest) for v in variants])
        for variant in variants:
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
        steps = next((str(trial["steps"]) for trial in trials if trial["steps"]), NONE)
        held = f"{data.get('val_images', '?')} of {data.get('val_images', 0) + data.get('train_images', 0) or '?'}"
        rows.append([tuning["variant"], chosen, tried, steps, held, percent(best)])
    titles = ["variant", "chosen", "trials", "steps", "held-out training images", "mIoU on them, %"]
    return Part(TUNED, titles, rows)


def edge_words(tuning: Tuning, key: str) -> str:
    edge = tuning.get("edges", {}).get(key)
    return f" (the {edge} that was tried)" if edge else ""


def tuning_plots(tunings: Sequence[Tuning], names: Sequence[str]) -> list[Plot]:
    """For each setting, mIoU on the held-out images against its value: the best over the other settings."""
    keys = dict.fromkeys(key for tuning in tunings for key in tuning["chosen"])
    return [tuning_plot([t for t in tunings if key in t["chosen"]], key, names) for key in keys]


def tuning_plot(tunings: Sequence[Tuning], key: str, names: Sequence[str]) -> Plot:
    """mIoU on the held-out images against one setting, a line for each variant; what was taken is large."""
    look = styles(names)
    words = []
    with page_style():
        figure, axes, columns = new_axes([tuning["variant"] for tuning in tunings])
        for tuning in tunings:
            style = look.get(tuning["variant"]) or styles([tuning["variant"]])[tuning["variant"]]
            best: dict[float, float] = {}
            for trial in tuning["trials"]:
                if trial["miou"] is not None:
                    value = trial["settings"][key]
                    best[value] = max(best.get(value, 0), 100 * trial["miou"])
            values = sorted(best)
            line = [best[value] for value in values]
            axes.plot(values, line, style.line, color=style.color, marker=style.marker, label=tuning["variant"])
            taken = tuning["chosen"][key]
            axes.plot(taken, best[taken], style.marker, color=style.color, markersize=12, alpha=0.5)
            words.append(f"{tuning['variant']} {taken:g}{edge_words(tuning, key)}")
        if all(value > 0 for tuning in tunings for trial in tuning["trials"] for value in [trial["settings"][key]]):
            axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.set_ylabel("mIoU on held-out training images, %")
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
    alt = f"mIoU on held-out training images against {key}. Taken: {'; '.join(words)}."
    return finish(figure, alt, f"Choice of {key}: large is what was taken, {', '.join(words)}.")
