"""The answer in words, from the numbers."""

from collections.abc import Callable

import numpy as np

from eomt.comparison.anomalies import difference, spread
from eomt.comparison.bootstrap import FEW_UNITS
from eomt.comparison.differences import UNKNOWN
from eomt.comparison.runs import Run
from eomt.comparison.statistics import Comparison, Delta, Variant
from eomt.comparison.table import difference_text, mebibytes, percent, percentage


def headline(comparison: Comparison) -> list[str]:
    """The answer: LoRA or not, then the baseline, each variant against it, and anomalies by benchmark."""
    base = comparison[comparison.baseline]
    seeds = f"{len(base.runs)} seeds" if len(base.runs) > 1 else "one seed"
    spread = "" if base.miou.sd is None else f" ± {percent(base.miou.sd)}"
    return [
        *lora_verdict(comparison),
        f"{base.name}, the baseline, reaches {percent(base.miou.mean)}{spread} % mIoU ({seeds}).",
        *(variant_sentence(variant, comparison) for variant in comparison.others),
        *anomaly_sentences(comparison),
    ]


def lora_verdict(comparison: Comparison) -> list[str]:
    """A sentence: which LoRA variants are above, level with and below the baseline; none if nothing shows that.

    Those that do something else for anomalies than the baseline, too, say nothing about LoRA.
    """
    base = comparison[comparison.baseline].runs[0]
    found: dict[str, list[str]] = {}
    for variant in comparison.others:
        if variant.uses_lora and not base.uses_lora and variant.runs[0].method == base.method:
            delta = variant.delta
            effect = "" if delta is None else f" ({_effect(delta)})"
            found.setdefault(_verdict(delta, comparison), []).append(variant.name + " †" * variant.marked + effect)
    answers = [f"{words} with {', '.join(names)}" for words, names in found.items()]
    return [f"LoRA against {comparison.baseline} is {'; '.join(answers)}."] if answers else []


def _verdict(delta: Delta | None, comparison: Comparison) -> str:
    """How much better or worse may be said: of few seeds or images, nothing beyond what was run."""
    reading = UNKNOWN if delta is None else delta.reading
    if reading in ("above", "below"):
        word = {"above": "better", "below": "worse"}[reading]
        if delta.few_seeds:
            return f"{word} on these images, in {_those_run(delta)},"
        if comparison.units.count < FEW_UNITS:
            return f"{word} on these few images"
        few = comparison.few_sequences
        return f"measurably {word}" + f" on {'this' if few.startswith('one') else 'these'} {few}" * bool(few)
    return {
        "no measurable difference": "not measurably different",
        "seeds disagree": "undecided, since seeds disagree,",
        UNKNOWN: "undecided, for want of an interval,",
    }[reading]


def _those_run(delta: Delta) -> str:
    return f"the {delta.few_seeds} that {'was' if len(delta.seeds) == 1 else 'were'} run"


def _effect(delta: Delta) -> str:
    """`−1.60 points, 95 % interval −2.90 to −0.41`; without an interval the points alone."""
    points = f"{percent(delta.value, signed=True)} points"
    return points if delta.low is None else f"{points}, {_interval(delta)}"


def _interval(delta: Delta) -> str:
    over = " over images alone" * (len(delta.seeds) == 1)
    return f"95 % interval{over} {percent(delta.low)} to {percent(delta.high)}"


def variant_sentence(variant: Variant, comparison: Comparison) -> str:
    """The difference to the baseline, how sure it is, and what the variant costs beside it."""
    base = comparison[comparison.baseline]
    mark = "† " * variant.marked
    return mark + "; ".join([_difference_words(variant, base), *_cost_words(variant, base, comparison)]) + "."


def anomaly_sentences(comparison: Comparison) -> list[str]:
    """Says for each benchmark the baseline's AuPRC, and the others' differences to it."""
    base, score = comparison[comparison.baseline], comparison.score
    sentences = []
    for name, evaluation in comparison.benchmarks.items():
        level = spread(base, name, "auprc", score)
        if level is None:
            continue
        deltas = [(v, difference(v, base, name, "auprc", score)) for v in comparison.others]
        words = [f"{v.name}{' †' * v.marked} {difference_text(delta, v, base)}" for v, delta in deltas if delta]
        against = f"; the others against it, in points: {', '.join(words)}" if words else ""
        sentences.append(
            f"{evaluation.title}: by {score}, {base.name} has an AuPRC of {percent(level.mean)} %{against}."
        )
    return sentences


def _difference_words(variant: Variant, base: Variant) -> str:
    delta = variant.delta
    if delta is None:
        return f"{variant.name} has no seed in common with {base.name}: no difference"
    share = ", without training" if variant.untrained else ""
    if variant.trainable and variant.share is not None:
        share = f", training {percentage(variant.share)} of its parameters"
    interval = "" if delta.low is None else _interval(delta)
    if variant.delta_seeds < max(len(variant.runs), len(base.runs)):
        interval += f", over {variant.delta_seeds} seed{'s' * (variant.delta_seeds > 1)}"
    spread = "" if delta.seed_sd is None else f"; over seeds ± {percent(delta.seed_sd)}"
    doubt = ", and the seeds disagree" if delta.seeds_disagree else ""
    if delta.reading == "no measurable difference":
        difference = f"{percent(delta.value, signed=True)} points, {interval}{spread}"
        return f"{variant.name} shows no measurable difference to {base.name} ({difference}){doubt}{share}"
    side = f"{percent(abs(delta.value))} points {'above' if delta.value > 0 else 'below'} {base.name}"
    if delta.low is None:
        return f"{variant.name} is {side}{share}, and no interval tells how sure that is"
    return f"{variant.name} is {side} ({interval}{spread}){doubt}{share}"


def _cost_words(variant: Variant, base: Variant, comparison: Comparison) -> list[str]:
    """Artefact, step time and peak memory where they can be compared, and what was forgotten."""
    words = []

    def both(value: Callable[[Run], float | None]) -> tuple[float, float] | None:
        ours, theirs = variant.known(value), base.known(value)
        return (float(np.median(ours)), float(np.median(theirs))) if ours and theirs else None

    if variant.untrained:
        return words
    sizes = both(lambda run: run.artefact_bytes)
    if sizes and mebibytes(sizes[0]) != mebibytes(sizes[1]):
        beside = " beside its base" if variant.uses_lora else ""
        words.append(f"it ships {mebibytes(sizes[0])} MiB{beside} instead of {mebibytes(sizes[1])}")
    if comparison.same_machinery:
        seconds = both(lambda run: run.seconds("compute"))
        if seconds and seconds[1]:
            words.append(f"computing a step takes {seconds[0] / seconds[1]:.2f} times as long")
        if variant.memory and base.memory:
            words.append(f"peak memory is {variant.memory / base.memory:.2f} times as high")
    if variant.source_change is not None:
        theirs = "" if base.source_change is None else f" ({base.name}: {percent(base.source_change, signed=True)})"
        change = percent(variant.source_change, signed=True)
        words.append(f"on the source domain it changed by {change} points since the start{theirs}")
    return words
