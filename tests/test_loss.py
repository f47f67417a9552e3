"""Matching and loss agree with the published implementation and with the dense formula."""

import pytest
import torch

from eomt.training.mask_classification_loss import (
    MaskClassificationLoss,
    class_loss,
    classes_present,
    mask_losses,
    match,
    sample_all_classes,
    sample_maps,
    sample_one_class,
    uncertain_points,
)


@pytest.fixture
def labels():
    values = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8)
    return values[torch.randint(5, (2, 24, 40), generator=torch.Generator().manual_seed(0))]


def test_assignment_matches_the_published_one(reference):
    tensors, facts = reference
    loss = MaskClassificationLoss(facts["num_classes"])
    points = torch.cat([tensors["matcher.points.0"], tensors["matcher.points.1"]])
    image, query, classes = loss.match(
        tensors["masked.mask_logits.3"], tensors["masked.class_logits.3"], tensors["semantic_target"], points
    )
    for b in range(2):
        present = tensors["semantic_target"][b].unique()[tensors[f"matcher.target_index.{b}"]]
        assert query[image == b].tolist() == tensors[f"matcher.query_index.{b}"].tolist()
        assert classes[image == b].tolist() == present.tolist()


def test_the_three_losses_match_the_published_ones(reference):
    tensors, facts = reference
    mask_logits, class_logits = tensors["masked.mask_logits.3"], tensors["masked.class_logits.3"]
    labels = tensors["semantic_target"]
    image = torch.cat([torch.full_like(tensors[f"matcher.query_index.{b}"], b) for b in range(2)])
    query = torch.cat([tensors[f"matcher.query_index.{b}"] for b in range(2)])
    classes = torch.cat([labels[b].unique()[tensors[f"matcher.target_index.{b}"]] for b in range(2)]).long()
    points = tensors["loss.points"]

    masks = sample_maps(mask_logits[image, query][:, None], points).squeeze(1)
    bce, dice = mask_losses(masks, sample_one_class(labels, image, classes, points), len(image))
    entropy = class_loss(
        class_logits, (image, query, classes), MaskClassificationLoss(facts["num_classes"]).class_weight
    )
    for ours, name in ((bce, "mask_bce"), (dice, "dice"), (entropy, "cross_entropy")):
        torch.testing.assert_close(ours, tensors[f"loss.{name}"], rtol=1e-4, atol=0)


def test_sampling_the_label_map_equals_sampling_dense_masks(labels):
    points = torch.rand(2, 500, 2, dtype=torch.float64) * 1.2 - 0.1  # some lie outside the image
    dense = torch.stack([(labels == k).double() for k in range(4)], 1)
    expected = sample_maps(dense, points)
    torch.testing.assert_close(sample_all_classes(labels, points, 4), expected, rtol=0, atol=1e-12)
    image, classes = torch.tensor([1, 0, 1]), torch.tensor([3, 2, 0])
    torch.testing.assert_close(
        sample_one_class(labels, image, classes, points[image]), expected[image, classes], rtol=0, atol=1e-12
    )


def test_matching_finds_the_query_that_drew_the_class(labels):
    mask_logits = torch.full((2, 6, 24, 40), -8.0)
    class_logits = torch.zeros(2, 6, 5)
    for k, query in enumerate((4, 2, 0, 5)):
        mask_logits[:, query][labels == k] = 8.0
        class_logits[:, query, k] = 8.0
    image, query, classes = MaskClassificationLoss(4).match(mask_logits, class_logits, labels)
    assert [(q, k) for b, q, k in zip(image, query, classes, strict=True) if b == 0] == [(0, 2), (2, 1), (4, 0), (5, 3)]


def test_a_perfect_prediction_costs_almost_nothing_and_a_wrong_one_does(labels):
    labels = labels.new_tensor([[0, 1], [2, 3]]).repeat_interleave(64, 0).repeat_interleave(64, 1).expand(2, -1, -1)
    masks = torch.stack([(labels == k).float() * 40 - 20 for k in range(4)], 1)
    logits = 20 * torch.eye(5)[None, :4].expand(2, -1, -1)
    loss = MaskClassificationLoss(4, num_points=2000)
    right = sum(loss(masks, logits, labels).values())
    wrong = sum(loss(-masks, logits, labels).values())
    assert right < 2.0 < 20 < wrong


def test_an_image_of_ignored_pixels_trains_only_towards_no_object():
    loss = MaskClassificationLoss(4, num_points=50)
    mask_logits = torch.randn(2, 6, 8, 8, requires_grad=True)
    class_logits = torch.zeros(2, 6, 5, requires_grad=True)
    terms = loss(mask_logits, class_logits, torch.full((2, 32, 32), 255, dtype=torch.uint8))
    assert terms["mask"] == terms["dice"] == 0
    sum(terms.values()).backward()
    assert class_logits.grad[..., 4].max() < 0 and not mask_logits.grad.any()


def test_a_label_that_would_collide_with_no_object_is_refused(labels):
    labels[0, 3, 3] = 4
    with pytest.raises(ValueError, match=r"label 4 in a target, but the classes are 0\.\.3"):
        classes_present(labels, 4)


def test_a_diverged_network_is_named_as_such():
    with pytest.raises(ValueError, match="diverged"):
        match(torch.full((1, 3, 2), torch.nan), torch.ones(1, 2, dtype=torch.bool))


def test_fewer_queries_than_classes_match_the_cheapest():
    cost = torch.tensor([[[3.0, 1.0, 2.0]]])
    image, query, classes = match(cost, torch.ones(1, 3, dtype=torch.bool))
    assert (image.tolist(), query.tolist(), classes.tolist()) == ([0], [0], [1])


def test_uncertain_points_lie_near_the_mask_border():
    ramp = torch.linspace(-10, 10, 64).expand(1, 1, 64, 64)  # zero in the middle
    torch.manual_seed(0)
    points = uncertain_points(ramp, 1000, oversample_ratio=3.0, importance_ratio=0.75)
    assert points.shape == (1, 1000, 2) and points.min() >= 0 and points.max() <= 1
    assert (points[0, :750, 0] - 0.5).abs().quantile(0.99) < 0.15
    assert (points[0, 750:, 0] - 0.5).abs().quantile(0.99) > 0.45


def test_class_weights_scale_their_class_alone():
    logits = torch.zeros(1, 2, 4)
    matched = (torch.tensor([0]), torch.tensor([0]), torch.tensor([2]))
    logits[0, 0] = torch.tensor([0.0, 0.0, -5.0, 0.0])
    heavy = MaskClassificationLoss(3, class_weights=[1, 1, 10]).class_weight
    light = MaskClassificationLoss(3, class_weights=[10, 10, 1]).class_weight
    assert class_loss(logits, matched, heavy) > class_loss(logits, matched, light)
    with pytest.raises(ValueError, match="2 numbers, there are 3 classes"):
        MaskClassificationLoss(3, class_weights=[1, 1])
