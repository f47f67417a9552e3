"""Decoding pictures. All who read them come here: the same files are refused in the same words."""

import math
import re
from collections.abc import Iterator
from io import BytesIO
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "MPO", "BMP", "TIFF", "WEBP")  # an MPO is a JPEG with more pictures behind it
MAX_PIXELS = 500_000_000  # of a picture; 1.5 GB in RGB
Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound, which 200 megapixels exceed; `open_picture` holds to ours

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits a channel, or fewer
DARK = 4096  # 16-bit values below it use 12 bits or fewer, so that their high byte is nearly nothing
FEW = 0.01  # share of values, from hot or saturated pixels, that do not make a picture of 12 bits one of 16
ORIENTATION = 0x0112  # EXIF tag
TURNED = range(2, 9)  # its values for a picture that is not stored as it is to be seen
REDUCED, MASK = 1, 4  # bits of a TIFF's NewSubfileType: a page that is a smaller copy, or says what is transparent
NEW_SUBFILE, BITS, PHOTOMETRIC, PLANES, NUMBERS = 254, 258, 262, 284, 339  # further tags of a TIFF
STRIPS, TILES = (273, 279), (324, 325)  # tags of where its data lie, and of how many bytes they have
SIGNED = 2  # of NUMBERS

# by the first two bytes of PNG and JPEG, what their files end with
ENDINGS = {b"\x89P": b"IEND\xaeB`\x82", b"\xff\xd8": b"\xff\xd9"}
TAIL = 4096  # bytes in which it is looked for
# What libjpeg says where it draws gray, or noise, in place of data that it lacks. Cameras put some bytes before the
# end, which it skips: those are counted.
LOST = re.compile(
    "premature end|bad huffman|bad arithmetic|instead of RST|extraneous bytes before marker 0xd[0-7]", re.I
)
SKIPPED = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
MOST_SKIPPED = 4096  # bytes


def decode_picture(content: bytes, name: str) -> Image.Image:
    """Decodes the bytes of a picture file, in any mode; bytes behind its end are left alone.

    Its `info` is that of `open_picture`.

    Raises:
        ValueError: it is no picture, damaged, not whole or too large, or of a kind that cannot be read rightly; the
            sentence begins with `name`.
    """
    picture = open_picture(BytesIO(content), name)
    try:
        picture.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise _broken(name, error) from error
    if lack := _lack(content):
        raise ValueError(f"{name} is incomplete ({lack}); copy or download it again.")
    if picture.format == "PNG":
        picture.info["orientation"] = _orientation(picture)
    return picture


def open_picture(file: BinaryIO, name: str) -> Image.Image:
    """Reads the header of a picture file: its size and mode are known, nothing is decoded.

    Its `info` says under "orientation" how it is stored, 1 for upright (Pillow turns a TIFF as it decodes it, and a
    PNG may tell only behind its pixels), and under "sixteen_bits" whether its channels have 16 bits.

    Raises:
        ValueError: it is no picture, has more than `MAX_PIXELS`, or Pillow would misread it; the sentence begins with
            `name`.
    """
    try:
        picture = Image.open(file)
        pages = _pages(picture)
    except Exception as error:  # as above
        raise _broken(name, error, file) from error
    if picture.format not in FORMATS:
        raise ValueError(f"{name} is a file of the format {picture.format}, which is not read; save it as PNG.")
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} is {width}x{height} pixels (width x height), more than {MAX_PIXELS / 1e6:g} million in all: "
            "cut it into tiles"
        )
    if pages > 1:
        raise ValueError(f"{name} holds {pages} pictures, and which one is meant is not known; save that one alone.")
    if misread := _misread(picture, file):
        raise ValueError(f"{name} has {misread}, which is not read rightly; save it as PNG with 8 bits a channel.")
    turned = 1 if picture.format == "PNG" else _orientation(picture)
    picture.info |= {"orientation": turned, "sixteen_bits": is_deep(picture)}
    return picture


def to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """A decoded picture in RGB, 8 bits a channel, whatever its mode; transparency is left out.

    Of 16 bits the high byte is taken.

    Raises:
        ValueError: pixels that have no known range, or would nearly all be black; the sentence begins with `name`.
    """
    check_mode(picture, name)
    deep = picture.info.get("sixteen_bits", False)
    if picture.mode.startswith("I;16"):  # the high byte, which is what Pillow keeps of 16-bit colours, too
        picture, deep = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)), True
    if "transparency" in picture.info:  # of a palette
        picture = picture.convert("RGBA")
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy
    if deep and (bright := share_of_bright(picture)) < FEW:
        raise ValueError(
            f"{name} has 16 bits a channel and {100 * bright:.2g} % of its values are {DARK} or more, so that it would "
            "be black: it holds fewer bits, or nothing; stretch its values over 0..65535, or convert it to 8 bits a "
            "channel"
        )
    return picture


def share_of_bright(picture: Image.Image) -> float:
    """The share of values of `DARK` or more in what was a picture of 16 bits."""
    counts = np.reshape(picture.histogram(), (-1, 256)).sum(0)
    return counts[DARK >> 8 :].sum() / counts.sum()


def check_mode(picture: Image.Image, name: str) -> None:
    """Raises ValueError for a picture, opened or decoded, whose mode is none of an image; it begins with `name`."""
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"{name} has 32-bit pixels of an unknown range (mode {picture.mode}): convert it to 8 bits a channel"
        )
    if picture.mode not in MODES and not picture.mode.startswith("I;16"):
        raise ValueError(f"{name} has pixels of the mode {picture.mode}: convert it to RGB, 8 bits a channel")


