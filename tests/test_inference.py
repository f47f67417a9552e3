"""Sliding-window evaluation is the published one, and holds for windows that are not square."""

import pytest
import torch

from eomt.training.semantic_inference import merge_windows, resized_size, segment, to_windows, window_origins


@pytest.mark.parametrize("name", ["wide", "tall", "small"])
def test_windows_scores_and_prediction_match_the_published_ones(reference, reference_network, name):
    tensors, facts = reference
    image = tensors[f"window.{name}.image"]
    windows, origins = to_windows(image, (96, 96))
    assert torch.equal(windows, tensors[f"window.{name}.crops"])
    assert [max(origin) for origin in origins] == [start for start, _ in facts["window_origins"][name]]

    scores = segment(reference_network, image)
    assert reference_network.masked_attn_enabled
    torch.testing.assert_close(scores[:, ::7, ::7], tensors[f"window.{name}.logits_sample"], atol=1e-4, rtol=0)
    published = tensors[f"window.{name}.prediction"]
    same = (scores.argmax(0) == published).float().mean()
    assert same == 1, f"{1 - same:.2e} of the pixels differ"


@pytest.mark.parametrize("image_size", [(360, 480), (480, 360), (100, 100), (33, 500), (64, 96), (640, 960)])
@pytest.mark.parametrize("window", [(64, 96), (96, 64), (64, 64)])
def test_windows_cover_every_pixel_and_none_sticks_out(image_size, window):
    size = resized_size(image_size, window)
    covered = torch.zeros(size)
    for y, x in window_origins(size, window):
        assert y + window[0] <= size[0] and x + window[1] <= size[1]
        covered[y : y + window[0], x : x + window[1]] += 1
    assert covered.min() >= 1


def test_merging_windows_of_a_constant_gives_the_constant():
    _, origins = to_windows(torch.zeros(3, 90, 200, dtype=torch.uint8), (64, 96))
    merged = merge_windows(torch.full((len(origins), 2, 64, 96), 0.3), origins, (90, 200))
    assert merged.shape == (2, 90, 200)
    torch.testing.assert_close(merged, torch.full_like(merged, 0.3))
