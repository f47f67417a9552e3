"""Component metrics on small maps whose values were counted by hand, and by the benchmark's own definition."""

import numpy as np
import pytest
from scipy import ndimage

from eomt.anomaly.components import (
    ANOMALY_TRACK,
    OBSTACLE_TRACK,
    THRESHOLDS,
    Components,
    Track,
    components,
    together,
)

ALL = Track(min_prediction=1, min_target=1)


def judge(predicted, labels, track=ALL):
    """Of maps drawn in characters: # is predicted; 1 anomalous, x ignored, anything else nothing."""
    scores = np.array([[c == "#" for c in row] for row in predicted.split()], float)
    kinds = {"1": 1, "x": 255}
    return components(
        scores, np.array([[kinds.get(c, 0) for c in row] for row in labels.split()], np.uint8), 0.5, track
    )


def test_the_tracks_have_the_sizes_of_the_benchmark():
    assert (ANOMALY_TRACK.min_prediction, ANOMALY_TRACK.min_target) == (500, 100)
    assert (OBSTACLE_TRACK.min_prediction, OBSTACLE_TRACK.min_target) == (50, 10)
    np.testing.assert_allclose(THRESHOLDS, [0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75])


def test_a_component_is_judged_by_intersection_over_union():
    found = judge("##.. ##.. ....", ".11. .11. ....")
    assert found.siou.tolist() == [2 / 6] and found.ppv.tolist() == [2 / 4]


def test_what_a_prediction_covers_of_a_neighbour_is_not_held_against_it():
    found = judge("#####", "11.11")
    assert found.siou.tolist() == [2 / 3, 2 / 3]  # of 5 predicted pixels, 2 belong to the neighbour
    assert found.ppv.tolist() == [4 / 5]


def test_a_target_in_pieces_counts_all_predictions_that_touch_it():
    found = judge("##.##", "11111")
    assert found.siou.tolist() == [4 / 5] and found.ppv.tolist() == [1, 1]


def test_pixels_that_touch_at_a_corner_are_one_component():
    found = judge("#.. .#. ...", "1.. .1. ...")
    assert len(found.siou) == len(found.ppv) == 1


def test_missed_targets_and_false_predictions_are_zeros():
    found = judge("##... ..... .....", "..... ..... ...11")
    assert found.siou.tolist() == [0] and found.ppv.tolist() == [0] and found.f1 == 0


def test_ignored_pixels_are_neither_predicted_nor_joined():
    found = judge("#######", "11xx.11")
    assert found.siou.tolist() == [1, 2 / 3] and found.ppv.tolist() == [1, 2 / 3]


def test_small_predictions_are_dropped_and_small_targets_ignored():
    track = Track(min_prediction=3, min_target=2)
    found = judge("##....###.", "....1.111.", track)  # 2 predicted pixels go, and 1 target
    assert found.siou.tolist() == [1] and found.ppv.tolist() == [1]
    found = judge(".###......", "...1......", track)  # what the prediction covers of it counts for nothing
    assert found.siou.tolist() == [] and found.ppv.tolist() == [0]


def test_f1_is_the_mean_over_eleven_thresholds():
    parts = Components(np.array([0.5, 0.2]), np.array([0.6, 1.0, 0.1]))
    low = 2 * 1 / (2 * 1 + 1 + 1)  # 0.25 to 0.5: one found, one missed, one false
    assert parts.f1 == pytest.approx(6 * low / 11)  # none found from 0.55 on
    assert parts.mean_siou == pytest.approx(0.35) and parts.mean_ppv == pytest.approx(1.7 / 3)


def test_components_of_all_images_count_alike():
    both = together([Components(np.array([1.0]), np.array([])), Components(np.array([0.0, 0.5]), np.array([0.2]))])
    assert both.mean_siou == 0.5 and both.mean_ppv == 0.2
    nothing = together([judge("...", "..."), judge("...", ".x.")])
    assert np.isnan([nothing.mean_siou, nothing.mean_ppv, nothing.f1]).all()


def by_definition(scores, labels, threshold, track):
    """Chan et al., equations 4 to 6, pixel sets by pixel sets."""

    def parts(mask):
        found, number = ndimage.label(mask, np.ones((3, 3)))
        return [set(np.flatnonzero(found == k + 1).tolist()) for k in range(number)]

    predicted = [p for p in parts((scores >= threshold) & (labels != 255)) if len(p) >= track.min_prediction]
    targets = parts(labels == 1)
    ignored = set().union(*(t for t in targets if len(t) < track.min_target))
    targets = [t for t in targets if len(t) >= track.min_target]
    predicted = [p - ignored for p in predicted if p - ignored]
    siou = []
    for target in targets:
        touching = set().union(*(p for p in predicted if p & target))
        others = set().union(*(t for t in targets if t is not target))
        siou.append(len(target & touching) / len((target | touching) - others))
    ppv = [len(p & set().union(*targets)) / len(p) for p in predicted]
    return siou, ppv


@pytest.mark.parametrize("seed", range(12))
def test_random_maps_are_judged_by_the_definition(seed):
    rng = np.random.default_rng(seed)
    scores = ndimage.gaussian_filter(rng.normal(size=(60, 90)), 3)
    truth = ndimage.gaussian_filter(0.7 * scores / scores.std() + rng.normal(size=(60, 90)), 2)
    labels = (truth > np.quantile(truth, 0.85)).astype(np.uint8)
    labels[ndimage.gaussian_filter(rng.normal(size=(60, 90)), 4) > 0.1] = 255
    track, threshold = Track(min_prediction=30, min_target=12), np.quantile(scores, 0.8)
    found = components(scores, labels, threshold, track)
    siou, ppv = by_definition(scores, labels, threshold, track)
    assert len(siou) > 1 and len(ppv) > 1
    np.testing.assert_allclose(sorted(found.siou), sorted(siou), atol=1e-12)
    np.testing.assert_allclose(sorted(found.ppv), sorted(ppv), atol=1e-12)


def test_labels_of_another_data_set_are_an_error():
    with pytest.raises(ValueError, match="labels hold 2"):
        components(np.zeros((2, 2)), np.array([[0, 2], [1, 1]], np.uint8), 0.5, ALL)
