"""Data sets of every kind, generated: a run reads the pixels and classes that were written, or names the file.

What each file shows is known from the arrays that it was written from; nothing that is tested takes part in that.
"""

import shutil
from typing import NamedTuple

import numpy as np
import pytest
import simplejpeg
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_pictures import bmp, encoded, png, tiff
from PIL import Image

from eomt.data.datamodule import feed
from eomt.data.folder import splits
from eomt.indices import IGNORE
from eomt.inference.inputs import find_inputs
from eomt.inference.prediction import read_image
from eomt.reporting.dataset_report import Readings

QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=2_500, deadline=None, suppress_health_check=list(HealthCheck))

ENDINGS = (".png", ".PNG", ".jpg", ".tif", ".tiff", ".webp", ".bmp", ".jpeg")  # files are known by their content
PLACES = ("", "a", "a/deep er", "ünder", "linked", "linked/below")
STEMS = ("im", "b.c", "with space", "é", "-x")
STRAYS = ("._im0.png", ".hidden.jpg", ".ipynb_checkpoints", "Thumbs.db", "@eaDir", "__MACOSX", ".DS_Store")
OTHERS = ("readme.txt", "im.heic", "noending")


class File(NamedTuple):
    """A file's bytes, and what it shows: pixels [H, W, 3] or labels [H, W]; None if it must be refused."""

    content: bytes
    shown: np.ndarray | None


class Pair(NamedTuple):
    name: str
    endings: tuple[str, str]
    image: File
    mask: File


def save(array, kind, mode=None, **options):
    return encoded(Image.fromarray(array, mode), kind, **options)


def turned(array):
    exif = Image.new("L", (1, 1)).getexif()
    exif[0x0112] = 3
    return save(array, "PNG", exif=exif)


def palette_picture(indices, palette):
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette(np.asarray(palette, np.uint8).tobytes())
    return encoded(picture, "PNG")


def rgb(array):
    return array if array.ndim == 3 else array[..., None].repeat(3, axis=2)


SECOND = Image.new("RGB", (1, 1))
TWO_COLORS = [[9, 8, 7], [1, 200, 3]]
# How an image is written from random bytes [H, W, 4] and numbers of 16 bits [H, W, 4], and what it shows then.
IMAGES = {
    "gray": lambda x, _: File(save(x[..., 0], "PNG"), rgb(x[..., 0])),
    "gray and alpha": lambda x, _: File(save(x[..., :2].copy(), "PNG", "LA"), rgb(x[..., 0])),
    "black and white": lambda x, _: File(save(x[..., 0] > 127, "PNG"), rgb((x[..., 0] > 127) * np.uint8(255))),
    "palette": lambda x, _: File(palette_picture(x[..., 0] % 2, TWO_COLORS), np.array(TWO_COLORS)[x[..., 0] % 2]),
    "colours": lambda x, _: File(save(x[..., :3].copy(), "PNG"), x[..., :3]),
    "colours and alpha": lambda x, _: File(save(x, "PNG"), x[..., :3]),
    "WebP": lambda x, _: File(save(x[..., :3].copy(), "WEBP", lossless=True), x[..., :3]),
    "BMP": lambda x, _: File(save(x[..., :3].copy(), "BMP"), x[..., :3]),
    "TIFF": lambda x, _: File(tiff(x[..., :3]), x[..., :3]),
    "TIFF in planes": lambda x, _: File(tiff(x[..., :3], separate=True), x[..., :3]),
    "TIFF of four channels": lambda x, _: File(tiff(x), x[..., :3]),
    "TIFF with LZW": lambda x, _: File(save(x[..., :3].copy(), "TIFF", compression="tiff_lzw"), x[..., :3]),
    "TIFF with white as 0": lambda x, _: File(tiff(x[..., 0], photometric=0), rgb(255 - x[..., 0])),
    "JPEG": lambda x, _: jpeg(save(x[..., :3].copy(), "JPEG")),
    "a phone's JPEG": lambda x, _: jpeg(save(x[..., :3].copy(), "MPO", save_all=True, append_images=[SECOND])),
    "16 bits of gray": lambda _, y: File(png(y[..., 0]), rgb(high(y[..., 0]))),
    "16 bits of colours": lambda _, y: File(png(y[..., :3]), high(y[..., :3])),
    "16 bits in TIFF": lambda _, y: File(tiff(y[..., 0]), rgb(high(y[..., 0]))),
    "16 bits in TIFF, colours": lambda _, y: File(tiff(y[..., :3]), high(y[..., :3])),
    "12 bits of gray": lambda _, y: File(png(y[..., 0] >> 4), None),
    "12 bits of colours": lambda _, y: File(tiff(y[..., :3] >> 4), None),
    "16 bits in planes": lambda _, y: File(tiff(y[..., :3], separate=True), None),
    "float": lambda x, _: File(tiff(x[..., 0].astype(np.float32)), None),
    "double": lambda x, _: File(tiff(x[..., 0].astype(np.float64)), None),
    "32 bits": lambda x, _: File(tiff(x[..., 0].astype(np.int32)), None),
    "signed": lambda x, _: File(tiff(x[..., 0].astype(np.int8)), None),
    "two pages": lambda x, _: File(tiff(x[..., 0], x[..., 1]), None),
    "GIF": lambda x, _: File(save(x[..., 0], "GIF"), None),
    "stored turned": lambda x, _: File(turned(x[..., :3].copy()), None),
    "text": lambda x, _: File(b"<html>log in</html>", None),
}


