"""Each score on values that were computed by hand."""

import math

import pytest
import torch

from eomt.anomaly.scores import (
    SCORES,
    max_entropy,
    max_logit,
    msp,
    msp_class_t,
    rba,
    semantic_scores,
    usual_range,
    variants,
)


def pixel(*values):
    """S of one pixel, [K, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def logits(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_class_scores_are_votes_within_masks_and_no_object_has_none():
    masks = torch.tensor([0.0, math.log(3)], dtype=torch.float64).view(1, 2, 1, 1)  # sigmoid: 1/2, 3/4
    classes = logits((0.5, 0.25, 0.25), (0.1, 0.1, 0.8))[None]  # the last is "no object"
    scores = semantic_scores(masks, classes)
    expected = torch.tensor([0.5 * 0.5 + 0.75 * 0.1, 0.5 * 0.25 + 0.75 * 0.1], dtype=torch.float64).view(1, 2, 1, 1)
    torch.testing.assert_close(scores, expected, atol=1e-12, rtol=0)


def test_msp_is_one_less_the_largest_share():
    scores = pixel(math.log(6), math.log(3), 0.0)  # softmax: 6/10, 3/10, 1/10
    assert msp(scores).item() == pytest.approx(0.4, abs=1e-12)
    assert msp(scores, 0.5).item() == pytest.approx(1 - 36 / 46, abs=1e-12)  # squared, then shared out


def test_max_logit_is_the_negative_of_the_largest_score_at_every_temperature():
    assert max_logit(pixel(0.1, 0.7, 0.2)).item() == SCORES["max_logit"](pixel(0.1, 0.7, 0.2), 0.5).item() == -0.7


def test_max_entropy_is_that_of_the_softmax_in_nats():
    scores = pixel(math.log(2), 0.0, 0.0)  # softmax: 1/2, 1/4, 1/4
    assert max_entropy(scores).item() == pytest.approx(1.5 * math.log(2), abs=1e-12)
    squared = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(1 / 6))
    assert max_entropy(scores, 0.5).item() == pytest.approx(squared, abs=1e-12)
    assert max_entropy(pixel(0.3, 0.3, 0.3)).item() == pytest.approx(math.log(3), abs=1e-12)


def test_rba_is_the_negative_sum_of_the_squashed_scores():
    scores = pixel(math.log(3) / 2, math.log(2) / 2, 0.0)  # tanh: (3 - 1) / (3 + 1), (2 - 1) / (2 + 1), 0
    assert rba(scores).item() == SCORES["rba"](scores, 0.5).item() == pytest.approx(-(1 / 2 + 1 / 3), abs=1e-12)


def test_msp_class_t_divides_the_class_logits_and_not_the_scores():
    masks = torch.zeros(1, 1, 1, 1, dtype=torch.float64)  # sigmoid: 1/2
    classes = logits((0.6, 0.3, 0.1))[None, :1].view(1, 1, 3)
    scores = semantic_scores(masks, classes, SCORES["msp_class_t"].class_temperature(0.5))
    torch.testing.assert_close(scores.flatten(), torch.tensor([18 / 46, 4.5 / 46], dtype=torch.float64))
    expected = 1 - 1 / (1 + math.exp(4.5 / 46 - 18 / 46))
    assert msp_class_t(masks, classes, 0.5).item() == pytest.approx(expected, abs=1e-12)
    assert SCORES["msp_class_t"](scores[0], 0.5).item() == pytest.approx(expected, abs=1e-12)
    assert [score.class_temperature(0.5) for score in SCORES.values()] == [1, 1, 1, 1, 0.5]


@pytest.mark.parametrize("name", SCORES)
def test_a_pixel_that_no_query_claims_is_more_anomalous_than_one_that_is_sure(name):
    scores = torch.zeros(2, 19, 4, 6)
    scores[:, 3, :, :3] = 1  # sure on the left, unclaimed on the right
    found = SCORES[name](scores, 0.7)
    assert found.shape == (2, 4, 6) and (found[..., 3:] > found[..., :3]).all()
    low, high = usual_range(name, 0.7, 19)
    torch.testing.assert_close(found.aminmax(), (torch.tensor(low), torch.tensor(high)))


@pytest.mark.parametrize("seed", range(3))
def test_the_pixel_temperature_hardly_changes_the_order_and_the_class_temperature_does(seed):
    generator = torch.Generator().manual_seed(seed)
    masks = 4 * torch.randn(1, 30, 40, 40, generator=generator, dtype=torch.float64) - 3
    classes = 2 * torch.randn(1, 30, 20, generator=generator, dtype=torch.float64)

    def disorder(scores):
        """1 less the rank correlation with msp at T = 1."""
        ranks = [values.flatten().argsort().argsort().double() for values in (scores, msp(plain))]
        return 1 - torch.corrcoef(torch.stack(ranks))[0, 1]

    plain = semantic_scores(masks, classes)
    by_pixel, by_class = disorder(msp(plain, 0.5)), disorder(msp_class_t(masks, classes, 0.5))
    assert 0 < by_pixel < 0.01 and by_class > 10 * by_pixel


def test_scores_without_a_temperature_are_asked_for_once():
    assert variants(["msp", "rba"], [0.5, 1]) == [("msp", 0.5), ("msp", 1.0), ("rba", 1.0)]


@pytest.mark.parametrize(
    ("names", "temperatures", "message"),
    [
        (["mps"], [1.0], "'mps' is unknown; did you mean msp?"),
        (["energy!"], [1.0], "choose from msp, max_logit"),
        (["msp"], [0], "temperatures: 0 must be"),
        (["msp"], ["hot"], "'hot' must be a number"),
        (["msp"], [], "at least one"),
        ([], [1.0], "at least one"),
    ],
)
def test_what_cannot_be_computed_is_refused(names, temperatures, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        variants(names, temperatures)
