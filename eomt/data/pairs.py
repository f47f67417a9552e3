"""Pairs of images and masks in two folders, by their names."""

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eomt.data.listing import LONELY, OTHER_NAMES, list_pictures
from eomt.data.sources import Sample, Source
from eomt.files import PICTURES
from eomt.suggestions import did_you_mean, not_found

NAME = "{name}"
LONELY_IMAGES, TWINS = "images without a mask", "two files of one name"  # faults of a folder
Faults = dict[str, dict[str, str]]  # the sentence on each name, by the kind of fault


@dataclass(frozen=True)
class Template:
    """How files are called: by `{name}_mask.png` the mask of `a/photo.jpg` is `a/photo_mask.png`.

    Args:
        text: with `{name}` once; with an ending, files of that ending alone are meant.
        key: the setting that it comes from.

    Raises:
        ValueError: it has no `{name}`, or is more than the name of a file.
    """

    text: str = NAME
    key: str = "data.mask_template"

    def __post_init__(self) -> None:
        rest = str(self.text).replace(NAME, "", 1)
        if rest == self.text or any(letter in rest for letter in "{}/"):
            raise ValueError(
                f"{self.key} {self.text!r} must be the name of a file with {NAME} in it once, for what an image and "
                f"its mask have in common: {NAME}_mask.png"
            )

    def name_in(self, file: str) -> str | None:
        """What stands for `{name}` in the name of a file; None where the file is called otherwise."""
        front, back = _composed(self.text).split(NAME)
        stem, ending = os.path.splitext(_composed(file))
        named = next((each for each in PICTURES if back.lower().endswith(each)), "")
        back, wanted = back[: len(back) - len(named)], named or ending
        fits = stem.startswith(front) and stem.endswith(back) and len(stem) > len(front) + len(back)
        return stem[len(front) : len(stem) - len(back)] if fits and wanted.lower() == ending.lower() else None


def pair(
    images: Path,
    masks: Path,
    image_template: Template,
    mask_template: Template,
    left_out: Counter[str],
    keys: tuple[str, str] = ("data.images", "data.masks"),
    faults: Faults | None = None,
) -> list[Sample]:
    """Every image with its mask; what is left out is added to `left_out`.

    Args:
        images: folder, searched with its subfolders.
        masks: folder with the same subfolders.
        image_template: how images are called.
        mask_template: how masks are called.
        left_out: files that belong to no pair, by reason.
        keys: the settings that name the folders, for errors.
        faults: where given, images that have no mask are listed here instead of being an error.

    Raises:
        FileNotFoundError: a folder is missing or empty, or the mask of an image is.
        ValueError: two files have one name.
    """
    image_of = _pictures(images, image_template, left_out, keys[0], faults)
    mask_of = _pictures(masks, mask_template, left_out, keys[1], faults)
    _add_shared(mask_of, image_of, masks, mask_template)
    image_of = _without_masks(image_of, mask_of, mask_template)
    missing = [name for name in image_of if name not in mask_of]
    if missing and faults is None:
        raise FileNotFoundError(
            f"{len(missing)} of {len(image_of)} images in {images} have no mask, the first is {missing[0]!r}; put a "
            f"mask of that name into {masks} ({keys[1]}), or take the image away"
            + did_you_mean(missing[0], mask_of)
            + _other_template(missing, masks, mask_template)
        )
    for name in missing:
        faults.setdefault(LONELY_IMAGES, {})[name] = f"{image_of[name]} has no mask in {masks}"
    left_out.update({LONELY: lonely} if (lonely := len(mask_of.keys() - image_of.keys())) else {})
    return [Sample(name, Source(path), Source(mask_of[name])) for name, path in image_of.items() if name in mask_of]


def _pictures(
    root: Path, template: Template, left_out: Counter[str], key: str, faults: Faults | None
) -> dict[str, str]:
    """Every picture under root that is called by the template, by its name with the path of its subfolder."""
    if not root.is_dir():
        raise FileNotFoundError(f"{not_found(root, 'folder')} (check {key})")
    listing = list_pictures(root)
    left_out.update(listing.left_out)
    found: dict[str, str] = {}
    for parts in listing.pictures:
        name, path = _name(parts, template), os.path.join(root, *parts)
        if name is None:
            left_out[OTHER_NAMES] += 1
        elif name not in found:
            found[name] = path
        elif faults is None:
            raise ValueError(f"{found[name]} and {path} differ in their extension only; keep one of them.")
        else:
            faults.setdefault(TWINS, {})[name] = f"{found[name]} and {path} differ in their extension only"
    if not found and listing.pictures:
        first = "/".join(listing.pictures[0])
        raise FileNotFoundError(
            f"The folder {root} has no picture called {template.text} ({template.key}), the first is {first}; check "
            f"both, or {key}."
        )
    if not found:
        raise FileNotFoundError(f"The folder {root} has no picture ({', '.join(PICTURES)}); check {key}.")
    return found


def _add_shared(mask_of: dict[str, str], image_of: Mapping[str, str], masks: Path, template: Template) -> None:
    """Adds the masks in folders that were listed by another name: folders of images may share masks by a link."""
    for place in sorted({os.path.dirname(name) for name in image_of if name not in mask_of}):
        if (masks / place).is_dir():
            shared = list_pictures(masks / place, deep=False).pictures
            found = {_name((*place.split("/"), file), template): f"{masks / place}/{file}" for (file,) in shared}
            mask_of |= {name: path for name, path in found.items() if name is not None}


def _without_masks(image_of: dict[str, str], mask_of: Mapping[str, str], template: Template) -> dict[str, str]:
    """The images without those that are masks of others: both may lie in one folder.

    Raises:
        ValueError: every image is its own mask.
    """
    masks = {os.path.normpath(path) for name, path in mask_of.items() if name in image_of}
    images = {name: path for name, path in image_of.items() if os.path.normpath(path) not in masks}
    if not images:
        raise ValueError(
            f"Images and masks are the same files, {next(iter(image_of.values()))} is the first; name another folder "
            f"in data.masks, or tell masks by their names in {template.key}."
        )
    return images


def _other_template(missing: list[str], masks: Path, template: Template) -> str:
    """The end of a sentence: the template by which at least half of these images would have masks."""
    listed = [_composed("/".join(parts)) for parts in list_pictures(masks).pictures]
    known = {os.path.splitext(path)[0] for path in listed}
    first, place = os.path.basename(missing[0]), os.path.dirname(missing[0])
    inside = [os.path.basename(stem) for stem in sorted(known) if os.path.dirname(stem) == place]
    candidates = dict.fromkeys(stem.replace(first, NAME, 1) for stem in inside if first in stem)
    for text in candidates:
        names = (os.path.join(os.path.dirname(name), text.replace(NAME, os.path.basename(name))) for name in missing)
        if text != template.text and 2 * sum(name in known for name in names) >= len(missing):
            return f" (data.mask_template='{text}' finds masks that are called so)"
    return ""


def _name(parts: tuple[str, ...], template: Template) -> str | None:
    """A picture's name by the template, with the path of its subfolder; None where it is called otherwise."""
    name = template.name_in(parts[-1])
    return None if name is None else _composed("/".join((*parts[:-1], name)))


def _composed(text: str) -> str:
    """macOS writes letters and their dots apart, which are one name."""
    return unicodedata.normalize("NFC", text)
