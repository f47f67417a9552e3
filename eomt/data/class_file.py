"""The YAML file of classes for masks that nobody has described: a class for each value or colour in them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from eomt.data.labels import LabelSet
from eomt.data.pairs import NAME, Faults, Template, pair
from eomt.data.sources import Sample
from eomt.indices import IGNORE, MAX_CLASSES

BLACK = (0, 0, 0)
Value = int | tuple[int, ...]  # of a mask: an id, or (R, G, B)
FEW = 1e-4  # share of the pixels; a value with fewer may come from smoothed edges


@dataclass
class Values:
    """What masks hold.

    Attributes:
        pixels: of each id, or of each colour (R, G, B).
        masks: that show it.
        kinds: masks of ids and of colours: the name of the first, and how many.
        palette: colours that palettes give to ids.
        wrong: the sentence on each mask that cannot be read, by name.
        read: how many masks could be.
    """

    pixels: Counter[Value] = field(default_factory=Counter)
    masks: Counter[Value] = field(default_factory=Counter)
    kinds: dict[str, list[str]] = field(default_factory=dict)
    palette: dict[Value, tuple[int, ...]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    read: int = 0


def pairs_to_describe(
    images: Path, masks: Path, image_template: str = NAME, mask_template: str = NAME
) -> tuple[list[Sample], Faults]:
    """The images with masks, and what is wrong with the others.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: a template is wrong, or no image has a mask.
    """
    faults: Faults = {}
    templates = Template(image_template, "data.image_template"), Template(mask_template)
    pairs = pair(images, masks, *templates, Counter(), faults=faults)
    if not pairs:
        pair(images, masks, *templates, Counter())  # which says what is wrong
    return pairs, faults


def collect_values(samples: Iterable[Sample]) -> Values:
    """Reads every mask once.

    Raises:
        ValueError: some masks hold ids and others colours, there are too many values, or none could be read.
    """
    found = Values()
    for sample in samples:
        try:
            _add(found, sample)
        except (ValueError, OSError) as error:
            found.wrong[sample.name] = str(error)
    if not found.read:
        raise ValueError(f"No mask can be read, the first: {next(iter(found.wrong.values()), 'there is none')}")
    if len(found.kinds) > 1:
        kinds = " and ".join(f"{len(names)} of {kind} ({names[0]})" for kind, names in found.kinds.items())
        raise ValueError(f"There are masks {kinds}: a class file describes one kind; save all in one.")
    if len(found.pixels) > MAX_CLASSES + 1:
        kind, common = next(iter(found.kinds)), ", ".join(str(value) for value, _ in found.pixels.most_common(4))
        raise ValueError(
            f"The masks hold {len(found.pixels):,} {kind}, more than {MAX_CLASSES} classes; the most frequent are "
            f"{common}: smoothed edges or a lossy format mix colours, so export the masks again without either."
        )
    return found


def _add(found: Values, sample: Sample) -> None:
    """Counts the values of one mask; raises ValueError where they are no ids and no colours."""
    picture = sample.label.decode_mask()
    name = str(sample.label)
    values = np.asarray(picture)
    if values.ndim == 3 and picture.mode not in ("RGB", "RGBA"):
        raise ValueError(f"{name} has mode {picture.mode}, which is neither ids nor RGB; save one channel of ids.")
    if values.ndim == 2:
        kind, stored = "ids", values
        if (beyond := ~np.isin(values, np.arange(256))).any():
            raise ValueError(f"{name} has the value {values[beyond][0]}, label values are 0..255; number them anew.")
    else:
        kind, rgb = "colours", np.asarray(picture.convert("RGB")).astype(np.int64)
        stored = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    codes, counts = np.unique(stored, return_counts=True)
    codes = [int(code) for code in codes.tolist()]
    listed = codes if kind == "ids" else [(code >> 16, code >> 8 & 255, code & 255) for code in codes]
    found.pixels.update(dict(zip(listed, counts.tolist(), strict=True)))
    found.masks.update(listed)
    found.kinds.setdefault(kind, []).append(name)
    found.read += 1
    if picture.mode == "P":
        _add_palette(found, picture)


def _add_palette(found: Values, picture: Image.Image) -> None:
    """Remembers the colours of a palette's indices, unless they are gray, which tells nothing."""
    palette = np.array(picture.getpalette("RGB")).reshape(-1, 3).tolist()
    if any(len(set(color)) > 1 for color in palette):
        found.palette |= {index: tuple(color) for index, color in enumerate(palette)}


def class_file(found: Values) -> str:
    """The YAML of classes for these values: what a run reads, with counts and doubts as comments."""
    if not found.pixels:
        raise ValueError("The masks hold no value.")
    of_ids = "ids" in found.kinds
    values = sorted(found.pixels)
    ignored = [IGNORE] if of_ids and IGNORE in values and values not in ([IGNORE], [0, IGNORE]) else []
    classes = [value for value in values if value not in ignored]
    names = tuple(f"class_{index}" for index in range(len(classes)))
    colors = _colors(classes, found.palette) if of_ids else classes
    lines = [
        f"# {len(classes)} classes from the {'ids' if of_ids else 'colours'} in {found.read:,} masks: rename them, and",
        "# give several values to one class if they mean the same. docs/data.md explains this file.",
        *_doubts(found, of_ids),
        "classes:",
    ]
    for name, color, value in zip(names, colors, classes, strict=True):
        ids = f", ids: [{value}]" if of_ids else ""
        lines.append(f"  - {{name: {name}, color: {list(color)}{ids}}} # {_share(found, value)}")
    if of_ids and IGNORE not in classes:
        seen = _share(found, IGNORE) if ignored else "no mask has it"
        lines.append(f"ignore_ids: [{IGNORE}] # neither trained on nor counted; {seen}")
    return "\n".join(lines) + "\n"


def _colors(classes: list[Value], palette: dict[Value, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Colours to draw ids in: those of their palette if it has a different one for each, or hues around the circle."""
    own = [palette.get(value) for value in classes]
    if None not in own and len(set(own)) == len(own):
        return own
    return list(LabelSet.of([str(value) for value in classes], None).colors)


def _share(found: Values, value: Value) -> str:
    share = found.pixels[value] / found.pixels.total()
    few = ", few: is it an edge that was smoothed?" if share < FEW and isinstance(value, tuple) else ""
    return f"{100 * share:.3g} % of the pixels, in {found.masks[value]:,} masks{few}"


def _doubts(found: Values, of_ids: bool) -> list[str]:
    """Comments on what the values alone do not tell."""
    values = set(found.pixels)
    lines = []
    if of_ids and values == {0, IGNORE}:
        lines.append("# 0 and 255 alone look like a mask of one thing, so 255 is a class here and not ignored.")
    if of_ids and 0 in values:
        lines.append("# 0 is often the background, which should be a class, or unlabelled: then move it to ignore_ids.")
    if not of_ids and BLACK in values:
        lines.append("# [0, 0, 0] is often the background, which should be a class, or unlabelled: then take its class")
        lines.append("# away and write ignore_rgb: [[0, 0, 0]]")
    if not of_ids and all(len(set(color)) == 1 for color in values):
        lines.append("# All colours are gray: if they are ids, save one channel of the masks, and run --init again.")
    if found.wrong:
        lines.append(f"# {len(found.wrong)} masks could not be read, and may hold more.")
    return lines
