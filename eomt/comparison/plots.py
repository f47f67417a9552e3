"""Plots and pictures of a comparison, as images that an HTML page carries in itself."""

import base64
import io
import math
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from torch import Tensor

from eomt.comparison.runs import Run
from eomt.comparison.statistics import Comparison, Variant
from eomt.data.labels import LabelSet
from eomt.indices import IGNORE

# Okabe and Ito's and Tol's colours, without those that vanish on white or black; a variant has one in every report
COLORS = {
    "full": "#0072b2",
    "lora_r16": "#d55e00",
    "lora_r8": "#009e73",
    "head": "#cc79a7",
    "lora_last_k": "#e69f00",
    "lora_r4": "#56b4e9",
    "unfreeze_last_n": "#8c6d46",
    "lora_r32": "#882255",
    "lora_mlp": "#44aa99",
    "none": "#999933",
    "dora": "#aa4499",
    "rslora": "#6a51a3",
}
PALETTE = tuple(COLORS.values())
COLORS |= {  # the methods for anomalies, which are compared among themselves
    "baseline": "#0072b2",
    "baseline_lora": "#56b4e9",
    "rba": "#d55e00",
    "rba_lora": "#e69f00",
    "arcface": "#009e73",
    "arcface_lora": "#44aa99",
    "arcface_rba": "#882255",
    "arcface_rba_lora": "#cc79a7",
    "mask2anomaly": "#8c6d46",
}
MARKERS = "osD^vPX*<>hp"
INK, LIGHT_INK = "#212223", "#d9dadb"  # drawn dark, and replaced for readers of a dark page
WIDTH = 4.6  # inches: three plots beside each other on a desk, one on a telephone
PICTURE_WIDTH = 4096  # pixels; wider ones would make the page too large to open

DISAGREEMENTS = {  # colour-blind safe, see `disagreement_map`
    "only {variant} is right": (0, 114, 178),
    "only {baseline} is right": (230, 159, 0),
    "both are wrong, differently": (130, 130, 130),
    "both are wrong, alike": (60, 60, 60),
    "both are right": (205, 212, 218),
}


@dataclass(frozen=True)
class Plot:
    """One drawing as data URIs, for a light and for a dark page, and in words."""

    light: str
    dark: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Style:
    color: str
    marker: str
    line: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Gives each variant the colour that its name has in every plot of every report; markers tell equal ones apart."""
    found: dict[str, Style] = {}
    for name in names:
        number = list(COLORS).index(name) if name in COLORS else zlib.crc32(name.encode())
        color = COLORS.get(name) or PALETTE[number % len(PALETTE)]
        alike = [style.marker for style in found.values() if style.color == color]
        marker = number if len(alike) < len(MARKERS) else len(alike)
        while MARKERS[marker % len(MARKERS)] in alike and len(alike) < len(MARKERS):
            marker += 1
        found[name] = Style(color, MARKERS[marker % len(MARKERS)], "--" if alike else "-")
    return found


@contextmanager
def page_style() -> Iterator[None]:
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings = {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "eomt", "legend.frameon": False}
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings | spines | dict.fromkeys(ink, INK)):
        yield


def finish(figure: Figure, alt: str, caption: str) -> Plot:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return Plot(*(_svg_uri(text) for text in (svg, svg.replace(INK, LIGHT_INK))), alt, caption)


def _svg_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def new_axes(names: Sequence[str]) -> tuple[Figure, Axes, int]:
    """A figure with room for a legend below, and the columns of that legend."""
    columns = max(1, min(len(names), 44 // (max(map(len, names)) + 5)))
    figure = Figure(figsize=(WIDTH, 3.3 + 0.22 * math.ceil(len(names) / columns)), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_ylabel("mIoU, %")
    return figure, axes, columns


def score_plot(
    comparison: Comparison, value: Callable[[Run], float | None], label: str, log: bool = False, about: str = ""
) -> Plot | None:
    """mIoU against something that a run cost: seeds small and hollow, their mean large; None without any value.

    What never trained costs nothing and is a dashed line.
    """
    shown = [v for v in comparison.variants if v.untrained or v.known(value)]
    if all(variant.untrained for variant in shown):
        return None
    look = styles([variant.name for variant in comparison.variants])
    with page_style():
        figure, axes, columns = new_axes([legend_title(v, comparison) for v in shown])
        handles = []
        for variant in shown:
            style = look[variant.name]
            mean = 100 * variant.miou.mean
            if variant.untrained:
                axes.axhline(mean, color=style.color, linestyle=":", linewidth=1.8)
                handles.append(Line2D([], [], color=style.color, linestyle=":", linewidth=1.8))
                continue
            points = [(value(run), 100 * run.target.miou) for run in variant.runs if value(run) is not None]
            x, y = zip(*points, strict=True)
            center = (statistics.fmean(x), statistics.fmean(y))
            handles += axes.plot(*center, style.marker, color=style.color, markersize=11, alpha=0.55)
            axes.plot(x, y, style.marker, color=style.color, markerfacecolor="none", markersize=4.5)
        if log:
            log_axis(axes)
        axes.set_xlabel(label)
        axes.margins(0.08, 0.12)
        titles = [legend_title(v, comparison) for v in shown]
        figure.legend(handles, titles, loc="outside lower center", ncols=columns, fontsize=9)
    means = ", ".join(f"{v.name} {100 * v.miou.mean:.1f}" for v in shown)
    caption = f"mIoU against {label}{about}. Small and hollow: a seed; large: the mean."
    if any(variant.untrained for variant in shown):
        caption += " Dotted: without training."
    return finish(figure, f"Scatter plot of mIoU against {label}. Mean mIoU in percent: {means}.", caption)


def log_axis(axes: Axes) -> None:
    """Makes the horizontal axis logarithmic, with round numbers in short."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 300 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def legend_title(variant: Variant, comparison: Comparison) -> str:
    return f"{variant.name} (baseline)" if variant.name == comparison.baseline else variant.name