def to_rgba(picture: Image.Image, name: str) -> Image.Image:
    """As `to_rgb`, with how opaque each pixel is, 0 to 255."""
    rgba = to_rgb(picture, name).convert("RGBA")
    if picture.mode in MODES and picture.has_transparency_data:
        rgba.putalpha(picture.convert("RGBA").getchannel("A"))
    return rgba


def upright(picture: Image.Image) -> Image.Image:
    """A picture as it is to be seen; one whose EXIF data cannot be read is left as it is."""
    return ImageOps.exif_transpose(picture) if _orientation(picture) in TURNED else picture


def is_deep(picture: Image.Image) -> bool:
    """Whether an opened picture has channels of 16 bits, of which Pillow keeps the high byte in colours."""
    return picture.format in ("PNG", "TIFF") and any(";16" in raw for raw in raw_modes(picture))


def raw_modes(picture: Image.Image) -> Iterator[str]:
    """How the file of an opened picture stores its pixels, in Pillow's words; nothing once it is decoded."""
    for _, _, _, how in picture.tile:
        yield str(how[0] if isinstance(how, tuple) else how)


def looks_whole(file: BinaryIO, size: int) -> bool:
    """Whether the last bytes of a picture file, or what its header says of its size, show that nothing is missing.

    Where they do not tell, it is False; nothing is decoded.
    """
    start = file.read(12)
    if start[:2] in ENDINGS:
        file.seek(max(0, size - TAIL))
        return ENDINGS[start[:2]] in file.read()
    if start[:4] == b"RIFF":
        return int.from_bytes(start[4:8], "little") + 8 <= size
    if start[:2] == b"BM":
        return int.from_bytes(start[2:6], "little") == size
    return start[:2] in (b"II", b"MM") and _tiff_size(file) <= size


def _tiff_size(file: BinaryIO) -> float:
    """Up to where the data of a TIFF reach, in bytes; infinite where its header is broken."""
    file.seek(0)
    try:
        tags = Image.open(file, formats=["TIFF"]).tag_v2
        places, counts = (tags.get(STRIPS[k]) or tags[TILES[k]] for k in range(2))
        return max(place + count for place, count in zip(places, counts, strict=True))
    except Exception:
        return math.inf


def _orientation(picture: Image.Image) -> int:
    """Its EXIF tag; 1, upright, where there is none, or data that nobody can read."""
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # of EXIF data that are damaged
        return 1
    return found if found in TURNED else 1


def _pages(picture: Image.Image) -> int:
    """Pictures in the file: an animation's, a TIFF's without smaller copies and masks; 1 in a JPEG with more behind."""
    count = getattr(picture, "n_frames", 1)
    if picture.format == "MPO":
        return 1
    if picture.format != "TIFF" or count == 1:
        return count
    kinds = []
    for page in range(count):
        picture.seek(page)
        kinds.append(picture.tag_v2.get(NEW_SUBFILE, 0))
    picture.seek(0)
    return 1 + sum(not kind & (REDUCED | MASK) for kind in kinds[1:])


def _misread(picture: Image.Image, file: BinaryIO) -> str | None:
    """What an opened file has that Pillow takes for something else."""
    if picture.format == "BMP":
        file.seek(14)
        header = file.read(16)
        bits = int.from_bytes(header[10:12] if header[0] == 12 else header[14:16], "little")
        wrong = bits != {"1": 1, "L": 8}.get(picture.mode, bits)
        return f"{bits} bits a pixel for a palette of gray" if wrong else None
    if picture.format != "TIFF":
        return None
    tags = picture.tag_v2
    bits = max(tags.get(BITS, (1,)))
    if bits == 8 and SIGNED in tags.get(NUMBERS, ()):
        return "signed numbers of 8 bits"
    if bits == 16 and tags.get(PLANES) == 2:
        return "16 bits a channel and its channels one after the other"
    if bits == 16 and tags.get(PHOTOMETRIC) == 0:
        return "16 bits and white as 0"
    return None


def _broken(name: str, error: Exception, file: BinaryIO | None = None) -> ValueError:
    if not isinstance(error, UnidentifiedImageError):
        return ValueError(f"{name} cannot be decoded as a picture ({error}); replace the file.")
    if reason := _unread(file):
        return ValueError(
            f"{name} cannot be decoded as a picture ({reason}); save it as PNG with 8 bits a channel, or replace the "
            "file."
        )
    return ValueError(f"{name} cannot be decoded as a picture (it is none); replace the file.")


def _unread(file: BinaryIO) -> str | None:
    """Why Pillow reads no picture in a file that begins like one."""
    file.seek(0)
    start = file.read(16)
    for format in FORMATS:
        factory, accept = Image.OPEN.get(format, (None, None))
        if accept and accept(start):
            try:
                file.seek(0)
                factory(file, "")
            except Exception as error:
                return f"{format}: {error}"
    return None


def _lack(content: bytes) -> str | None:
    """Says what is missing in a file that Pillow decodes: it takes a PNG without its end, and a JPEG with holes."""
    if content.startswith(b"\x89PNG"):
        return None if content.rfind(ENDINGS[b"\x89P"]) > 0 else "it has no end"
    if not content.startswith(b"\xff\xd8"):
        return None
    try:
        simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1)  # an eighth of the size, to be quick
    except ValueError as error:
        skipped = SKIPPED.search(str(error))
        if LOST.search(str(error)) or (skipped and int(skipped[1]) > MOST_SKIPPED):
            return str(error)
    return None
