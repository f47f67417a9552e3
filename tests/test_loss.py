"""Matching and loss agree with the published implementation and with the dense formula."""

import pytest
import torch
import torch.nn.functional as F
from conftest import prediction

from eomt.models.eomt import Prediction
from eomt.training.mask_classification_loss import (
    MaskClassificationLoss,
    Matches,
    choose_points,
    class_loss,
    classes_present,
    classes_seen,
    mask_losses,
    match,
    matching_cost,
    sample_all_classes,
    sample_maps,
    values_at,
)


def pairs(matches, image):
    """(query, class) of the first prediction's matches in an image."""
    found = zip(matches.queries[0, image].tolist(), matches.classes[0, image].tolist(), strict=True)
    return [(query, k) for query, k in found if k >= 0]


@pytest.fixture
def labels():
    values = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8)
    return values[torch.randint(5, (2, 24, 40), generator=torch.Generator().manual_seed(0))]


def test_assignment_matches_the_published_one(reference):
    tensors, facts = reference
    loss = MaskClassificationLoss(facts["num_classes"])
    points = torch.cat([tensors["matcher.points.0"], tensors["matcher.points.1"]])
    masks = prediction(tensors["masked.mask_logits.3"], tensors["masked.class_logits.3"])
    matches = loss.match([masks], tensors["semantic_target"], points)
    for b in range(2):
        present = tensors["semantic_target"][b].unique()[tensors[f"matcher.target_index.{b}"]]
        queries = tensors[f"matcher.query_index.{b}"]
        assert pairs(matches, b) == list(zip(queries.tolist(), present.tolist(), strict=True))


def test_the_three_losses_match_the_published_ones(reference):
    tensors, facts = reference
    mask_logits, class_logits = tensors["masked.mask_logits.3"], tensors["masked.class_logits.3"]
    labels = tensors["semantic_target"]
    image = torch.cat([torch.full_like(tensors[f"matcher.query_index.{b}"], b) for b in range(2)])
    query = torch.cat([tensors[f"matcher.query_index.{b}"] for b in range(2)])
    classes = torch.cat([labels[b].unique()[tensors[f"matcher.target_index.{b}"]] for b in range(2)]).long()
    points = tensors["loss.points"]

    masks = sample_maps(mask_logits[image, query][:, None], points).squeeze(1)
    targets = sample_all_classes(labels[image], points, facts["num_classes"])[torch.arange(len(image)), classes]
    bce, dice = (term.mean() for term in mask_losses(masks, targets))
    target = torch.full(class_logits.shape[:2], facts["num_classes"])
    target[image, query] = classes
    entropy = class_loss(class_logits[None], target[None], MaskClassificationLoss(facts["num_classes"]).class_weight)[0]
    for ours, name in ((bce, "mask_bce"), (dice, "dice"), (entropy, "cross_entropy")):
        torch.testing.assert_close(ours, tensors[f"loss.{name}"], rtol=1e-4, atol=0)


def test_sampling_the_label_map_equals_sampling_dense_masks(labels):
    points = torch.rand(2, 500, 2, dtype=torch.float64) * 1.2 - 0.1  # some lie outside the image
    dense = torch.stack([(labels == k).double() for k in range(4)], 1)
    expected = sample_maps(dense, points)
    torch.testing.assert_close(sample_all_classes(labels, points, 4), expected, rtol=0, atol=1e-12)


def test_matching_finds_the_query_that_drew_the_class(labels):
    mask_logits = torch.full((2, 6, 24, 40), -8.0)
    class_logits = torch.zeros(2, 6, 5)
    for k, query in enumerate((4, 2, 0, 5)):
        mask_logits[:, query][labels == k] = 8.0
        class_logits[:, query, k] = 8.0
    matches = MaskClassificationLoss(4).match([prediction(mask_logits, class_logits)], labels)
    assert pairs(matches, 0) == pairs(matches, 1) == [(0, 2), (2, 1), (4, 0), (5, 3)]


def test_a_perfect_prediction_costs_almost_nothing_and_a_wrong_one_does(labels):
    labels = labels.new_tensor([[0, 1], [2, 3]]).repeat_interleave(64, 0).repeat_interleave(64, 1).expand(2, -1, -1)
    masks = torch.stack([(labels == k).float() * 40 - 20 for k in range(4)], 1)
    logits = 20 * torch.eye(5)[None, :4].expand(2, -1, -1)
    loss = MaskClassificationLoss(4, num_points=2000)
    right = sum(loss([prediction(masks, logits)], labels).values())
    wrong = sum(loss([prediction(-masks, logits)], labels).values())
    assert right < 2.0 < 20 < wrong


