import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from eomt.data.transforms import TrainTransform, adjust_colors, adjust_hue, draw_adjustments, draw_crop, nearest
from eomt.indices import IGNORE


def scene(height=60, width=100):
    """Labels of four vertical stripes, and an image that shows each label as a gray level."""
    labels = (torch.arange(width) * 4 // width).to(torch.uint8).expand(height, width).contiguous()
    return (labels * 50 + 50).expand(3, height, width).contiguous(), labels


def noise(height, width, seed=0):
    """An image and labels of four classes, a fifth of them ignored, without any structure; laid out as decoded."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    labels = torch.randint(0, 5, (height, width), dtype=torch.uint8, generator=generator)
    return image, torch.where(labels == 4, IGNORE, labels)


def texture(height, width):
    """A colourful image that varies smoothly, uint8 [3, H, W]."""
    coarse = torch.randint(0, 256, (3, 9, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return F.resize(coarse, [height, width], InterpolationMode.BILINEAR, antialias=True)


def torchvisions(image, adjustments):
    """The whole image with its colours adjusted by torchvision's formulas."""
    for adjust, factor in adjustments:
        image = (F.adjust_hue if adjust is adjust_hue else adjust)(image, factor)
    return image


def resized_then_cropped(image, labels, img_size, scale_range, color_jitter):
    """The plain formula: the whole image and all labels flipped, resized, recoloured and padded, then cropped."""
    if torch.rand(()) < 0.5:
        image, labels = F.horizontal_flip(image), F.horizontal_flip(labels)
    low, high = scale_range
    scale = low + (high - low) * torch.rand(()).item()
    scale *= min(img_size[0] / labels.shape[0], img_size[1] / labels.shape[1])
    size = [max(1, int(side * scale)) for side in labels.shape]
    image = F.resize(image.contiguous(), size, InterpolationMode.BILINEAR, antialias=True)
    labels = F.resize(labels[None], size, InterpolationMode.NEAREST)[0]
    image = torchvisions(image, draw_adjustments() if color_jitter else [])
    bottom, right = (max(0, side - have) for side, have in zip(img_size, size, strict=True))
    image, labels = F.pad(image, [0, 0, right, bottom]), F.pad(labels[None], [0, 0, right, bottom], fill=IGNORE)[0]
    while True:
        top, left = (int(torch.randint(have - side + 1, ())) for side, have in zip(img_size, labels.shape, strict=True))
        window = (..., slice(top, top + img_size[0]), slice(left, left + img_size[1]))
        if (labels[window] != IGNORE).any():
            return image[window], labels[window]


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (128, 64)])
def test_crops_have_the_size_asked_for_and_labels_in_range(size):
    transform = TrainTransform(size)
    for _ in range(10):
        image, labels = transform(*scene())
        assert image.shape == (3, *size) and labels.shape == size
        assert image.dtype == labels.dtype == torch.uint8
        assert image.is_contiguous() and labels.is_contiguous()
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, IGNORE}


def test_image_and_labels_stay_aligned():
    transform = TrainTransform((64, 64), color_jitter=False)
    for seed in range(20):
        torch.manual_seed(seed)
        image, labels = transform(*scene())
        shown = torch.where(labels == IGNORE, 0, labels * 50 + 50)
        # Bilinear resampling blurs the edges between stripes, about a pixel each.
        assert ((image[0].int() - shown.int()).abs() < 3).float().mean() > 0.85


def test_padding_is_black_ignored_and_at_the_bottom_and_right():
    transform = TrainTransform((64, 64), scale_range=(0.5, 0.5), color_jitter=False, flip=False)
    image, labels = transform(*scene(64, 64))
    assert (labels[:32, :32] != IGNORE).all()
    assert (labels[32:] == IGNORE).all() and (labels[:, 32:] == IGNORE).all()
    assert (image[:, 32:] == 0).all() and (image[:, :, 32:] == 0).all()


def test_the_same_seed_gives_the_same_crop_and_another_seed_another():
    transform = TrainTransform((32, 32))
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 60, 100), dtype=torch.uint8)

    def crop(seed):
        torch.manual_seed(seed)
        return transform(image, scene()[1])[0]

    assert torch.equal(crop(1), crop(1))
    assert not torch.equal(crop(1), crop(2))


def test_half_of_the_images_are_flipped():
    transform = TrainTransform((60, 100), scale_range=(1, 1), color_jitter=False)
    torch.manual_seed(0)
    first_columns = [int(transform(*scene())[1][0, 0]) for _ in range(200)]
    assert set(first_columns) == {0, 3}
    assert 70 < first_columns.count(3) < 130


