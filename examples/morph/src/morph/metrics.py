"""How well morphs are told from bona fide pictures, in the terms of ISO/IEC 20059.

MACER, the morphing attack classification error rate, is the share of morphs that are taken for bona fide; BPCER, the
bona fide presentation classification error rate, the share of bona fide pictures that are taken for morphs. A picture
is taken for a morph where its score is at least the threshold. D-EER is where both are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_eer, binary_roc

from eomt.files import replacing

log = logging.getLogger(__name__)

BPCERS = (0.01, 0.05, 0.10)  # at which MACER is stated
TICKS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)


def error_rates(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """BPCER and MACER [T] at every threshold, the highest first.

    Args:
        scores: [N], higher for morphs: probabilities in [0, 1], or logits.
        labels: [N], 1 for morphs.

    Raises:
        ValueError: a class is absent, or a score is not finite.
    """
    check_scores(scores, labels)
    bpcer, detected, _ = binary_roc(scores.double(), labels.long())
    return bpcer, 1 - detected


def detection_metrics(scores: Tensor, labels: Tensor) -> dict[str, float | int | None]:
    """D-EER, and the least MACER with a BPCER of at most 1, 5 and 10 %, as shares.

    Where a class is absent there is no such rate: None, with a warning. See `error_rates` for the arguments.
    """
    morphs = int(labels.sum())
    names = ["d_eer", *(f"macer_at_bpcer_{100 * bound:.0f}" for bound in BPCERS)]
    counts = {"bona_fide": len(labels) - morphs, "morphs": morphs}
    if not all(counts.values()):
        absent = next(name for name, count in counts.items() if not count).replace("_", " ")
        log.warning("there are no %s pictures among %d, so error rates do not exist", absent, len(labels))
        return dict.fromkeys(names) | counts
    bpcer, macer = error_rates(scores, labels)
    eer = binary_eer(scores.double(), labels.long()).item()
    values = [eer, *(macer[bpcer <= bound + 1e-6].min().item() for bound in BPCERS)]
    return dict(zip(names, values, strict=True)) | counts


def check_scores(scores: Tensor, labels: Tensor) -> None:
    """Raises ValueError where error rates cannot be computed."""
    if not torch.isfinite(scores).all():
        wrong = f"{int((~torch.isfinite(scores)).sum())} of {len(scores)} scores are not finite"
        raise ValueError(f"{wrong}, so there are no error rates: training has diverged; lower lr and lora_lr")
    if len({*labels.tolist()}) < 2:
        raise ValueError("error rates need both bona fide pictures and morphs: one of them is absent")


def percent(value: float | None) -> str:
    """`12.5 %`, or `none`."""
    return "none" if value is None else f"{100 * value:.1f} %"


def metrics_table(metrics: Mapping[str, float | int | None]) -> str:
    """The rates for the screen."""
    lines = [f"{metrics['bona_fide']} bona fide pictures, {metrics['morphs']} morphs"]
    lines += [f"D-EER                 {percent(metrics['d_eer'])}"]
    for bound in BPCERS:
        rate = percent(metrics[f"macer_at_bpcer_{100 * bound:.0f}"])
        lines.append(f"MACER at BPCER {100 * bound:>3.0f} %  {rate}")
    return "\n".join(lines)


def draw_det(curves: Mapping[str, tuple[Tensor, Tensor]], path: str | Path) -> None:
    """Draws DET curves, BPCER against MACER on normal deviates, as PNG.

    Args:
        curves: `error_rates` by the name that the legend shows.
    """
    import matplotlib.pyplot as plt
    from scipy.stats import norm

    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    low, high = TICKS[0], TICKS[-1]
    for name, (bpcer, macer) in curves.items():
        axes.plot(*(norm.ppf(rate.clamp(low, high).numpy()) for rate in (bpcer, macer)), label=name)
    axes.plot(norm.ppf([low, high]), norm.ppf([low, high]), ":", color="gray", linewidth=0.8)
    _in_percent(axes, norm.ppf(TICKS))
    axes.set(xlabel="BPCER, %: bona fide taken for morphs", ylabel="MACER, %: morphs taken for bona fide")
    axes.legend()
    with replacing(path) as draft:
        figure.savefig(draft, dpi=120)
    plt.close(figure)


def _in_percent(axes, places: Sequence[float]) -> None:  # noqa: ANN001
    texts = [f"{100 * tick:g}" for tick in TICKS]
    axes.set_xticks(places, texts)
    axes.set_yticks(places, texts)
    axes.set(xlim=(places[0], places[-1]), ylim=(places[0], places[-1]))
    axes.grid(linewidth=0.3)