def test_an_image_of_ignored_pixels_trains_only_towards_no_object():
    loss = MaskClassificationLoss(4, num_points=50)
    mask_logits = torch.randn(2, 6, 8, 8, requires_grad=True)
    class_logits = torch.zeros(2, 6, 5, requires_grad=True)
    terms = loss([prediction(mask_logits, class_logits)], torch.full((2, 32, 32), 255, dtype=torch.uint8))
    assert terms["mask"] == terms["dice"] == 0
    sum(terms.values()).backward()
    assert class_logits.grad[..., 4].max() < 0 and not mask_logits.grad.any()


def test_a_label_that_would_collide_with_no_object_is_refused(labels):
    labels[0, 3, 3] = 4
    with pytest.raises(ValueError, match=r"label 4 in a target, but the classes are 0\.\.3"):
        classes_present(classes_seen(labels), 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_costs_that_are_not_finite_match_somehow_and_are_said_to_be(value):
    cost, present = torch.ones(1, 1, 3, 2), torch.ones(1, 2, dtype=torch.bool)
    assert match(cost, present).finite
    cost[0, 0, 0, 1] = value
    matches = match(cost, present)
    assert not matches.finite and matches.classes.flatten().sort().values.tolist() == [0, 1]


@pytest.mark.parametrize("part", ["mask", "class"])
def test_logits_that_are_not_finite_give_no_finite_loss_even_where_no_term_looks_at_them(labels, part):
    mask_logits, class_logits = torch.randn(len(labels), 6, 8, 8), torch.zeros(len(labels), 6, 5)
    loss = MaskClassificationLoss(4, num_points=50)
    assert sum(loss([prediction(mask_logits, class_logits)], labels).values()).isfinite() and loss.finite_logits
    spoilt = mask_logits if part == "mask" else class_logits
    spoilt[0, 0, 0] = torch.nan
    class_logits[0, 0, 4] = 50  # a query that no class would take
    assert sum(loss([prediction(mask_logits, class_logits)], labels).values()).isnan() and not loss.finite_logits
    assert loss.match([prediction(mask_logits, class_logits)], labels).classes.max() == 3


def test_fewer_queries_than_classes_match_the_cheapest():
    cost = torch.tensor([[[[3.0, 1.0, 2.0]]]])
    assert pairs(match(cost, torch.ones(1, 3, dtype=torch.bool)), 0) == [(0, 1)]


def test_uncertain_points_lie_near_the_mask_border():
    ramp = torch.linspace(-10, 10, 64).expand(1, 2, 64, 64).clone()  # zero in the middle
    ramp[:, 1] += 5
    drawn = torch.rand(1, 3250, 2, generator=torch.Generator().manual_seed(0))
    index = choose_points(ramp, drawn, num_candidates=3000, num_uncertain=750)
    assert index.shape == (1, 2, 1000)
    for mask, middle in enumerate((0.5, 0.25)):
        points = drawn[0, index[0, mask]]
        assert (points[:750, 0] - middle).abs().quantile(0.99) < 0.15
        assert torch.equal(points[750:], drawn[0, 3000:])


def test_the_uncertain_points_are_the_most_uncertain_of_the_candidates():
    masks, drawn = torch.randn(2, 3, 8, 8), torch.rand(2, 100, 2)
    index = choose_points(masks, drawn, num_candidates=80, num_uncertain=30)[..., :30]
    certainty = sample_maps(masks, drawn).abs()
    for mask, chosen in zip(certainty.flatten(0, 1), index.flatten(0, 1), strict=True):
        rest = torch.ones(80, dtype=torch.bool)
        rest[chosen] = False
        assert chosen.unique().numel() == 30 and mask[chosen].max() <= mask[:80][rest].min()


def test_class_weights_scale_their_class_alone():
    logits = torch.zeros(1, 1, 2, 4)
    target = torch.tensor([[[2, 3]]])
    logits[0, 0, 0] = torch.tensor([0.0, 0.0, -5.0, 0.0])
    heavy = MaskClassificationLoss(3, class_weights=[1, 1, 10]).class_weight
    light = MaskClassificationLoss(3, class_weights=[10, 10, 1]).class_weight
    assert class_loss(logits, target, heavy) > class_loss(logits, target, light)
    with pytest.raises(ValueError, match="2 numbers, there are 3 classes"):
        MaskClassificationLoss(3, class_weights=[1, 1])


# Shortcuts against the plain formulas that they replace


@pytest.fixture
def random_predictions():
    """Three predictions of two images, in float64: 7 queries, 5 features, masks 6x10, 4 classes."""
    torch.manual_seed(0)
    shapes = (2, 7, 5), (2, 5, 6, 10), (2, 7, 5)
    return [Prediction(*(torch.randn(shape, dtype=torch.float64) for shape in shapes)) for _ in range(3)]


def test_features_at_points_make_the_same_masks_as_whole_maps(random_predictions):
    points = torch.rand(2, 200, 2, dtype=torch.float64) * 1.2 - 0.1
    for one in random_predictions:
        torch.testing.assert_close(values_at(one, points), sample_maps(one.mask_logits(), points), rtol=0, atol=1e-12)


def test_masks_of_chosen_queries_are_those_of_the_whole_product(random_predictions):
    one = random_predictions[0]
    queries = torch.tensor([[3, 0, 6], [1, 1, 5]])
    whole = torch.einsum("bqc,bchw->bqhw", one.embeddings, one.features)
    torch.testing.assert_close(one.mask_logits(), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.masks_of(queries), whole[[[0], [1]], queries], rtol=0, atol=1e-12)


def test_the_matching_cost_is_the_published_formula():
    torch.manual_seed(0)
    values, targets = torch.randn(2, 6, 50, dtype=torch.float64) * 3, torch.rand(2, 4, 50, dtype=torch.float64)
    logits = torch.randn(2, 6, 5, dtype=torch.float64)
    inside, outside = -F.logsigmoid(values), -F.logsigmoid(-values)
    bce = (inside @ targets.mT + outside @ (1 - targets).mT) / 50
    sigmoid = values.sigmoid()[:, :, None]
    both = (sigmoid * targets[:, None]).sum(-1)
    dice = 1 - (2 * both + 1) / (sigmoid.sum(-1) + targets[:, None].sum(-1) + 1)
    expected = 5 * bce + 5 * dice - 2 * logits.softmax(-1)[..., :4]
    torch.testing.assert_close(matching_cost(values, targets, logits), expected, rtol=0, atol=1e-12)


def test_all_predictions_are_matched_as_each_alone(random_predictions, labels):
    points = torch.rand(2, 300, 2)
    loss = MaskClassificationLoss(4)
    predictions = [Prediction(*(t.float() for t in one)) for one in random_predictions]
    together = loss.match(predictions, labels, points)
    assert together.queries.shape == (3, 2, 4)
    for i, one in enumerate(predictions):
        alone = loss.match([one], labels, points)
        assert torch.equal(alone.queries[0], together.queries[i])
        assert torch.equal(alone.classes[0], together.classes[i])


def test_unmatched_queries_should_say_no_object_and_matched_ones_their_class():
    matches = Matches(torch.tensor([[[2, 0], [1, 0]]]), torch.tensor([[[3, 1], [0, -1]]]))
    assert matches.class_targets(num_q=3, no_object=9).tolist() == [[[1, 9, 3], [9, 0, 9]]]


def test_the_terms_of_all_predictions_at_once_equal_the_plain_loss_of_each(random_predictions, labels, monkeypatch):
    """Dense masks, one prediction and one image at a time, as published; images with different numbers of classes."""
    labels[1][labels[1] == 3] = 255
    points = torch.rand(2, 1000, 2)
    loss = MaskClassificationLoss(4)
    predictions = [Prediction(*(t.float() for t in one)) for one in random_predictions]
    matches = loss.match(predictions, labels, points)
    monkeypatch.setattr(loss, "match", lambda *args: matches)
    torch.manual_seed(1)
    terms = loss(predictions, labels)
    torch.manual_seed(1)
    drawn = torch.rand(2, 3 * 12544 + 12544 // 4, 2)
    for i, one in enumerate(predictions):
        bce = dice = 0
        target = torch.full((2, 7), 4)
        for b in range(2):
            for query, k in zip(matches.queries[i, b].tolist(), matches.classes[i, b].tolist(), strict=True):
                if k < 0:
                    continue
                target[b, query] = k
                mask = one.mask_logits()[b, query][None, None]
                candidates = sample_maps(mask, drawn[b : b + 1, : 3 * 12544])[0, 0]
                uncertain = candidates.abs().sort().indices[: 12544 * 3 // 4]
                at = torch.cat((drawn[b, uncertain], drawn[b, 3 * 12544 :]))[None]
                value = sample_maps(mask, at)[0, 0]
                inside = sample_maps((labels[b] == k).float()[None, None], at)[0, 0]
                bce += F.binary_cross_entropy_with_logits(value, inside) / 7
                overlap = 2 * (value.sigmoid() * inside).sum() + 1
                dice += (1 - overlap / (value.sigmoid().sum() + inside.sum() + 1)) / 7
        entropy = F.cross_entropy(one.class_logits.flatten(0, 1), target.flatten(), loss.class_weight)
        expected = torch.stack([5 * bce, 5 * dice, 2 * entropy])
        torch.testing.assert_close(torch.stack([term[i] for term in terms.values()]), expected, rtol=1e-5, atol=1e-6)
