"""Decoding masks: pictures whose pixels are values of classes, so that each must be read as it was written."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any, BinaryIO

from PIL import Image

from eomt.data.pictures import PHOTOMETRIC, decode_picture, is_deep, open_picture, raw_modes


class Turned(ValueError):
    """A picture is stored turned."""


class Lossy(ValueError):
    """A mask is in a format that changes values."""


class UnknownValues(ValueError):
    """A mask has values that no class lists; `values` are all of them, ids or (R, G, B)."""

    def __init__(self, sentence: str, values: Sequence[Any] = ()) -> None:
        super().__init__(sentence)
        self.values = list(values)


LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")


def decode_mask(content: bytes, name: str) -> Image.Image:
    """Decodes the bytes of a mask, in any mode.

    Raises:
        ValueError: as `decode_picture` and `check_mask` do, or it is stored turned: its image may not be.
    """
    file = BytesIO(content)
    check_mask(open_picture(file, name), file, name)
    picture = decode_picture(content, name)
    refuse_turned(picture, name, "its image")
    return picture


def check_mask(picture: Image.Image, file: BinaryIO, name: str) -> None:
    """Looks at the header of a mask, opened from `file`.

    Raises:
        ValueError: its format does not keep values as they were, or programs read them differently.
    """
    if lossy := _lossy(picture, file):
        raise Lossy(
            f"{name} is a {lossy}, a lossy format, which changes the values of a mask: export the masks as PNG again; "
            "a converted file would keep what is wrong."
        )
    if doubtful := _doubtful(picture):
        raise ValueError(f"{name} is a mask with {doubtful}; save it as PNG with 8 bits.")
    refuse_turned(picture, name, "its image")


def refuse_turned(picture: Image.Image, name: str, partner: str) -> None:
    """Raises ValueError for a picture that is known to be stored turned; `partner` is what belongs to it."""
    if (orientation := picture.info["orientation"]) != 1:
        remedy = ", or with scripts/dataset_report.py data=folder ... --fix-exif" if partner == "its labels" else ""
        raise Turned(
            f"{name} is stored turned (EXIF orientation {orientation}), and {partner} may belong to either view; save "
            f"it upright, without the tag{remedy}."
        )


def _lossy(picture: Image.Image, file: BinaryIO) -> str | None:
    """The lossy format of an opened picture, by its content."""
    if picture.format in ("JPEG", "MPO"):
        return "JPEG"
    if picture.format == "TIFF" and picture.info.get("compression") in LOSSY_IN_TIFF:
        return f"TIFF with the compression {picture.info['compression']}"
    return "WebP with loss" if picture.format == "WEBP" and not _is_lossless_webp(file) else None


def _is_lossless_webp(file: BinaryIO) -> bool:
    """Whether the first chunk of pixels in a WebP file is of the lossless kind."""
    file.seek(12)
    while len(head := file.read(8)) == 8:
        kind, size = head[:4], int.from_bytes(head[4:], "little")
        if kind in (b"VP8L", b"VP8 "):
            return kind == b"VP8L"
        file.seek(size + size % 2, 1)
    return False


def _doubtful(picture: Image.Image) -> str | None:
    """What lets programs read other values than those that were written."""
    if is_deep(picture) and not picture.mode.startswith("I"):
        return "colours of 16 bits a channel, of which half would be lost"
    if picture.format == "TIFF" and picture.tag_v2.get(PHOTOMETRIC) == 0:
        return "white as 0 (WhiteIsZero), which some programs invert and others do not"
    if picture.mode == "L" and (bits := {"L;2": 2, "L;4": 4}.get(next(raw_modes(picture), ""))):
        return f"{bits} bits of gray, which some programs read as 0..{2**bits - 1} and others as 0..255"
    return None
