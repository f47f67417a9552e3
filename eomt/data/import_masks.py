"""Masks and a class file from what an annotation tool exports."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from eomt.data.annotations import IGNORED, Annotated, Export
from eomt.data.labels import LabelSet
from eomt.data.listing import list_pictures
from eomt.data.pictures import open_picture
from eomt.files import new_folder
from eomt.indices import IGNORE, MAX_CLASSES

BACKGROUND = "background"
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the name of a file
SIDEWAYS = range(5, 9)  # EXIF orientations of a turn by 90 degrees
UNANNOTATED = ("ignore", "background", "leave")
ON_TOP = ("smaller", "later")
# what may be wrong with a picture of an export, whatever the file holds
ODD = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, OverflowError)


@dataclass
class Imported:
    """What was written and seen.

    Attributes:
        value_of: the mask value of each label.
        pixels: of each mask value.
        masks: how many were written, of pictures with annotations.
        empty: pictures without an annotation, in the export or in no place of it.
        overlaps: pictures in which areas of two classes overlap.
        turned: images that are stored turned.
        counts: boxes, crowds and shapes without an area.
        faults: the sentence on each picture that got no mask.
    """

    value_of: Mapping[str, int]
    pixels: Counter[int] = field(default_factory=Counter)
    masks: int = 0
    empty: list[str] = field(default_factory=list)
    overlaps: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)


def import_masks(
    export: Export,
    images: Path,
    out: Path,
    unannotated: str = "ignore",
    on_top: str = "smaller",
    track: Callable[[Iterable], Iterable] = iter,
) -> Imported:
    """Writes `out/masks/`, with a mask of ids for each image and the same subfolders, and `out/classes.yaml`.

    0 is what no annotation covers, 1, 2, ... are the labels, 255 is ignored: crowds, and the areas of boxes.

    Args:
        export: see `eomt.data.annotations.read_export`.
        images: folder of the images that were annotated.
        out: must not be there.
        unannotated: whether pictures without an annotation become ignored, background, or get no mask.
        on_top: which of two areas that overlap is seen, the `smaller` one, or that which comes `later` in the export.
        track: shows the progress over the pictures.

    Raises:
        ValueError: too many labels, or no picture of the export is among the images. OSError: `out` is there.
    """
    if os.path.lexists(out):
        raise FileExistsError(f"{out} is there already, and nothing is written over: name another folder")
    found = Imported(_values(export.labels))
    names = ["/".join(parts) for parts in list_pictures(images).pictures]
    place = _Finder(names)
    with new_folder(out) as draft:
        rest = dict.fromkeys(names)
        for file, read in track(export.pictures):
            try:
                name = place.find(file)
                if name not in rest:
                    raise ValueError(f"{images / name} is in the export twice")
                del rest[name]
                _write(found, draft, images, name, read(), unannotated, on_top)
            except ODD as error:
                found.faults[file] = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        if len(rest) == len(names):
            first = next(iter(found.faults.values()), "it has none")
            raise ValueError(f"No picture of the export is in {images}; the first: {first}")
        for name in rest:
            try:
                _write(found, draft, images, name, Annotated(None), unannotated, on_top)
            except ODD as error:
                found.faults[name] = str(error)
        if not found.masks:
            first = next(iter(found.faults.values()), "all are empty")
            raise ValueError(f"No picture of the export has an area; the first: {first}")
        (draft / "classes.yaml").write_text(class_file(found, export.kind), encoding="utf-8")
    return found


def _values(labels: list[str]) -> dict[str, int]:
    """1, 2, ... for the labels, whatever numbers they have in the export; 0 for one that is called background."""
    things = [label for label in labels if label.lower() != BACKGROUND]
    if len(things) >= MAX_CLASSES:
        raise ValueError(f"The export has {len(things)} labels, more than {MAX_CLASSES - 1}; merge some.")
    return {label: 0 for label in labels if label not in things} | {label: k for k, label in enumerate(things, 1)}


class _Finder:
    """Finds the image that an export names, by its path, or by its name where that is the only one."""

    def __init__(self, names: list[str]) -> None:
        self.names = set(names)
        self.by_name: dict[str, list[str]] = {}
        for name in names:
            self.by_name.setdefault(os.path.basename(name), []).append(name)

    def find(self, file: str) -> str:
        path = os.path.normpath(unquote(file).replace("\\", "/"))
        if path in self.names:
            return path
        base = os.path.basename(path)
        found = self.by_name.get(base) or self.by_name.get(UPLOADED.sub("", base), [])
        if len(found) > 1:  # the one in the folder of that name
            inside = os.path.basename(os.path.dirname(path))
            found = [name for name in found if os.path.basename(os.path.dirname(name)) == inside] or found
        if not found:
            raise FileNotFoundError(f"{file} is not among the images")
        if len(found) > 1:
            raise ValueError(f"{file} may be {found[0]} or {found[1]}: give the images the paths of the export")
        return found[0]


def _write(
    found: Imported, out: Path, images: Path, name: str, picture: Annotated, unannotated: str, on_top: str
) -> None:
    """Writes the mask of one image; raises ValueError where picture and image differ in size."""
    size = _size(found, images, name, picture.size)
    target = (out / "masks" / name).with_suffix(".png")
    if target.exists():
        raise ValueError(f"{images / name} and another image differ in their ending only, so that they share a mask")
    found.counts.update(boxes=picture.boxes, crowds=picture.crowds, dropped=picture.dropped)
    if picture.shapes:
        mask, overlaps = draw(picture, size, found.value_of, on_top)
        found.masks += 1
        found.overlaps += [name] * overlaps
    else:
        found.empty.append(name)
        if unannotated == "leave":
            return
        mask = np.full(size, IGNORE if unannotated == "ignore" else 0, np.uint8)
    found.pixels.update(dict(enumerate(np.bincount(mask.ravel(), minlength=256).tolist())))
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(target)


def _size(found: Imported, images: Path, name: str, annotated: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the view that was annotated: of an image that is stored turned, either one."""
    with open(images / name, "rb") as file:
        header = open_picture(file, str(images / name))
    stored = header.size[::-1]
    seen = stored[::-1] if header.info["orientation"] in SIDEWAYS and header.format != "TIFF" else stored
    found.turned += [name] * (header.info["orientation"] != 1)
    if annotated not in (None, stored, seen):
        raise ValueError(
            f"{images / name} is {stored[0]}x{stored[1]}, in the export {annotated[0]}x{annotated[1]} (height x "
            "width): take the images that were annotated"
        )
    return annotated or seen


