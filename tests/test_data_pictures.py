"""Which picture files are read, whoever reads them, and in which words the others are refused."""

import io
import re
import warnings
import zlib

import numpy as np
import pytest
import torch
from odd_pictures import png, tiff
from PIL import Image

from eomt.anomaly.cutouts import FolderCutOuts
from eomt.data import pictures
from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.pictures import decode_picture
from eomt.data.sources import IndexDecoder, Sample, Source
from eomt.inference.prediction import read_image

NOISE = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE).resize((200, 120), Image.Resampling.BICUBIC)
JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "no subsampling": {"subsampling": 0},
    "optimised": {"optimize": True, "quality": 40},
}
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def encoded(kind, picture=PHOTO, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def reads(path):
    """What each reader of pictures says of a file: None, or its error."""
    source = Source(str(path))
    dataset = SegmentationDataset([Sample("a", source, source)], LabelSet(("a",), ((0, 0, 0),)), IndexDecoder({}, ""))
    for read in (source.check_complete, lambda: dataset.image(0), lambda: read_image(path)):
        try:
            read()
            yield None
        except ValueError as error:
            yield str(error)


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_middle_is_incomplete_and_a_whole_one_is_read(options, mode):
    whole = encoded("JPEG", PHOTO.convert(mode), **options)
    assert decode_picture(whole, "a.jpg").size == PHOTO.size
    half, third = len(whole) // 2, len(whole) // 3
    for cut in (whole[:half] + whole[-2:], whole[:third] + whole[-third:], whole[:-40] + whole[-2:]):
        with pytest.raises(ValueError, match=r"a\.jpg is incomplete .*copy or download it again"):
            decode_picture(cut, "a.jpg")


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_that_ends_in_zeros_is_incomplete(options):
    whole = encoded("JPEG", PHOTO.resize((900, 700)), **options)
    for end in (b"", whole[-2:]):
        zeros = whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2 - len(end)) + end
        with pytest.raises(ValueError, match=r"a\.jpg (is incomplete|cannot be decoded)"):
            decode_picture(zeros, "a.jpg")