def curve_plot(comparison: Comparison) -> Plot | None:
    """Validation mIoU over steps: the mean over seeds and a band from the lowest to the highest; None without any."""
    shown = [v for v in comparison.variants if any(len(run.curve) > 1 for run in v.runs)]
    if not shown:
        return None
    look = styles([variant.name for variant in comparison.variants])
    with page_style():
        figure, axes, columns = new_axes([legend_title(v, comparison) for v in shown])
        for variant in shown:
            style = look[variant.name]
            steps, values = seed_curves(variant)
            axes.fill_between(steps, values.min(0), values.max(0), color=style.color, alpha=0.15, linewidth=0)
            axes.plot(
                steps,
                values.mean(0),
                style.line,
                marker=style.marker,
                markersize=4,
                markevery=max(1, len(steps) // 8),
                color=style.color,
                label=legend_title(variant, comparison),
            )
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("training steps")
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
    names = ", ".join(variant.name for variant in shown)
    return finish(
        figure,
        f"Validation mIoU over training steps of {names}.",
        "Validation mIoU while training: the mean over seeds, and a band from the lowest seed to the highest.",
    )


def seed_curves(variant: Variant) -> tuple[list[int], np.ndarray]:
    """The steps at which every seed that has a curve was validated, and mIoU in percent [seeds, steps]."""
    curves = [dict(run.curve) for run in variant.runs if run.curve]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, 100 * np.array([[curve[step] for step in steps] for curve in curves]).reshape(len(curves), len(steps))


def class_plots(comparison: Comparison) -> list[Plot]:
    """Per variant, the difference of every class IoU to the baseline, with intervals where there are some.

    All have one scale and the order of the data set. What never trained is left out if something else is shown: it is
    so far off that nothing could be read from the others.
    """
    look = styles([variant.name for variant in comparison.variants])
    shown = in_panels(comparison)
    names = list(dict.fromkeys(name for variant in shown for name in variant.class_delta))
    return [_class_plot(v, comparison.baseline, look[v.name], names, _limits(shown)) for v in shown]


def in_panels(comparison: Comparison) -> list[Variant]:
    """The variants that `class_plots` shows."""
    known = [variant for variant in comparison.others if variant.class_delta]
    return [variant for variant in known if not variant.untrained] or known


def _limits(variants: Sequence[Variant]) -> tuple[float, float]:
    """Returns the range that all bars and intervals of these variants need, in points; 0 is in it."""
    deltas = [delta for variant in variants for delta in variant.class_delta.values()]
    ends = [100 * end for d in deltas for end in (0, d.value, d.low, d.high) if end is not None]
    margin = 0.05 * (max(ends) - min(ends)) or 1
    return min(ends) - margin, max(ends) + margin


def _class_plot(
    variant: Variant, baseline: str, style: Style, names: Sequence[str], limits: tuple[float, float]
) -> Plot:
    ranked = sorted(variant.class_delta.items(), key=lambda item: item[1].value)
    rows = [names.index(name) for name in variant.class_delta]
    deltas = list(variant.class_delta.values())
    with page_style():
        figure = Figure(figsize=(WIDTH, 1.0 + 0.23 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(rows, [100 * d.value for d in deltas], color=style.color, alpha=0.75, height=0.65)
        bounded = [(row, 100 * d.low, 100 * d.high) for row, d in zip(rows, deltas, strict=True) if d.low is not None]
        for row, low, high in bounded:
            axes.plot([low, high], [row, row], color=INK, linewidth=1.3)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
        axes.set_xlim(*limits)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.25)
        axes.set_xlabel(f"IoU minus that of {baseline}, points")
        axes.set_title(variant.name, fontsize=11)
    best, worst = ranked[-1], ranked[0]
    alt = f"Bars of class IoU, {variant.name} minus {baseline}: most {_points(best)}, least {_points(worst)} points."
    caption = f"{variant.name} minus {baseline}" + (", with 95 % intervals" if bounded else "")
    return finish(figure, alt, caption + ".")


def _points(item: tuple) -> str:
    return f"{item[0]} {100 * item[1].value:+.1f}"


# --------------------------------------------------------------------------------------------------------- pictures


def disagreement_colors(variant: Style, baseline: Style) -> list[tuple[int, ...]]:
    """The colours of `DISAGREEMENTS`; where one of the two alone is right, its own, unless both have the same."""
    if variant.color == baseline.color:
        return list(DISAGREEMENTS.values())
    own = [tuple(bytes.fromhex(style.color[1:])) for style in (variant, baseline)]
    return [*own, *list(DISAGREEMENTS.values())[2:]]


def disagreement_map(
    target: Tensor, baseline: Tensor, variant: Tensor, colors: Sequence[tuple[int, ...]] = ()
) -> np.ndarray:
    """Label maps uint8 [H, W] -> RGBA uint8 [H, W, 4]; ignored pixels are clear.

    `colors` are those of the cases in `DISAGREEMENTS`.
    """
    ours, theirs = variant == target, baseline == target
    cases = (
        ours & ~theirs,
        theirs & ~ours,
        ~ours & ~theirs & (variant != baseline),
        ~ours & ~theirs & (variant == baseline),
    )
    picture = torch.zeros(*target.shape, 4, dtype=torch.uint8)
    for case, color in zip((*cases, ours & theirs), colors or DISAGREEMENTS.values(), strict=True):
        picture[case] = torch.tensor((*color, 255), dtype=torch.uint8)
    picture[target == IGNORE] = 0
    return picture.numpy()


def photo_uri(image: Tensor) -> str:
    """A photograph uint8 [3, H, W] as JPEG in a data URI."""
    return _image_uri(Image.fromarray(image.permute(1, 2, 0).numpy()), Image.Resampling.LANCZOS, "JPEG", quality=82)


def labels_uri(labels: Tensor, classes: LabelSet) -> str:
    """A label map uint8 [H, W] in its colours, as lossless WebP in a data URI."""
    return flat_uri(classes.colorize(labels).numpy())


def flat_uri(picture: np.ndarray) -> str:
    """Flat colours uint8 [H, W, 3 or 4] as lossless WebP in a data URI."""
    return _image_uri(Image.fromarray(picture), Image.Resampling.NEAREST, "WEBP", lossless=True)


def file_uri(path: Path) -> str:
    """A picture with writing in it, from its file, as WebP in a data URI."""
    return _image_uri(Image.open(path).convert("RGB"), Image.Resampling.LANCZOS, "WEBP", quality=85)


def _image_uri(image: Image.Image, resampling: Image.Resampling, form: str, **options: int | bool) -> str:
    if image.width > PICTURE_WIDTH:
        image = image.resize((PICTURE_WIDTH, round(image.height * PICTURE_WIDTH / image.width)), resampling)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
