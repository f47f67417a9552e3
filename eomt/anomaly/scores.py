"""Anomaly scores of a pixel, from the class scores that its queries vote for; higher is more anomalous.

All of them start from S = sum over queries of softmax(class logits)[..., :-1] * sigmoid(mask logits), the pixel scores
of Mask2Former (Cheng et al., CVPR 2022, section 3.4), [K, H, W] or [B, K, H, W]; "no object" has no place in it.
S lies in [0, Q] and is, where one query is sure of a pixel, nearly a probability.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor, float], Tensor]


def semantic_scores(mask_logits: Tensor, class_logits: Tensor, class_temperature: float = 1.0) -> Tensor:
    """S [B, K, h, w], from mask logits [B, Q, h, w] and class logits [B, Q, K + 1], "no object" last."""
    votes = (class_logits / class_temperature).softmax(-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", votes, mask_logits.sigmoid())


def msp(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """1 - max_k softmax(S / T): maximum softmax probability (Hendrycks and Gimpel, ICLR 2017), in [0, 1 - 1/K].

    S already is a probability, nearly: the temperature changes the values and hardly their order. One on the class
    logits does more (`msp_class_t`).
    """
    return 1 - (scores / temperature).softmax(-3).amax(-3)


def max_logit(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """-max_k S (Hendrycks et al., ICML 2022), in [-Q, 0]. No temperature changes its order, so none is applied."""
    return -scores.amax(-3)


def max_entropy(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """The entropy of softmax(S / T) in nats, in [0, log K] (Chan et al., ICCV 2021)."""
    log_probability = (scores / temperature).log_softmax(-3)
    return -(log_probability.exp() * log_probability).sum(-3)


def rba(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_k tanh(S): rejected by all classes (Nayal et al., ICCV 2023), in [-K, 0]; without temperature."""
    return -scores.tanh().sum(-3)


SCORES: dict[str, Score] = {"msp": msp, "max_logit": max_logit, "max_entropy": max_entropy, "rba": rba}
SCORES["msp_class_t"] = lambda scores, temperature: msp(scores)  # of S at that temperature: see `needs_votes_at`
WITH_TEMPERATURE = {"msp", "max_entropy", "msp_class_t"}


def variants(names: list[str], temperatures: list[float]) -> list[tuple[str, float]]:
    """(score, temperature) of everything that is asked for; 1.0 where a score knows no temperature.

    Raises:
        ValueError: an unknown score, or a temperature that is not positive.
    """
    if unknown := [name for name in names if name not in SCORES]:
        raise ValueError(f"scores: {unknown[0]!r} is unknown; choose from {', '.join(SCORES)}")
    if wrong := [t for t in temperatures if not t > 0]:
        raise ValueError(f"temperatures: {wrong[0]} must be greater than 0")
    pairs = [(name, t if name in WITH_TEMPERATURE else 1.0) for name in names for t in temperatures]
    return list(dict.fromkeys(pairs))


def class_temperature(name: str, temperature: float) -> float:
    """The temperature on the class logits, before S, that a score takes."""
    return temperature if name == "msp_class_t" else 1.0
