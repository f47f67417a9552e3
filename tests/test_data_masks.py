"""Masks: each value is read as it was written, or the file is refused and says why, at the start and later."""

import numpy as np
import pytest
import torch
from odd_pictures import bmp, encoded, png, tiff
from PIL import Image

from eomt.data.datamodule import feed
from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.sources import ColorDecoder, IndexDecoder, Sample, Source, Splits
from eomt.indices import IGNORE

CLASSES = LabelSet(("a", "b"), ((9, 0, 0), (0, 9, 0)))
IDS = IndexDecoder({0: 0, 1: 1, 255: IGNORE, 254: 0, 17: 0, 85: 0}, "add it to the classes", "the classes have ids")
COLORS = ColorDecoder({(9, 0, 0): 0, (0, 9, 0): 1, (0, 0, 0): IGNORE}, "add it to the classes", "the classes have rgb")
VALUES = np.array([[0, 1], [1, 255]], np.uint8)
PAINTED = np.array([[(9, 0, 0), (0, 9, 0)]], np.uint8)


def named(value):
    """A parameter in the name of its test: no bytes."""
    return value if isinstance(value, str) else type(value).__name__


def dataset(path, content, decoder=IDS):
    path.write_bytes(content)
    source = Source(str(path))
    return SegmentationDataset([Sample("m", source, source)], CLASSES, decoder)


def refusals(path, content, decoder=IDS):
    """What the look at the start says of a mask, and what reading it says; None where it says nothing."""
    masks = dataset(path, content, decoder)
    for read in (masks.samples[0].label.check_mask, lambda: masks.labels(0)):
        try:
            read()
            yield None
        except ValueError as error:
            yield str(error)


@pytest.mark.parametrize(
    ("content", "format"),
    [
        (encoded(Image.fromarray(VALUES), "JPEG", quality=100), "JPEG"),
        (encoded(Image.fromarray(PAINTED), "MPO", save_all=True, append_images=[Image.new("RGB", (2, 1))]), "JPEG"),
        (encoded(Image.fromarray(PAINTED), "WEBP", quality=100), "WebP with loss"),
        (encoded(Image.new("RGBA", (4, 4), (9, 0, 0, 50)), "WEBP", quality=90), "WebP with loss"),
        (encoded(Image.fromarray(VALUES), "TIFF", compression="jpeg"), "TIFF with the compression jpeg"),
    ],
    ids=["JPEG", "MPO", "WebP", "WebP with transparency", "TIFF"],
)
@pytest.mark.parametrize("decoder", [IDS, COLORS], ids=["ids", "colours"])
def test_a_mask_in_a_lossy_format_is_refused_whatever_its_name_and_values(tmp_path, content, format, decoder):
    path = tmp_path / "mask.png"
    for refusal in refusals(path, content, decoder):
        assert refusal.startswith(f"{path} is a {format}, a lossy format, which changes the values of a mask")


@pytest.mark.parametrize("kind", ["JPEG2000", "GIF"])
def test_masks_of_formats_that_are_not_read_are_refused_with_their_format(tmp_path, kind):
    for refusal in refusals(tmp_path / "mask.png", encoded(Image.fromarray(VALUES), kind)):
        assert f"mask.png is a file of the format {kind}, which is not read; save it as PNG" in refusal


@pytest.mark.parametrize(
    ("content", "decoder"),
    [
        (encoded(Image.fromarray(PAINTED), "WEBP", lossless=True), COLORS),
        (encoded(Image.fromarray(np.dstack((PAINTED, [[9, 8]])).astype(np.uint8)), "WEBP", lossless=True), COLORS),
        (encoded(Image.fromarray(PAINTED), "PNG"), COLORS),
        (encoded(Image.fromarray(PAINTED), "TIFF", compression="tiff_lzw"), COLORS),
        (encoded(Image.fromarray(VALUES[:1]), "TIFF", compression="packbits"), IDS),
        (encoded(Image.fromarray(VALUES[:1]), "BMP"), IDS),
        (png(VALUES[:1].astype(np.uint16)), IDS),
        *((tiff(VALUES[:1].astype(kind)), IDS) for kind in ("uint16", "int16", "uint32", "int32", "float32")),
        (encoded(Image.fromarray(VALUES[:1]).convert("P"), "PNG", bits=1), IDS),
        (encoded(Image.fromarray(VALUES[:1].astype(bool)), "PNG"), IDS),
    ],
    ids=named,
)
def test_masks_of_lossless_formats_are_read_as_they_were_written(tmp_path, content, decoder):
    masks = dataset(tmp_path / "mask", content, decoder)
    masks.samples[0].label.check_mask()
    assert masks.labels(0).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.array([[0, -1]], np.int8)), "signed numbers of 8 bits"),
        (tiff(VALUES, photometric=0), "white as 0"),
        (tiff(VALUES.astype(np.uint16), photometric=0), "white as 0"),
        (png(VALUES & 1, depth=2), "2 bits of gray"),
        (png(VALUES & 1, depth=4), "4 bits of gray"),
        (png(PAINTED.astype(np.uint16) * 257), "colours of 16 bits"),
        (tiff(PAINTED.astype(np.uint16) * 257), "colours of 16 bits"),
        (tiff(PAINTED.astype(np.uint16) * 257, separate=True), "16 bits a channel and its channels"),
        (tiff(VALUES, VALUES), "holds 2 pictures"),
        (bmp(VALUES & 1, [(0, 0, 0), (255, 255, 255)]), "8 bits a pixel for a palette of gray"),
    ],
    ids=named,
)
def test_a_mask_that_programs_read_differently_is_refused_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "mask.tif"
    assert all(str(path) in refusal and reason in refusal for refusal in refusals(path, content))


