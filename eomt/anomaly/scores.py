"""Anomaly scores of a pixel, from the class scores that its queries vote for; higher is more anomalous.

All of them start from S = sum over queries of softmax(class logits)[..., :-1] * sigmoid(mask logits), the pixel scores
of Mask2Former (Cheng et al., CVPR 2022, section 3.4), float [K, H, W] or [B, K, H, W]; "no object" has no place in it.
S lies in [0, Q] and is, where one query is sure of a pixel, nearly a probability. A score is [H, W] or [B, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from eomt.suggestions import did_you_mean

if TYPE_CHECKING:  # names and temperatures are checked without torch
    from torch import Tensor


Variant = tuple[str, float]  # a score and its temperature


def semantic_scores(mask_logits: Tensor, class_logits: Tensor, class_temperature: float = 1.0) -> Tensor:
    """S [B, K, h, w], from mask logits [B, Q, h, w] and class logits [B, Q, K + 1], "no object" last."""
    import torch

    votes = (class_logits / class_temperature).softmax(-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", votes, mask_logits.sigmoid())


def msp(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """1 - max_k softmax(S / T): maximum softmax probability (Hendrycks and Gimpel, ICLR 2017), in [0, 1 - 1/K].

    S already is a probability, nearly: the temperature changes the values and hardly their order. One on the class
    logits does more (`msp_class_t`).

    Args:
        scores: S, [..., K, H, W]. temperature: T > 0.
    """
    return 1 - (scores / temperature).softmax(-3).amax(-3)


def msp_class_t(mask_logits: Tensor, class_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`msp` of an S whose class logits were divided by the temperature before the softmax (Guo et al., ICML 2017), in
    [0, 1 - 1/K].

    Args:
        mask_logits: [B, Q, h, w]. class_logits: [B, Q, K + 1]. temperature: T > 0.
    """
    return msp(semantic_scores(mask_logits, class_logits, temperature))


def max_logit(scores: Tensor) -> Tensor:
    """-max_k S (Hendrycks et al., ICML 2022), in [-Q, 0]; no temperature would change the order.

    Args:
        scores: S, [..., K, H, W].
    """
    return -scores.amax(-3)


def max_entropy(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """The entropy of softmax(S / T) in nats, in [0, log K] (Chan et al., ICCV 2021).

    Args:
        scores: S, [..., K, H, W]. temperature: T > 0.
    """
    log_probability = (scores / temperature).log_softmax(-3)
    return -(log_probability.exp() * log_probability).sum(-3)


def rba(scores: Tensor) -> Tensor:
    """-sum_k tanh(S): rejected by all classes (Nayal et al., ICCV 2023), in [-K, 0]; the paper has no temperature.

    Args:
        scores: S, [..., K, H, W].
    """
    return -scores.tanh().sum(-3)


class Score(NamedTuple):
    """A function of S, and what a temperature divides: S, the class logits before S, or nothing."""

    of: Callable[..., Tensor]
    tempered: Literal["pixels", "classes"] | None = None

    def class_temperature(self, temperature: float) -> float:
        """The temperature that S has to be computed at."""
        return temperature if self.tempered == "classes" else 1.0

    def __call__(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """[..., H, W] of S at `class_temperature`, [..., K, H, W]."""
        return self.of(scores, temperature) if self.tempered == "pixels" else self.of(scores)


SCORES = {
    "msp": Score(msp, "pixels"),
    "max_logit": Score(max_logit),
    "max_entropy": Score(max_entropy, "pixels"),
    "rba": Score(rba),
    "msp_class_t": Score(msp, "classes"),
}


def variants(names: Sequence[str], temperatures: Sequence[float]) -> list[Variant]:
    """(score, temperature) of everything that is asked for; 1.0 where a score knows no temperature.

    Raises:
        ValueError: nothing, an unknown score, or a temperature that is not a positive number.
    """
    if not (names and temperatures):
        raise ValueError(f"scores={list(names)} temperatures={list(temperatures)}: give at least one of each")
    for name in names:
        if str(name) not in SCORES:
            hint = did_you_mean(str(name), SCORES) or f"; choose from {', '.join(SCORES)}"
            raise ValueError(f"scores: {name!r} is unknown{hint}")
    for t in temperatures:
        if isinstance(t, bool) or not isinstance(t, int | float) or not 0 < t < float("inf"):
            raise ValueError(f"temperatures: {t!r} must be a number greater than 0")
    pairs = [(name, float(t) if SCORES[name].tempered else 1.0) for name in names for t in temperatures]
    return list(dict.fromkeys(pairs))


def usual_range(name: str, temperature: float, num_classes: int) -> tuple[float, float]:
    """The score of a pixel that one query gives wholly to one class, and of one that no query claims.

    Nearly all scores lie between the two; they are the ends of the colour scale of heat maps.
    """
    import torch

    sure, unclaimed = torch.zeros(2, num_classes, 1, 1)
    sure[0] = 1
    low, high = (SCORES[name](scores, temperature).item() for scores in (sure, unclaimed))
    return low, high