@pytest.mark.parametrize("padding", [b"\0" * 100, b"\x12" * 4])
def test_bytes_that_a_camera_puts_before_the_end_of_a_jpeg_do_no_harm(padding):
    whole = encoded("JPEG")
    assert np.array_equal(decode_picture(whole[:-2] + padding + whole[-2:], "a"), decode_picture(whole, "a"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_bytes_after_the_end_of_a_picture_do_no_harm(tmp_path, kind):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(kind) + b"ftypmp42" + bytes(10_000))
    assert list(reads(path)) == [None] * 3


@pytest.mark.parametrize(
    "cut",
    [lambda b: b[: len(b) // 2], lambda b: b[:-20], lambda b: b[: len(b) // 3] + b[-len(b) // 3 :], lambda b: b""],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_picture_is_named_by_every_reader(tmp_path, kind, cut):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(cut(encoded(kind)))
    _, *errors = reads(path)
    assert all(f"{path} is incomplete" in error or f"{path} cannot be decoded" in error for error in errors)
    assert not any("BytesIO" in error or "object at" in error for error in errors)


def test_a_page_of_text_is_no_picture_at_the_start_of_a_run(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"<html>please log in</html>" + PNG_END)
    assert all(f"{path} cannot be decoded as a picture (it is none)" in error for error in reads(path))


def test_a_picture_beyond_pillows_own_limit_is_read(monkeypatch, tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (20_000, 10_000)).save(path)  # 200 megapixels
    warnings.simplefilter("error")
    assert decode_picture(path.read_bytes(), str(path)).size == (20_000, 10_000)


def test_a_picture_that_is_too_large_is_refused_with_its_size_by_every_reader(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 200 * 120 - 1)
    path = tmp_path / "large.png"
    PHOTO.save(path)
    sentence = f"{path} is 200x120 pixels (width x height), more than 0.023999 million in all: cut it into tiles"
    assert list(reads(path))[1:] == [sentence] * 2
    with pytest.raises(ValueError, match=r"large\.png is 200x120 pixels"):
        FolderCutOuts(str(tmp_path))


def test_a_header_that_promises_more_than_is_read_is_refused_before_anything_is_decoded():
    header = b"IHDR" + (10**6).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    content = b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big") + PNG_END
    with pytest.raises(ValueError, match=r"bomb\.png is 1000000x1000000 pixels .* more than 500 million"):
        decode_picture(content, "bomb.png")


def test_a_broken_cut_out_is_named_when_it_is_pasted(tmp_path):
    picture = Image.new("RGBA", (40, 40), (200, 10, 10, 0))
    picture.paste((200, 10, 10, 255), (5, 5, 20, 20))
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG", picture)[:-40] + PNG_END)
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        FolderCutOuts(str(tmp_path))[0]


def test_pixels_are_those_of_pillow(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP"):
        content = encoded(kind)
        plain = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(decode_picture(content, "a"), plain)
        (tmp_path / "a").write_bytes(content)
        assert torch.equal(read_image(tmp_path / "a"), torch.from_numpy(plain).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["I;16", "LA", "P", "CMYK", "1"])
def test_training_and_prediction_see_the_same_colours_whatever_the_mode(tmp_path, mode):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    picture = Image.fromarray(values << 8) if mode == "I;16" else Image.fromarray(values.astype(np.uint8)).convert(mode)
    path = tmp_path / "a.tif"
    picture.save(path)
    source = Source(str(path))
    dataset = SegmentationDataset([Sample("a", source, source)], LabelSet(("a",), ((0, 0, 0),)), IndexDecoder({}, ""))
    assert torch.equal(dataset.image(0), read_image(path))
    if mode == "I;16":
        assert torch.equal(dataset.image(0)[0], torch.from_numpy(values.astype(np.uint8)))  # not white


def readers(path):
    """The pixels [H, W, 3] that training and prediction see of an image."""
    source = Source(str(path))
    dataset = SegmentationDataset([Sample("a", source, source)], LabelSet(("a",), ((0, 0, 0),)), IndexDecoder({}, ""))
    yield from (read().permute(1, 2, 0).numpy() for read in (lambda: dataset.image(0), lambda: read_image(path)))


DEEP = np.random.default_rng(1).integers(0, 2**16, (6, 5, 4), dtype=np.uint16)


@pytest.mark.parametrize(
    "channels", [[0, 0, 0], [0, 1, 2], [0, 1, 2, 3]], ids=["gray", "colours", "colours and a fourth channel"]
)
@pytest.mark.parametrize("write", [png, tiff])
def test_of_sixteen_bits_every_reader_takes_the_high_byte(tmp_path, write, channels):
    (tmp_path / "a").write_bytes(write(DEEP[..., 0] if len(set(channels)) == 1 else DEEP[..., channels]))
    assert all(np.array_equal(pixels, DEEP[..., channels[:3]] >> 8) for pixels in readers(tmp_path / "a"))


def test_a_few_hot_pixels_do_not_make_twelve_bits_sixteen(tmp_path):
    array = np.random.default_rng(0).integers(0, 4096, (40, 40), dtype=np.uint16)
    array[3, :9] = 65535
    (tmp_path / "a.png").write_bytes(png(array))
    _, *errors = reads(tmp_path / "a.png")
    assert all("0.56 % of its values are 4096 or more" in error for error in errors)
    array[:2] = 5000
    (tmp_path / "a.png").write_bytes(png(array))
    assert all(pixels.max() == 255 for pixels in readers(tmp_path / "a.png"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("write", [png, tiff])
@pytest.mark.parametrize("most", [4095, 255])
def test_sixteen_bits_of_which_the_lower_ones_alone_are_used_are_refused_not_black(tmp_path, write, channels, most):
    array = np.full((4, 4, channels), most, np.uint16)
    (tmp_path / "a.png").write_bytes(write(array[..., 0] if channels == 1 else array))
    _, *errors = reads(tmp_path / "a.png")
    assert all("a.png has 16 bits a channel and 0 % of its values are 4096 or more" in error for error in errors)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (tiff(np.ones((4, 4), np.float32)), "32-bit pixels of an unknown range (mode F)"),
        (tiff(np.ones((4, 4), np.int32)), "32-bit pixels of an unknown range (mode I)"),
        (tiff(np.ones((4, 4), np.int16)), "32-bit pixels of an unknown range (mode I)"),
        (tiff(np.ones((4, 4), np.float64)), "TIFF: unknown pixel mode"),
        (tiff(np.ones((4, 4), np.float16)), "TIFF: unknown pixel mode"),
        (tiff(np.ones((4, 4, 3), np.float32)), "TIFF: unknown pixel mode"),
        (tiff(np.ones((4, 4), np.int8)), "signed numbers of 8 bits"),
        (tiff(DEEP[..., :3], separate=True), "16 bits a channel and its channels one after the other"),
        (tiff(DEEP[..., 0], photometric=0), "16 bits and white as 0"),
        (tiff(DEEP[..., 0], DEEP[..., 1]), "holds 2 pictures"),
        (encoded("TIFF", Image.new("LAB", (4, 4))), "pixels of the mode LAB"),
        *(
            (encoded(kind, PHOTO, save_all=True, append_images=[PHOTO.rotate(180)]), "holds 2 pictures")
            for kind in ("PNG", "WEBP", "TIFF")
        ),
        (encoded("GIF"), "format GIF"),
        (encoded("JPEG2000"), "format JPEG2000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_known_range_or_place_is_refused_alike_by_every_reader_with_what_to_do(tmp_path, content, found):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    _, *errors = reads(path)
    assert errors[0] == errors[1] and str(path) in errors[0] and found in errors[0]
    assert re.search("save it as PNG|convert it to|save that one", errors[0])


def test_the_picture_before_a_phones_other_ones_and_before_smaller_copies_is_read(tmp_path):
    first, second = (np.full((4, 4, 3), value, np.uint8) for value in (40, 200))
    pyramid = tiff(first, second[:2, :2], copies=True)
    phone = encoded("MPO", Image.fromarray(first), save_all=True, append_images=[Image.fromarray(second)])
    for content in (pyramid, phone):
        (tmp_path / "a").write_bytes(content)
        assert all((pixels == 40).all() for pixels in readers(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_data_that_nobody_can_read_do_no_harm(tmp_path, kind):
    (tmp_path / "a").write_bytes(encoded(kind, exif=b"Exif\0\0garbage!!"))
    assert list(reads(tmp_path / "a")) == [None] * 3


def test_an_image_whose_turn_is_not_known_is_upright_and_a_turned_tiff_is_turned_once(tmp_path):
    photo = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    (tmp_path / "a").write_bytes(tiff(photo, tags=[(0x0112, 0)]))
    assert all(np.array_equal(pixels, photo) for pixels in readers(tmp_path / "a"))
    (tmp_path / "a").write_bytes(tiff(photo, tags=[(0x0112, 3)]))
    assert np.array_equal(read_image(tmp_path / "a").permute(1, 2, 0), photo[::-1, ::-1])
    with pytest.raises(ValueError, match=r"stored turned \(EXIF orientation 3\)"):
        next(readers(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "WEBP"])
def test_a_cut_file_whose_format_has_no_end_is_seen_at_the_start(tmp_path, kind):
    path = tmp_path / "a"
    path.write_bytes(encoded(kind)[:-100])
    assert all(f"{path} cannot be decoded" in error for error in reads(path))


def test_a_cut_out_of_sixteen_bits_is_read_as_an_image_is(tmp_path):
    array = DEEP.copy()
    array[0] = 0
    (tmp_path / "a.png").write_bytes(png(array))
    assert np.array_equal(FolderCutOuts(str(tmp_path))[0], array[1:] >> 8)


def test_a_cut_out_that_is_stored_turned_is_pasted_as_it_is_seen(tmp_path):
    array = np.zeros((4, 4, 4), np.uint8)
    array[:2, :2] = [[(9, 0, 0, 255), (0, 9, 0, 255)], [(0, 0, 9, 255), (9, 9, 0, 255)]]
    exif = Image.new("L", (1, 1)).getexif()
    exif[0x0112] = 3
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(FolderCutOuts(str(tmp_path))[0], array[1::-1, 1::-1])


@pytest.mark.parametrize(
    "content",
    [
        tiff(np.ones((4, 4), np.float32)),
        tiff(np.ones((4, 4), np.float64)),
        tiff(DEEP[..., 0], DEEP[..., 1]),
        tiff(DEEP[..., :3].astype(np.uint8), tags=[(0x0112, 3)]),
        encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        encoded("GIF"),
        encoded("TIFF", Image.new("LAB", (4, 4))),
    ],
    ids=["float", "double", "pages", "turned TIFF", "turned JPEG", "GIF", "Lab"],
)
def test_what_the_header_says_against_an_image_is_said_before_a_run(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    source = Source(str(tmp_path / "a"))
    with pytest.raises(ValueError) as early:
        source.check_image()
    with pytest.raises(ValueError) as late:
        list(readers(tmp_path / "a"))
    assert str(early.value) == str(late.value)