def jpeg(content):
    return File(content, simplejpeg.decode_jpeg(content, "RGB"))


def high(values):
    return (values >> 8).astype(np.uint8)


# How a mask is written from class ids [H, W]; those of the second table must be refused, whatever the ids are.
ID_MASKS = {
    "PNG": png,
    "BMP": lambda ids: save(ids, "BMP"),
    "TIFF": tiff,
    "TIFF, packed": lambda ids: save(ids, "TIFF", compression="packbits"),
    "palette": lambda ids: palette_picture(ids, np.arange(768) * 7 % 256),
    **{kind: lambda ids, kind=kind: tiff(ids.astype(kind)) for kind in ("uint16", "int32", "uint32", "float32")},
    "16 bits": lambda ids: png(ids.astype(np.uint16)),
}
BAD_ID_MASKS = {
    "JPEG": lambda ids: save(ids, "JPEG", quality=100),
    "JPEG in TIFF": lambda ids: save(ids, "TIFF", compression="jpeg"),
    "three channels": lambda ids: save(rgb(ids), "PNG"),
    "signed": lambda ids: tiff(ids.astype(np.int8)),
    "white as 0": lambda ids: tiff(ids, photometric=0),
    "4 bits": lambda ids: png(ids & 15, depth=4),
    "two pages": lambda ids: tiff(ids, ids),
    "two grays in BMP": lambda ids: bmp(ids & 1, [(0, 0, 0), (255, 255, 255)]),
    "negative": lambda ids: tiff(with_one(ids.astype(np.int32), -1)),
    "a fraction": lambda ids: tiff(with_one(ids.astype(np.float32), 0.5)),
    "not finite": lambda ids: tiff(with_one(ids.astype(np.float32), np.nan)),
    "too large": lambda ids: png(with_one(ids.astype(np.uint16), 256)),
    "stored turned": turned,
}
COLOR_MASKS = {
    "PNG": png,
    "alpha": lambda colors: png(np.dstack([colors, colors[..., :1]])),
    "BMP": lambda colors: save(colors, "BMP"),
    "TIFF": tiff,
    "TIFF in planes": lambda colors: tiff(colors, separate=True),
    "WebP": lambda colors: save(colors, "WEBP", lossless=True),
}
BAD_COLOR_MASKS = {
    "JPEG": lambda colors: save(colors, "JPEG", quality=100),
    "WebP": lambda colors: save(colors, "WEBP", quality=100),
    "gray": lambda colors: png(colors[..., 0]),
    "16 bits": lambda colors: png(colors.astype(np.uint16) * 257),
    "CMYK": lambda colors: encoded(Image.fromarray(colors).convert("CMYK"), "TIFF"),
}