def test_the_scale_covers_its_range_and_keeps_the_aspect_ratio():
    transform = TrainTransform((50, 100), scale_range=(0.5, 2.0))
    torch.manual_seed(0)
    shapes = [transform.draw_size(60, 100) for _ in range(200)]
    scales = [height / 60 for height, _ in shapes]
    assert 0.4 < min(scales) < 0.5 and 1.5 < max(scales) < 50 / 60 * 2 + 0.01  # 50/60 just fits
    assert all(abs(width / height - 100 / 60) < 0.1 for height, width in shapes)


@pytest.mark.parametrize("scale_range", [(0.2, 0.6), (0.5, 2.0), (1, 1), (2.5, 4)])
@pytest.mark.parametrize(("size", "img_size"), [((60, 100), (32, 48)), ((37, 53), (64, 40)), ((90, 41), (64, 64))])
def test_cropping_first_shows_what_resizing_everything_and_cropping_shows(size, img_size, scale_range):
    transform = TrainTransform(img_size, scale_range, color_jitter=False)
    for seed in range(25):
        torch.manual_seed(seed)
        expected_image, expected_labels = resized_then_cropped(*noise(*size, seed), img_size, scale_range, False)
        torch.manual_seed(seed)
        image, labels = transform(*noise(*size, seed))
        assert torch.equal(labels, expected_labels)
        assert (image.int() - expected_image.int()).abs().max() <= 1  # a mirrored filter rounds otherwise


@pytest.mark.parametrize("size", [(60, 100), (300, 500)])
def test_recolouring_the_crop_shows_what_recolouring_everything_and_cropping_shows(size):
    image, labels = texture(*size), noise(*size)[1]
    image[:, :, size[1] // 2 :] //= 4  # so that crops are brighter or darker than the whole
    for seed in range(25):
        torch.manual_seed(seed)
        expected, _ = resized_then_cropped(image, labels, (40, 48), (2, 4), True)
        torch.manual_seed(seed)
        crop, _ = TrainTransform((40, 48), (2, 4))(image, labels)
        # Resizing, hue and contrast are within 1 level each, and the steps after them stretch that.
        assert (crop.int() - expected.int()).abs().max() <= 4
        assert (crop.int() - expected.int()).abs().float().mean() < 0.6


@pytest.mark.parametrize("old", [1, 7, 12, 360, 720, 1024, 2048])
def test_positions_of_nearest_neighbours_are_those_of_resized_labels(old):
    labels = (torch.arange(old) % 251).to(torch.uint8)
    for new in (1, 2, 7, 74, 141, old, 2 * old, *range(183, 2100, 61)):
        resized = F.resize(labels[None, :, None].expand(1, old, 3), [new, 3], InterpolationMode.NEAREST)
        assert torch.equal(labels[nearest(old, new)], resized[0, :, 0])


def test_a_crop_does_not_depend_on_how_the_image_lies_in_memory():
    image, labels = noise(60, 100)
    for seed in range(10):
        crops = []
        for layout in (image, image.contiguous()):
            torch.manual_seed(seed)
            crops.append(TrainTransform((32, 48), color_jitter=False)(layout, labels)[0].int())
        assert (crops[0] - crops[1]).abs().max() <= 1


def test_crops_never_share_memory_with_what_they_were_cut_from():
    image, labels = (tensor.contiguous() for tensor in noise(32, 48))
    before = image.clone(), labels.clone()
    transform = TrainTransform((32, 48), scale_range=(1, 1), color_jitter=False, flip=False)
    for crop in transform(image, labels):
        crop.zero_()
    assert torch.equal(image, before[0]) and torch.equal(labels, before[1])


@pytest.mark.parametrize("position", [(0, 0), (0, 399), (399, 0), (399, 399), (200, 123)])
def test_a_crop_shows_the_only_labelled_pixel(position):
    labels = torch.full((400, 400), IGNORE, dtype=torch.uint8)
    labels[position] = 3
    for seed in range(10):
        torch.manual_seed(seed)
        top, left, crop = draw_crop(labels, torch.arange(400), torch.arange(400), (16, 24))
        assert 0 <= top <= 400 - 16 and 0 <= left <= 400 - 24
        assert torch.equal(crop, labels[top : top + 16, left : left + 24]) and (crop == 3).any()


def test_an_image_without_a_labelled_pixel_is_cropped_all_the_same():
    labels = torch.full((80, 80), IGNORE, dtype=torch.uint8)
    image, labels = TrainTransform((32, 32))(torch.zeros(3, 80, 80, dtype=torch.uint8), labels)
    assert image.shape == (3, 32, 32) and (labels == IGNORE).all()


def test_colour_jitter_changes_colours_but_not_beyond_its_bounds():
    gray = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    values = [int(adjust_colors(gray, draw_adjustments(), whole=gray)[0, 0, 0]) for _ in range(200)]
    # On a uniform gray, contrast, saturation and hue do nothing: what is left is the brightness.
    assert len(set(values)) > 10
    rounding = 3  # each step rounds down to uint8
    assert 100 * (1 - 32 / 255) - rounding <= min(values) and max(values) <= 100 * (1 + 32 / 255)


def test_each_colour_changes_half_of_the_time_and_evenly_within_its_bounds():
    torch.manual_seed(0)
    drawn = [draw_adjustments() for _ in range(2000)]
    bounds = {
        F.adjust_brightness: (1 - 32 / 255, 1 + 32 / 255),
        F.adjust_contrast: (0.5, 1.5),
        F.adjust_saturation: (0.5, 1.5),
        adjust_hue: (-0.05, 0.05),
    }
    for adjust, (low, high) in bounds.items():
        shares = [(factor - low) / (high - low) for steps in drawn for step, factor in steps if step is adjust]
        assert 900 < len(shares) < 1100
        assert 0 <= min(shares) < 0.01 and 0.99 < max(shares) <= 1
        assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.04)