@pytest.mark.parametrize(
    ("array", "value"),
    [
        (np.array([[0, -1]], np.int16), "-1"),
        (np.array([[0, -1]], np.int32), "-1"),
        (np.array([[1, 0.5]], np.float32), "0.5"),
        (np.array([[1, np.nan]], np.float32), "nan"),
        (np.array([[1, np.inf]], np.float32), "inf"),
        (np.array([[1, 256]], np.uint16), "256"),
        (np.array([[1, 65_537]], np.int32), "65537"),
    ],
)
def test_a_value_that_eight_bits_do_not_hold_is_named_with_its_file(tmp_path, array, value):
    with pytest.raises(ValueError, match=rf"mask\.tif has the value {value}, label values are 0\.\.255"):
        dataset(tmp_path / "mask.tif", tiff(array)).labels(0)


def test_a_mask_that_is_stored_turned_is_refused_for_its_image_may_not_be(tmp_path):
    turned = Image.new("L", (2, 2)).getexif()
    turned[0x0112] = 6
    for content in (encoded(Image.fromarray(VALUES), "PNG", exif=turned), tiff(VALUES, tags=[(0x0112, 6)])):
        with pytest.raises(ValueError, match=r"mask is stored turned \(EXIF orientation 6\), and its image may"):
            dataset(tmp_path / "mask", content).labels(0)


def test_a_palette_of_gray_whose_order_is_another_is_refused_where_both_readings_are_classes(tmp_path):
    picture = Image.fromarray(VALUES & 1).convert("P")
    picture.putpalette([1, 1, 1, 0, 0, 0])  # as programs write that sort colours by how often they occur
    with pytest.raises(ValueError, match=r"mask\.png has a palette of gray"):
        dataset(tmp_path / "mask.png", encoded(picture, "PNG")).labels(0)
    picture.putpalette([0, 0, 0, 200, 200, 200])  # one that is there to be looked at
    assert torch.equal(dataset(tmp_path / "mask.png", encoded(picture, "PNG")).labels(0), torch.tensor(VALUES & 1))


@pytest.mark.parametrize(
    ("array", "decoder", "advice"),
    [
        (np.dstack([VALUES] * 3), IDS, r"single channel of class ids, it has mode RGB; its colours are all gray: save"),
        (
            np.dstack([VALUES] * 4),
            IDS,
            r"single channel of class ids, it has mode RGBA; its colours are all gray: save",
        ),
        (PAINTED, IDS, r"single channel of class ids, it has mode RGB; the classes have ids$"),
        (VALUES, COLORS, r"must be an RGB colour mask, it has mode L; the classes have rgb$"),
        (VALUES.astype(np.uint16), COLORS, r"must be an RGB colour mask, it has mode I;16; the classes have rgb$"),
    ],
)
def test_a_mask_of_the_other_kind_is_told_what_helps(tmp_path, array, decoder, advice):
    with pytest.raises(ValueError, match=advice):
        dataset(tmp_path / "mask.png", encoded(Image.fromarray(array), "PNG"), decoder).labels(0)


def test_indices_in_a_palette_where_colours_are_listed_are_told_what_helps(tmp_path):
    content = encoded(Image.fromarray(VALUES & 1).convert("P"), "PNG")
    with pytest.raises(
        ValueError, match=r"has the colour \(1, 1, 1\).* of its palette are the class ids: the classes have rgb"
    ):
        dataset(tmp_path / "mask.png", content, COLORS).labels(0)


def test_a_lossy_mask_among_many_is_refused_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("eomt.data.survey.IMAGES", 1)  # the others are looked at, not decoded
    paths = [tmp_path / f"{k}.png" for k in range(9)]
    for path in paths:
        path.write_bytes(encoded(Image.fromarray(VALUES), "PNG"))
    samples = [Sample(path.stem, Source(str(path)), Source(str(path))) for path in paths]
    data = feed(Splits(samples, samples[:1], CLASSES, IDS), img_size=(16, 16), batch_size=1, num_workers=0)
    data.check_files()
    paths[6].write_bytes(encoded(Image.new("L", (2, 2), 1), "JPEG"))
    with pytest.raises(ValueError, match=r"6\.png is a JPEG, a lossy format"):
        data.check_files()