def with_one(array, value):
    array[-1, -1] = value
    return array


def any_of(table, random):
    """A way to write, each as likely as any other, which hypothesis' own choices are not."""
    return table[sorted(table)[random.integers(len(table))]]


@st.composite
def class_lists(draw):
    """A class file's content, and the train index of each value that it lists."""
    of_ids = draw(st.booleans())
    byte = st.integers(0, 255)
    value = byte if of_ids else st.tuples(byte, byte, byte)
    lists = draw(st.lists(st.lists(value, min_size=1, max_size=2), min_size=2, max_size=4))
    values = list(dict.fromkeys(value for values in lists for value in values))
    owner = {value: draw(st.integers(0, len(values) - 1)) for value in values}
    groups = [group for k in range(len(values)) if (group := [value for value in values if owner[value] == k])]
    *classes, ignored = groups if len(groups) > 1 and draw(st.booleans()) else (*groups, [])
    kind = "ids" if of_ids else "rgb"
    plain = (lambda value: value) if of_ids else list
    content = {
        "classes": [
            {"name": f"c{k}", "color": [k, 0, 0], kind: [plain(value) for value in group]}
            for k, group in enumerate(classes)
        ],
        f"ignore_{kind}": [plain(value) for value in ignored],
    }
    table = {value: k for k, group in enumerate(classes) for value in group} | dict.fromkeys(ignored, IGNORE)
    return content, table


@st.composite
def masks(draw, table, size, random):
    """A mask of these values: whole mostly, or with something that must be refused."""
    of_ids = isinstance(next(iter(table)), int)
    values = list(table)
    chosen = random.integers(0, len(values), size)
    array = np.array(values, np.uint8)[chosen]
    labels = np.array(list(table.values()), np.uint8)[chosen]
    good, bad = (ID_MASKS, BAD_ID_MASKS) if of_ids else (COLOR_MASKS, BAD_COLOR_MASKS)
    fault = draw(st.sampled_from([None] * 4 + ["kind"] * 2 + ["value", "size"]))
    if fault == "kind":
        return File(any_of(bad, random)(array), None)
    if fault == "value":
        unlisted = st.integers(0, 255) if of_ids else st.tuples(*[st.integers(0, 255)] * 3)
        array, labels = with_one(array.copy(), draw(unlisted.filter(lambda value: value not in table))), None
    if fault == "size":
        array, labels = np.concatenate([array, array]), None
    return File(any_of(good, random)(array), labels)


