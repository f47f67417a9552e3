"""The images in which a variant gained and lost most against the baseline, and what it finds anomalous."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from eomt.comparison import plots
from eomt.comparison.runs import Run
from eomt.comparison.statistics import Comparison, Variant, image_gains, pairs
from eomt.comparison.table import percent
from eomt.data.labels import LabelSet

Predictions = Callable[[Path, list[str]], dict[str, tuple[Tensor, Tensor, Tensor]]]
EXAMPLES = 2  # images of the largest gain, and as many of the largest loss


@dataclass
class Example:
    """An image with what both networks made of it."""

    name: str
    gain: str
    panels: list[tuple[str, str, str]]  # (caption, data URI, alt text)


@dataclass
class Gallery:
    """The pictures of a variant, or the reason why there are none."""

    variant: str
    seed: int | None = None
    reason: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)  # (words, CSS colour) of the disagreement map
    examples: list[Example] = field(default_factory=list)


def galleries(comparison: Comparison, predictions: Predictions) -> list[Gallery]:
    """For each variant the images of the largest gain and loss against the baseline, in the first common seed."""
    plans = {v.name: _plan(v, comparison) for v in comparison.others}
    wanted: dict[Path, dict[str, None]] = {}  # image names by run folder: each network is loaded once
    for plan in plans.values():
        for run in plan.runs if plan else ():
            wanted.setdefault(run.path, {}).update(dict.fromkeys(plan.gains))
    results, failures = {}, {}
    for path, names in wanted.items():
        try:
            results[path] = predictions(path, list(names))
        except (OSError, ValueError) as error:
            failures[path] = str(error)
    return [_gallery(name, plan, comparison, results, failures) for name, plan in plans.items()]


def heat_maps(comparison: Comparison) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """By anomaly benchmark, (words, data URI, alt text) of the picture that each variant's first seed left."""
    found = {}
    for name, evaluation in comparison.benchmarks.items():
        for variant in comparison.variants:
            pictures = {id(run): run.path / "anomaly" / f"{name}.png" for run in variant.runs}
            run = next((run for run in variant.runs if pictures[id(run)].is_file()), None)
            if run:
                alt = f"Images of {evaluation.title}, their anomalies, and how anomalous {run} finds each pixel"
                found.setdefault(evaluation.title, []).append((str(run), plots.file_uri(pictures[id(run)]), alt))
    return list(found.items())


@dataclass
class _Plan:
    runs: tuple[Run, Run]  # the variant's, the baseline's
    gains: dict[str, float]  # by image


def _plan(variant: Variant, comparison: Comparison) -> _Plan | None:
    both = pairs(variant, comparison[comparison.baseline])
    gains = image_gains(*both[0]) if both else None
    if gains is None:
        return None
    ranked = sorted(
        (item for item in zip(both[0][0].target.images, gains.tolist(), strict=True) if item[1] == item[1]),
        key=lambda item: -item[1],
    )
    won = [item for item in ranked if item[1] > 0][:EXAMPLES]
    lost = [item for item in ranked if item[1] < 0][-EXAMPLES:][::-1]
    return _Plan(both[0], dict(won + lost))


def _gallery(name: str, plan: _Plan | None, comparison: Comparison, results: dict, failures: dict) -> Gallery:
    baseline = comparison.baseline
    if plan is None:
        return Gallery(name, reason=f"no images were evaluated with both {name} and {baseline} in one seed")
    run, base = plan.runs
    if broken := [failures[r.path] for r in plan.runs if r.path in failures]:
        return Gallery(name, run.seed, reason=broken[0])
    if not plan.gains:
        return Gallery(name, run.seed, reason=f"it scores like {baseline} in every image")
    words = [text.format(variant=name, baseline=baseline) for text in plots.DISAGREEMENTS]
    look = plots.styles([variant.name for variant in comparison.variants])
    colors = plots.disagreement_colors(look[name], look[baseline])
    shown = ["rgb({}, {}, {})".format(*color) for color in colors]
    gallery = Gallery(name, run.seed, legend=list(zip(words, shown, strict=True)))
    classes = LabelSet(run.target.classes, run.target.colors)
    for image, gain in plan.gains.items():
        photo, target, ours = results[run.path][image]
        theirs = results[base.path][image][2]
        about = f"of {image}"
        panels = [("image", plots.photo_uri(photo), f"Photograph {image}")]
        for caption, labels in (("target", target), (baseline, theirs), (name, ours)):
            what = "Target" if caption == "target" else f"Prediction by {caption}"
            panels.append((caption, plots.labels_uri(labels, classes), f"{what} {about}"))
        map_uri = plots.flat_uri(plots.disagreement_map(target, theirs, ours, colors))
        panels.append(("who is right", map_uri, f"Where {name} and {baseline} differ {about}"))
        gallery.examples.append(Example(image, f"{percent(gain, signed=True)} points mIoU", panels))
    gallery.legend.append(("ignored", "transparent"))
    return gallery
