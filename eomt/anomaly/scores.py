"""Anomaly scores of a pixel, from the class scores that its queries vote for; higher is more anomalous.

All of them start from S = sum over queries of softmax(class logits)[..., :-1] * sigmoid(mask logits), the pixel scores
of Mask2Former (Cheng et al., CVPR 2022, section 3.4), float [K, H, W] or [B, K, H, W]; "no object" has no place in it.
S lies in [0, Q] and is, where one query is sure of a pixel, nearly a probability. A score is [H, W] or [B, H, W].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eomt.command_line import did_you_mean

Score = Callable[[Tensor, float], Tensor]


def semantic_scores(mask_logits: Tensor, class_logits: Tensor, class_temperature: float = 1.0) -> Tensor:
    """S [B, K, h, w], from mask logits [B, Q, h, w] and class logits [B, Q, K + 1], "no object" last."""
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


def msp_class_t(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """`msp` at T = 1 of an S whose class logits were divided by the temperature before the softmax (Guo et al., ICML
    2017), in [0, 1 - 1/K]: `semantic_scores(..., class_temperature=temperature)`.

    Args:
        scores: S at that temperature, [..., K, H, W]. temperature: already in S.
    """
    return msp(scores)


def max_logit(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """-max_k S (Hendrycks et al., ICML 2022), in [-Q, 0].

    Args:
        scores: S, [..., K, H, W]. temperature: not applied, since it would not change the order.
    """
    return -scores.amax(-3)


def max_entropy(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """The entropy of softmax(S / T) in nats, in [0, log K] (Chan et al., ICCV 2021).

    Args:
        scores: S, [..., K, H, W]. temperature: T > 0.
    """
    log_probability = (scores / temperature).log_softmax(-3)
    return -(log_probability.exp() * log_probability).sum(-3)


def rba(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_k tanh(S): rejected by all classes (Nayal et al., ICCV 2023), in [-K, 0].

    Args:
        scores: S, [..., K, H, W]. temperature: not applied, the paper has none.
    """
    return -scores.tanh().sum(-3)


SCORES: dict[str, Score] = {
    "msp": msp,
    "max_logit": max_logit,
    "max_entropy": max_entropy,
    "rba": rba,
    "msp_class_t": msp_class_t,
}
WITH_TEMPERATURE = {"msp", "max_entropy", "msp_class_t"}


def variants(names: Sequence[str], temperatures: Sequence[float]) -> list[tuple[str, float]]:
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
    pairs = [(name, float(t) if name in WITH_TEMPERATURE else 1.0) for name in names for t in temperatures]
    return list(dict.fromkeys(pairs))


def class_temperature(name: str, temperature: float) -> float:
    """The temperature on the class logits, before S, that a score takes."""
    return temperature if name == "msp_class_t" else 1.0


def usual_range(name: str, temperature: float, num_classes: int) -> tuple[float, float]:
    """The score of a pixel that one query gives wholly to one class, and of one that no query claims.

    Nearly all scores lie between the two; they are the ends of the colour scale of heat maps.
    """
    sure, unclaimed = torch.zeros(2, num_classes, 1, 1)
    sure[0] = 1
    low, high = (SCORES[name](scores, temperature).item() for scores in (sure, unclaimed))
    return low, high