@st.composite
def data_sets(draw):
    """A class list, pairs of files, and what lies beside them."""
    content, table = draw(class_lists())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs = []
    for k in range(draw(st.integers(2, 4))):
        size = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
        deep = random.integers(0, 2**16, (*size, 4), dtype=np.uint16)
        deep[0, 0] |= 0x8000  # bright enough not to be refused as dark
        image = any_of(IMAGES, random)(random.integers(0, 256, (*size, 4), dtype=np.uint8), deep)
        mask = draw(masks(table, size, random))
        change = draw(st.sampled_from([None] * 6 + ["bytes behind", "cut"]))
        if change == "bytes behind":
            image, mask = (File(file.content + b"\0motion" * 700, file.shown) for file in (image, mask))
        if change == "cut" and mask.shown is not None:
            mask = File(mask.content[: len(mask.content) // 2], None)
        place, stem = draw(st.sampled_from(PLACES)), draw(st.sampled_from(STEMS))
        endings = draw(st.tuples(st.sampled_from(ENDINGS), st.sampled_from(ENDINGS)))
        pairs.append(Pair(f"{place}/{stem}{k}".lstrip("/"), endings, image, mask))
    beside = draw(st.lists(st.tuples(st.sampled_from(PLACES[:4]), st.sampled_from(STRAYS + OTHERS)), unique=True))
    return content, pairs, beside, draw(st.booleans()), draw(st.integers(0, 9)) == 0


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write(root, content, pairs, beside, circle):
    """Writes the data set, in part behind links, and returns how many files lie beside its pictures."""
    (root / "classes.yaml").write_text(yaml.safe_dump(content))
    for part in ("images", "masks"):
        (root / part).mkdir()
        (root / "elsewhere" / part / "below").mkdir(parents=True)
        (root / part / "linked").symlink_to(root / "elsewhere" / part)
        if circle:
            (root / "elsewhere" / part / "below" / "up").symlink_to(root / part)
    for pair in pairs:
        put(root / "images" / f"{pair.name}{pair.endings[0]}", pair.image.content)
        put(root / "masks" / f"{pair.name}{pair.endings[1]}", pair.mask.content)
    for place, name in beside:
        in_folder = name in (".ipynb_checkpoints", "@eaDir", "__MACOSX")
        put(root / "images" / place / (f"{name}/im0.png" if in_folder else name), pairs[0].image.content)
    return len(beside) + 2 * circle


def paths(root, pair):
    return root / "images" / f"{pair.name}{pair.endings[0]}", root / "masks" / f"{pair.name}{pair.endings[1]}"


def error_of(call):
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def check(root, content, pairs, beside, circle, lacks):
    """Training, prediction, the look at the start and the report: all read what was written, or name the file."""
    beside = write(root, content, pairs, beside, circle)
    places = (str(root / "classes.yaml"), str(root / "images"), str(root / "masks"))
    if lacks:
        paths(root, pairs[0])[1].unlink()
        assert repr(pairs[0].name) in error_of(lambda: splits(*places, val_share=0.5))
        return
    found = splits(*places, val_share=0.5)
    assert sum(found.left_out.values()) == beside
    data = feed(found, img_size=(16, 16), batch_size=1, num_workers=0)
    left = {pair.name: pair for pair in pairs}
    for dataset in (data.train_set.with_transform(None), data.val_set):
        for index, name in enumerate(dataset.names):
            check_pair(dataset, index, left.pop(name), *paths(root, next(p for p in pairs if p.name == name)))
    assert not left
    bad = [path for pair in pairs for path, file in zip(paths(root, pair), pair[2:], strict=True) if file.shown is None]
    error = error_of(data.check_files)
    assert any(str(path) in error for path in bad) if bad else error is None
    assert sorted(find_inputs(places[1], root / "out", False)) == sorted(pair.name for pair in pairs)


def check_pair(dataset, index, pair, image, mask):
    """One pair, as training, prediction and the report read it."""
    errors = [error_of(lambda: dataset[index]), Readings(dataset)[index]["error"]]
    if pair.image.shown is None or pair.mask.shown is None:
        assert errors[0] == errors[1]
        assert (pair.image.shown is None and str(image) in errors[0]) or str(mask) in errors[0]
        assert pair.image.shown is None or error_of(lambda: dataset.image(index)) is None
    else:
        assert errors == [None, None]
        pixels, labels = dataset[index]
        assert np.array_equal(pixels.permute(1, 2, 0), pair.image.shown) and np.array_equal(labels, pair.mask.shown)
    if pair.image.shown is not None:
        assert np.array_equal(read_image(image).permute(1, 2, 0), pair.image.shown)


@QUICK
@given(data_set=data_sets())
def test_a_run_reads_the_pixels_and_classes_that_were_written_or_names_the_file(data_set, tmp_path_factory):
    check(tmp_path_factory.mktemp("data"), *data_set)


@pytest.mark.soak
@LONG
@given(data_set=data_sets())
def test_thousands_of_data_sets_are_read_as_they_were_written_or_name_the_file(data_set, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    check(root, *data_set)
    shutil.rmtree(root)
