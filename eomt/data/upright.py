"""Images that are stored turned, written anew as their masks show them."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image

from eomt.data.pictures import ORIENTATION, decode_picture, open_picture, upright
from eomt.data.sources import Sample, Source
from eomt.files import replacing

VIEWS = ("auto", "upright", "stored")
KEPT = ".orig"  # ends the names of the originals
SIDEWAYS = range(5, 9)  # values of the EXIF tag for a turn by 90 degrees


@dataclass
class Turning:
    """What was done with images that are stored turned: paths of what was written, and why others were left alone."""

    written: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


class _LeftAlone(ValueError):
    """An image must not be written anew."""


def turn_images(samples: Iterable[Sample], view: str = "auto") -> Turning:
    """Writes images that are stored turned as PNG, which keeps each pixel, without the EXIF tag.

    The originals stay beside them as NAME.orig. Pictures that cannot be read are left to others to report.

    Args:
        samples: images with their masks.
        view: `upright` turns the images as they are seen, `stored` takes the tag alone away; `auto` does what the size
            of the mask asks for, and nothing where both views have one size.

    Raises:
        OSError: a file cannot be read or written.
    """
    done = Turning()
    for sample in samples:
        try:
            if (orientation := _orientation(sample.image.read(), sample.name)) != 1:
                done.written.append(_turn(sample, orientation, view))
        except _LeftAlone as reason:
            done.left[sample.name] = str(reason)
        except ValueError:
            continue
    return done


def _turn(sample: Sample, orientation: int, asked: str) -> str:
    """Writes the image of a sample anew and returns its path; raises _LeftAlone where it must not be."""
    if sample.image.member is not None:
        raise _LeftAlone(f"it lies in an archive, {sample.image.path}: extract it")
    picture = decode_picture(sample.image.read(), sample.name)
    if picture.format == "TIFF" or (picture.info["sixteen_bits"] and picture.mode == "RGB"):
        raise _LeftAlone("a TIFF, or one of 16 bits a channel, would lose something: save it upright yourself")
    view = _view(picture, orientation, sample.label, asked)
    path = Path(sample.image.path)
    target, original = path if path.suffix.lower() == ".png" else path.with_suffix(".png"), Path(f"{path}{KEPT}")
    if taken := [each for each in (original, target) if os.path.lexists(each) and each != path]:
        raise _LeftAlone(f"{taken[0]} is there already: take it away")
    result = picture if view == "stored" else upright(picture)
    result = result.convert("RGB") if result.mode in ("CMYK", "YCbCr") else result
    exif = result.getexif()
    exif.pop(ORIENTATION, None)
    with replacing(target) as draft:
        result.save(draft, "PNG", exif=exif.tobytes(), icc_profile=picture.info.get("icc_profile"))
        shutil.copy2(path, original, follow_symlinks=False)
    if target != path:
        path.unlink()
    return str(target)


def _view(picture: Image.Image, orientation: int, label: Source, asked: str) -> str:
    """The view of a turned image that its mask belongs to; raises _LeftAlone where that is not known, or none fits."""
    mask = open_picture(BytesIO(label.read()), str(label))
    if mask.info["orientation"] != 1:
        raise _LeftAlone("its mask is stored turned, too: save both upright")
    sizes = {"stored": picture.size, "upright": picture.size[::-1] if orientation in SIDEWAYS else picture.size}
    if asked == "auto":
        if sizes["stored"] == sizes["upright"]:
            raise _LeftAlone(
                f"both views of it (orientation {orientation}) have one size, so that its mask does not tell which one "
                "it was drawn on: look at it, and say upright or stored"
            )
        asked = "stored" if mask.size == sizes["stored"] else "upright"
    if mask.size != sizes[asked]:
        (width, height), (wide, high) = mask.size, sizes[asked]
        raise _LeftAlone(f"its mask is {width}x{height}, the {asked} image {wide}x{high} (width x height)")
    return asked


def _orientation(content: bytes, name: str) -> int:
    """Its EXIF tag; a PNG may tell it behind its pixels."""
    picture = open_picture(BytesIO(content), name)
    if picture.format == "PNG" and b"eXIf" in content:
        picture = decode_picture(content, name)
    return picture.info["orientation"]
