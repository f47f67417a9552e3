"""Sliding-window evaluation is the published one, and holds for windows that are not square.

It is computed strip by strip; `plain_scores` is the same formula on whole images.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from eomt.inference import windows as semantic_inference
from eomt.inference.windows import (
    classify,
    interpolate_rows,
    resized_size,
    score_strips,
    segment,
    to_windows,
    window_origins,
)
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

IMAGE_SIZES = [(360, 480), (480, 360), (100, 100), (33, 500), (64, 96), (61, 41), (97, 251)]
WINDOWS = [(64, 96), (96, 64), (64, 64)]


def plain_scores(mask_logits, class_logits, origins, window, image_size):
    """The published formula: all maps of all windows, merged, then resized."""
    masks = F.interpolate(mask_logits, window, mode="bilinear").sigmoid()
    scores = torch.einsum("nqhw,nqk->nkhw", masks, class_logits.softmax(-1)[..., :-1])
    total = scores.new_zeros(scores.shape[1], *resized_size(image_size, window))
    count = torch.zeros_like(total[0])
    for of_window, (y, x) in zip(scores, origins, strict=True):
        total[:, y : y + window[0], x : x + window[1]] += of_window
        count[y : y + window[0], x : x + window[1]] += 1
    return F.interpolate((total / count)[None], image_size, mode="bilinear")[0]


def draw_logits(image_size, window, dtype=torch.float64, queries=7, classes=4):
    generator = torch.Generator().manual_seed(0)
    origins = window_origins(resized_size(image_size, window), window)
    maps = len(origins), queries, window[0] // 4, window[1] // 4
    masks = 3 * torch.randn(maps, dtype=dtype, generator=generator)
    return masks, 2 * torch.randn(*maps[:2], classes + 1, dtype=dtype, generator=generator), origins


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


@pytest.mark.parametrize("image_size", [*IMAGE_SIZES, (640, 960)])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_cover_every_pixel_and_none_sticks_out(image_size, window):
    size = resized_size(image_size, window)
    covered = torch.zeros(size)
    for y, x in window_origins(size, window):
        assert y + window[0] <= size[0] and x + window[1] <= size[1]
        covered[y : y + window[0], x : x + window[1]] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
@pytest.mark.parametrize("window", WINDOWS)
def test_scores_in_strips_are_those_of_the_whole_image(monkeypatch, image_size, window):
    masks, classes, origins = draw_logits(image_size, window)
    monkeypatch.setattr(semantic_inference, "STRIP_CELLS", masks.shape[1] * window[1] * 10)  # 10 rows at a time
    strips = list(score_strips(masks, classes, origins, window, image_size))
    assert len(strips) >= 6
    plain = plain_scores(masks, classes, origins, window, image_size)
    torch.testing.assert_close(torch.cat(strips, 1), plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("target", [(256, 512), (53, 31), (64, 128), (8, 1), (77, 300)])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, None), slice(7, 20), slice(-1, None)])
def test_some_interpolated_rows_are_those_of_interpolating_all(target, rows):
    maps = torch.randn(3, 64, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    taken = interpolate_rows(lambda r: maps[:, r.start : r.stop], 64, target, range(target[0])[rows])
    whole = F.interpolate(maps[None], target, mode="bilinear")[0]
    torch.testing.assert_close(taken, whole[:, rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("image_size", [(64, 300), (300, 130), (50, 90), (131, 257)])
def test_counts_of_validation_are_those_of_whole_score_maps(image_size):
    torch.manual_seed(0)
    module = MaskClassificationSemantic(**TINY).eval()
    module.network.class_head.weight.data *= 20  # an untrained network likes all classes alike
    image = torch.randint(256, (3, *image_size), dtype=torch.uint8)
    labels = torch.randint(19, image_size, dtype=torch.uint8)
    labels[:5] = 255

    windows, origins = to_windows(image, (64, 128))
    with torch.no_grad(), module.network.deployed():
        (masks,), (classes,) = module.network(windows / 255)
    scores = plain_scores(masks, classes, origins, (64, 128), image_size)
    best = scores.topk(2, dim=0)
    labels[best.values[0] - best.values[1] < 1e-5] = 255  # ties, which rounding decides
    valid = labels != 255
    assert valid.float().mean() > 0.8 and len(best.indices[0].unique()) > 2
    expected = torch.bincount(labels[valid].long() * 19 + best.indices[0][valid], minlength=361).view(19, 19)

    with torch.no_grad():
        module.validation_step(([image], [labels]), 0)
    assert torch.equal(module.confusion.confmat, expected)
    assert torch.equal(classify(module.network, image).long(), segment(module.network, image).argmax(0))


def test_no_map_of_all_queries_and_no_score_map_is_ever_whole():
    class Largest(TorchDispatchMode):
        cells = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple | list) else [result]
            self.cells = max(self.cells, *(out.numel() for out in outputs if isinstance(out, torch.Tensor)), 0)
            return result

    size = (512, 1024)
    masks, classes, origins = draw_logits(size, (512, 512), torch.float32, queries=100, classes=19)
    assert len(origins) == 2
    with Largest() as largest:
        for strip in score_strips(masks, classes, origins, (512, 512), size):
            strip.max(0)
    assert 0 < largest.cells <= semantic_inference.STRIP_CELLS < 19 * size[0] * size[1]


@pytest.mark.parametrize("window", [(64, 96), (96, 64)])
def test_merging_windows_of_a_constant_gives_the_constant(window):
    masks, classes, origins = draw_logits((90, 200), window)
    strips = score_strips(torch.zeros_like(masks), torch.zeros_like(classes), origins, window, (90, 200))
    scores = torch.cat(list(strips), 1)  # 7 queries, half there, give each of 5 classes a fifth of their votes
    torch.testing.assert_close(scores, torch.full((4, 90, 200), 7 * 0.5 / 5, dtype=torch.float64))
