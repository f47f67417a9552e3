"""Decoding pictures. All who read them come here: the same files are refused in the same words."""

import re
from io import BytesIO
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 500_000_000  # of a picture; 1.5 GB in RGB
Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound, which 200 megapixels exceed; `open_picture` holds to ours

PNG_END = b"IEND\xaeB`\x82"
# What libjpeg says where it draws gray, or noise, in place of data that it lacks. Cameras put some bytes before the
# end, which it skips: those are counted.
LOST = re.compile(
    "premature end|bad huffman|bad arithmetic|instead of RST|extraneous bytes before marker 0xd[0-7]", re.I
)
SKIPPED = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
MOST_SKIPPED = 4096  # bytes


def decode_picture(content: bytes, name: str) -> Image.Image:
    """Decodes the bytes of a picture file, in any mode; bytes behind its end are left alone.

    Raises:
        ValueError: it is no picture, damaged, not whole or too large; the sentence begins with `name`.
    """
    picture = open_picture(BytesIO(content), name)
    try:
        picture.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise _broken(name, error) from error
    if lack := _lack(content):
        raise ValueError(f"{name} is incomplete ({lack}); copy or download it again.")
    return picture


def to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """A decoded picture in RGB, 8 bits a channel, whatever its mode; transparency is left out.

    Raises:
        ValueError: floating-point or 32-bit pixels, which have no known range; the sentence begins with `name`.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"{name} has 32-bit pixels of an unknown range: convert it to 8 bits a channel")
    if picture.mode.startswith("I;16"):  # the high byte, which is what Pillow keeps of 16-bit colours, too
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if "transparency" in picture.info:  # of a palette
        picture = picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy


def open_picture(file: BinaryIO, name: str) -> Image.Image:
    """Reads the header of a picture file: its size and mode are known, nothing is decoded.

    Raises:
        ValueError: it is no picture, or has more than `MAX_PIXELS`; the sentence begins with `name`.
    """
    try:
        picture = Image.open(file)
    except Exception as error:  # as above
        raise _broken(name, error) from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} is {width}x{height} pixels (width x height), more than {MAX_PIXELS / 1e6:g} million in all: "
            "cut it into tiles"
        )
    return picture


def _broken(name: str, error: Exception) -> ValueError:
    reason = "it is none" if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"{name} cannot be decoded as a picture ({reason}); replace the file.")


def _lack(content: bytes) -> str | None:
    """Says what is missing in a file that Pillow decodes: it takes a PNG without its end, and a JPEG with holes."""
    if content.startswith(b"\x89PNG"):
        return None if content.rfind(PNG_END) > 0 else "it has no end"
    if not content.startswith(b"\xff\xd8"):
        return None
    try:
        simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1)  # an eighth of the size, to be quick
    except ValueError as error:
        skipped = SKIPPED.search(str(error))
        if LOST.search(str(error)) or (skipped and int(skipped[1]) > MOST_SKIPPED):
            return str(error)
    return None
