"""Pixel metrics are scikit-learn's where the scores fit, and within the error that they state elsewhere."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from eomt.anomaly.metrics import PixelMetrics, key_of, score_of
from eomt.anomaly.scores import SCORES


def measure(values, truth, parts=3, max_bins=2**23):
    """As a data set of some images, one of them without any anomaly."""
    metrics = PixelMetrics(max_bins)
    for scores, labels in zip(np.array_split(values, parts), np.array_split(truth, parts), strict=True):
        metrics.update(scores[None], labels[None].astype(np.uint8))
    return metrics.compute()


def reference(values, truth):
    """AuPRC and FPR at 95 % TPR."""
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    return average_precision_score(truth, values), fpr[np.argmax(tpr >= 0.95)]


def draw_scores(name, number, seed=0):
    """A score of pixels as a trained network sees them: most are very sure, few anomalous ones are nearly as sure."""
    rng = np.random.default_rng(seed)
    truth = rng.random(number) < 0.01
    unsure = 10 ** rng.uniform(-6, -0.5, number)
    unsure = np.where(truth, 10 ** rng.uniform(-3, -0.02, number), unsure)
    rest = rng.dirichlet(np.full(18, 0.3), number).T * unsure * rng.random(number)
    S = torch.from_numpy(np.concatenate([1 - unsure[None], rest]).astype(np.float32))[..., None]  # [19, N, 1]
    return SCORES[name](S, 1.0)[:, 0].numpy(), truth


@pytest.mark.parametrize("levels", [3, 40, None])
def test_they_are_those_of_scikit_learn_ties_included(levels):
    rng = np.random.default_rng(0)
    truth = rng.random(30_000) < 0.04
    values = rng.normal(truth * 1.2, 1).astype(np.float32)
    values[:100] = -0.0
    if levels:
        values = np.round(values / values.max() * levels).astype(np.float32)
    found = measure(values, truth)
    assert (found.auprc, found.fpr95) == pytest.approx(reference(values, truth), abs=1e-6)
    assert found.error == 0 and found.valid == 30_000 and found.anomalous == truth.sum()
    assert found.chance == pytest.approx(truth.mean())


def test_a_recall_of_just_95_percent_is_enough():
    values = np.arange(40, 0, -1).astype(np.float32)
    truth = np.zeros(40, bool)
    truth[:19] = truth[30] = True  # 19 of 20 come first
    assert measure(values, truth).fpr95 == 0
    truth[18], truth[31] = False, True
    assert measure(values, truth).fpr95 == pytest.approx(12 / 20)


def test_the_threshold_is_that_of_the_best_f1():
    rng = np.random.default_rng(1)
    truth = rng.random(5000) < 0.1
    values = rng.normal(truth * 2, 1).astype(np.float32)
    precision, recall, thresholds = precision_recall_curve(truth, values)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1]
    found = measure(values, truth)
    assert found.f1 == pytest.approx(f1.max(), abs=1e-12) and found.threshold == thresholds[f1.argmax()]
    predicted = values >= found.threshold
    assert 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()) == pytest.approx(found.f1, abs=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_bins_stay_within_the_error_that_they_state_and_that_is_small(name):
    values, truth = draw_scores(name, 600_000)
    found = measure(values, truth, parts=5, max_bins=2**15)
    assert 0 < found.error <= 1e-3  # 0.1 point, with 256 times fewer bins than there are
    auprc, fpr95 = reference(values, truth)
    assert abs(found.auprc - auprc) <= found.error + 1e-12 and abs(found.fpr95 - fpr95) <= found.error + 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_the_stated_error_holds_in_the_coarsest_bins(seed):
    rng = np.random.default_rng(seed)
    truth = rng.random(200) < rng.uniform(0.1, 0.9)
    truth[:2] = False, True
    values = rng.normal(rng.choice([-1, 0, 1]) * truth, 1).astype(np.float32)
    found = measure(values, truth, max_bins=4)
    auprc, fpr95 = reference(values, truth)
    assert abs(found.auprc - auprc) <= found.error and abs(found.fpr95 - fpr95) <= found.error


def test_the_stated_error_holds_where_all_anomalous_pixels_come_last_in_their_bin():
    above = np.float32(1) + np.arange(1010, dtype=np.float32) * np.finfo(np.float32).eps
    values = np.append(above, np.full(100_000, -1, np.float32))
    truth = np.arange(len(values)) < 1000  # ten normal pixels are higher, all others far below
    found = measure(values, truth, max_bins=2)
    auprc, fpr95 = reference(values, truth)
    assert found.auprc - auprc > 0.02  # nothing bounds it but the worst order within the bin
    assert found.auprc - auprc <= found.error and abs(found.fpr95 - fpr95) <= found.error


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("eomt.anomaly.metrics.PENDING", 5000)
    rng = np.random.default_rng(0)
    metrics = PixelMetrics(max_bins=1000)
    for _ in range(30):
        metrics.update(rng.normal(size=(20, 100)), rng.integers(0, 2, (20, 100)).astype(np.uint8))
        assert len(metrics.keys) <= 1000 and sum(len(a) + len(b) for a, b in metrics.pending) < 5000
    assert metrics.compute().valid == 60_000


def test_ignored_pixels_do_not_count():
    values, truth = np.array([[0.9, 0.1, 0.5, 0.7]]), np.array([[1, 0, 255, 255]], np.uint8)
    metrics = PixelMetrics()
    metrics.update(values, truth)
    found = metrics.compute()
    assert found.valid == 2 and found.auprc == 1 and found.fpr95 == 0


def test_float32_numbers_keep_their_order_as_keys():
    values = np.array([-np.inf, -3e38, -1.5, -1e-45, 0, 1e-45, 0.1, 1, 3e38, np.inf], np.float32)
    keys = key_of(values)
    assert (np.diff(keys.astype(np.int64)) > 0).all() and key_of(np.float32([-0.0])) == key_of(np.float32([0]))
    assert (score_of(keys) == values).all()


@pytest.mark.parametrize("kind", [0, 1])
def test_one_kind_of_pixels_alone_cannot_be_ranked(kind):
    metrics = PixelMetrics()
    metrics.update(np.zeros((2, 2)), np.full((2, 2), kind, np.uint8))
    with pytest.raises(ValueError, match="both kinds are needed"):
        metrics.compute()
    with pytest.raises(ValueError, match="0 normal and 0 anomalous"):
        PixelMetrics().compute()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((2, 2)), np.array([[0, 1], [2, 255]], np.uint8), "labels hold 2"),
        (np.zeros((2, 3)), np.zeros((3, 2), np.uint8), "one size"),
        (np.full((1, 1), np.nan), np.zeros((1, 1), np.uint8), "not finite"),
    ],
)
def test_what_is_wrong_is_said_and_not_mended(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        PixelMetrics().update(scores, labels)