def test_contrast_comes_before_saturation_and_hue_or_after_them_equally_often():
    torch.manual_seed(0)
    orders = [tuple(step for step, _ in draw_adjustments()) for _ in range(3000)]
    complete = [order for order in orders if len(order) == 4]
    first, last = (
        (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, adjust_hue),
        (F.adjust_brightness, F.adjust_saturation, adjust_hue, F.adjust_contrast),
    )
    assert set(complete) == {first, last}
    assert 0.4 < complete.count(first) / len(complete) < 0.6


@pytest.mark.parametrize("turns", [-0.5, -0.05, -0.0123, 0.0, 0.031, 0.05, 0.3])
def test_the_hue_turns_as_torchvisions_does_to_a_gray_level(turns):
    levels = torch.tensor([*range(0, 255, 12), 1, 127, 128, 254, 255], dtype=torch.uint8)
    colors = torch.cartesian_prod(levels, levels, levels).T[:, None]
    difference = adjust_hue(colors, turns).int() - F.adjust_hue(colors, turns).int()
    assert difference.abs().max() <= 1
    assert difference.abs().float().mean() < 0.1


@pytest.mark.parametrize("seed", range(12))
def test_a_crop_has_the_colours_that_it_has_in_the_whole_image(seed):
    whole = texture(300, 620)
    window = (..., slice(200, 290), slice(20, 300))  # brighter or darker than the rest
    torch.manual_seed(seed)
    adjustments = draw_adjustments()
    expected = torchvisions(whole, adjustments)
    crop = adjust_colors(whole[window], adjustments, whole)
    # Hue is within 1 level, contrast too, and the steps after them stretch that.
    assert (crop.int() - expected[window].int()).abs().max() <= 3
    assert (crop.int() - expected[window].int()).abs().float().mean() < 0.6


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_contrast_is_around_the_mean_of_the_whole_image_not_of_the_crop(factor):
    whole = texture(512, 1024)
    whole[:, :256, :300] //= 4
    crop = adjust_colors(whole[:, :256, :300], [(F.adjust_contrast, factor)], whole)
    assert (crop.int() - F.adjust_contrast(whole, factor)[:, :256, :300].int()).abs().max() <= 1


def test_the_mean_that_contrast_uses_has_gone_through_the_steps_before_it():
    whole = texture(300, 300)
    steps = [(F.adjust_brightness, 0.88), (F.adjust_saturation, 1.4), (F.adjust_contrast, 0.5)]
    expected = F.adjust_contrast(F.adjust_saturation(F.adjust_brightness(whole, 0.88), 1.4), 0.5)
    assert (adjust_colors(whole, steps, whole).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "options", [{"img_size": (32,)}, {"img_size": (0, 8)}, {"img_size": (8, 8), "scale_range": (2, 1)}]
)
def test_impossible_sizes_and_scales_are_refused(options):
    with pytest.raises(ValueError, match=r"img_size|scale_range"):
        TrainTransform(**options)