def draw(
    picture: Annotated, size: tuple[int, int], value_of: Mapping[str, int], on_top: str = "smaller"
) -> tuple[np.ndarray, bool]:
    """The mask of a picture, uint8 [H, W], and whether areas of two classes overlap.

    Areas to ignore lie below all others.
    """
    mask = np.zeros(size, np.uint8)
    areas = [(shape.label, shape.draw(*size)) for shape in picture.shapes]
    for _, area in (each for each in areas if each[0] is IGNORED):
        mask[area] = IGNORE
    labelled = [(value_of[label], area) for label, area in areas if label is not IGNORED]
    if on_top == "smaller":
        labelled.sort(key=lambda each: -int(each[1].sum()))
    covered, overlaps = np.zeros(size, bool), False
    for value, area in labelled:
        overlaps |= bool((covered & area & (mask != value)).any())
        mask[area], covered[area] = value, True
    return mask, overlaps


def class_file(found: Imported, kind: str) -> str:
    """The YAML of classes: labels without a pixel as comments."""
    value_of = {BACKGROUND: 0} | dict(found.value_of)
    if 0 in found.value_of.values():
        value_of = dict(found.value_of)
    names = sorted(value_of, key=value_of.__getitem__)
    colors = LabelSet.of(names, None).colors
    total = sum(found.pixels.values())
    lines = [f"# Classes of an export from {kind}; docs/data.md explains this file.", "classes:"]
    for name, color in zip(names, colors, strict=True):
        value, pixels = value_of[name], found.pixels[value_of[name]]
        color = [0, 0, 0] if value == 0 else list(color)
        entry = f"- {{name: {json.dumps(name, ensure_ascii=False)}, color: {color}, ids: [{value}]}}"
        lines.append(f"  {entry} # {100 * pixels / total:.3g} %" if pixels else f"  # {entry} # has no pixel")
    return "\n".join([*lines, f"ignore_ids: [{IGNORE}]", ""])
