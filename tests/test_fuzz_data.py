"""Class tables and label pictures that are damaged or odd: refused in a sentence, or read as what they are."""

import io

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from eomt.data.folder import read_classes
from eomt.data.masks import decode_mask
from eomt.data.sources import ColorDecoder, IndexDecoder
from eomt.indices import IGNORE

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
BYTES = st.integers(0, 255)
COLORS = st.lists(BYTES, min_size=3, max_size=3)
ENTRIES = st.fixed_dictionaries(
    {"name": st.text("abc", min_size=1, max_size=2) | VALUES, "color": COLORS | VALUES},
    optional={"ids": st.lists(BYTES, max_size=3) | VALUES, "rgb": st.lists(COLORS, max_size=2) | VALUES, "odd": VALUES},
)
TABLES = st.fixed_dictionaries(
    {"classes": st.lists(ENTRIES, max_size=4) | VALUES},
    optional={"ignore_ids": st.lists(BYTES, max_size=3) | VALUES, "ignore_rgb": st.lists(COLORS, max_size=2) | VALUES},
)
FILES = TABLES.map(lambda table: yaml.dump(table, allow_unicode=True).encode()) | st.binary(max_size=60)

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
MODES = {
    "L": "uint8",
    "P": "uint8",
    "RGB": "uint8",
    "RGBA": "uint8",
    "LA": "uint8",
    "I;16": "uint16",
    "I": "int32",
    "F": "float32",
}


@st.composite
def pictures(draw):
    """The bytes of a picture of any mode, and as a file of its format, whole or damaged."""
    mode, size = draw(st.sampled_from(sorted(MODES))), draw(SIZES)
    channels = {"RGB": (3,), "RGBA": (4,), "LA": (2,)}.get(mode, ())
    values = draw(st.sampled_from([0, 1, 7, 255, 256, 70_000, -1, 0.5, np.nan, np.inf]))
    with np.errstate(all="ignore"):
        array = np.full((*size, *channels), 1, np.float64)
        array[0, 0] = values
        array = array.astype(MODES[mode])
    picture = Image.fromarray(array, mode if mode in ("P", "LA") else None)
    file, kind = io.BytesIO(), draw(st.sampled_from(["PNG", "TIFF", "BMP", "JPEG"]))
    try:
        picture.save(file, kind)
    except OSError:  # the format has no such mode
        picture.save(file, "TIFF")
    content = bytearray(file.getvalue())
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), BYTES), max_size=3)):
        content[place] = value
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def check_table(content, folder):
    """Nothing but a sentence that names the file, or classes and a decoder for them."""
    path = folder / "classes.yaml"
    path.write_bytes(content)
    try:
        classes, decoder = read_classes(path)
    except ValueError as error:
        assert str(error) and (str(path) in str(error) or "lass" in str(error) or "colour" in str(error))
    else:
        assert 1 <= len(classes) <= 254 and isinstance(decoder, (IndexDecoder, ColorDecoder))


def check_labels(content):
    """Nothing but a sentence that names the file, or indices that the table has."""
    for decoder in (IndexDecoder({0: 0, 1: 1, 7: IGNORE}, "mend it"), ColorDecoder({(1, 1, 1): 0}, "mend it")):
        try:
            labels = decoder(decode_mask(content, "mask.png"), "mask.png")
        except ValueError as error:
            assert str(error).startswith("mask.png ")
        else:
            assert labels.dtype == np.uint8 and labels.ndim == 2 and set(np.unique(labels)) <= {0, 1, IGNORE}


@QUICK
@given(content=FILES)
def test_odd_class_tables_are_refused_or_read(content, tmp_path_factory):
    check_table(content, tmp_path_factory.getbasetemp())


@QUICK
@given(content=pictures())
def test_damaged_and_odd_label_pictures_are_refused_or_read(content):
    check_labels(content)


@pytest.mark.soak
@LONG
@given(content=FILES)
def test_ten_thousand_odd_class_tables_are_refused_or_read(content, tmp_path_factory):
    check_table(content, tmp_path_factory.getbasetemp())


@pytest.mark.soak
@LONG
@given(content=pictures())
def test_ten_thousand_damaged_and_odd_label_pictures_are_refused_or_read(content):
    check_labels(content)
