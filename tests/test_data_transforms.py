import pytest
import torch

from eomt.data.labels import IGNORE
from eomt.data.transforms import TrainTransform, choose_crop, jitter_colors


def scene(height=60, width=100):
    """Labels of four vertical stripes, and an image that shows each label as a gray level."""
    labels = (torch.arange(width) * 4 // width).to(torch.uint8).expand(height, width).contiguous()
    return (labels * 50 + 50).expand(3, height, width).contiguous(), labels


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
    shapes = [transform.resize(*scene(60, 100))[1].shape for _ in range(200)]
    scales = [height / 60 for height, _ in shapes]
    assert 0.4 < min(scales) < 0.5 and 1.5 < max(scales) < 50 / 60 * 2 + 0.01  # 50/60 just fits
    assert all(abs(width / height - 100 / 60) < 0.1 for height, width in shapes)


@pytest.mark.parametrize("position", [(0, 0), (0, 399), (399, 0), (399, 399), (200, 123)])
def test_a_crop_shows_the_only_labelled_pixel(position):
    labels = torch.full((400, 400), IGNORE, dtype=torch.uint8)
    labels[position] = 3
    for seed in range(10):
        torch.manual_seed(seed)
        top, left = choose_crop(labels, (16, 24))
        assert 0 <= top <= 400 - 16 and 0 <= left <= 400 - 24
        assert (labels[top : top + 16, left : left + 24] == 3).any()


def test_an_image_without_a_labelled_pixel_is_cropped_all_the_same():
    labels = torch.full((80, 80), IGNORE, dtype=torch.uint8)
    image, labels = TrainTransform((32, 32))(torch.zeros(3, 80, 80, dtype=torch.uint8), labels)
    assert image.shape == (3, 32, 32) and (labels == IGNORE).all()


def test_colour_jitter_changes_colours_but_not_beyond_its_bounds():
    gray = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    values = [int(jitter_colors(gray)[0, 0, 0]) for _ in range(200)]
    # On a uniform gray, contrast, saturation and hue do nothing: what is left is the brightness.
    assert len(set(values)) > 10
    rounding = 3  # each step rounds down to uint8
    assert 100 * (1 - 32 / 255) - rounding <= min(values) and max(values) <= 100 * (1 + 32 / 255)


@pytest.mark.parametrize(
    "options", [{"img_size": (32,)}, {"img_size": (0, 8)}, {"img_size": (8, 8), "scale_range": (2, 1)}]
)
def test_impossible_sizes_and_scales_are_refused(options):
    with pytest.raises(ValueError, match=r"img_size|scale_range"):
        TrainTransform(**options)
