"""Any pair of folders: images, and masks of class ids or of RGB colours, explained by a YAML file."""

import os
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from eomt.data import subsets
from eomt.data.labels import LabelSet
from eomt.data.listing import by_number
from eomt.data.pairs import NAME, Faults, Template, pair
from eomt.data.sources import ColorDecoder, IndexDecoder, LabelDecoder, LoaderOptions, Sample, Splits
from eomt.files import read_yaml
from eomt.indices import IGNORE

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule

SPLIT_BY = "write folder, sequence, or an expression with what names a sequence in brackets: '(drive\\d+)_'"


def folder(
    classes: str,
    images: str,
    masks: str,
    val_images: str | None = None,
    val_masks: str | None = None,
    val_share: float = 0.2,
    split_seed: int = 0,
    split_by: str | None = None,
    image_template: str = NAME,
    mask_template: str = NAME,
    **loader: Unpack[LoaderOptions],
) -> "SegmentationDataModule":
    """Images and masks with the same name and path below their folders, whatever their endings; links are followed.

    Args:
        classes: YAML file of classes; see `read_classes`.
        images: Folder of images, searched with its subfolders.
        masks: Folder with a mask for every image: one channel of class ids, or RGB colours.
        val_images: Validation images; None holds out a part of `images`.
        val_masks: Their masks.
        val_share: Share held out at random where there are no `val_images`; at least one image.
        split_seed: Chooses the images that are held out.
        split_by: What stands on one side of a split as a whole, see `sequence_of`; None for single images.
        image_template: How images are called, see `eomt.data.pairs.Template`.
        mask_template: How masks are called: `{name}_mask.png`.
        **loader: See SegmentationDataModule.

    Raises:
        FileNotFoundError: A folder or file is missing, or the mask of an image.
        ValueError: The YAML is wrong, a first mask does not fit it, or the split is impossible.
    """
    from eomt.data.datamodule import feed
    from eomt.data.survey import raise_first, without_raising

    places = {"images": images, "masks": masks, "val_images": val_images, "val_masks": val_masks}
    halves = {"val_share": val_share, "split_seed": split_seed, "split_by": split_by}
    names = {"image_template": image_template, "mask_template": mask_template}
    data = feed(splits(classes, **places, **halves, **names), **loader)
    firsts = (data.train_set.with_transform(None), data.val_set)
    errors = [without_raising(lambda dataset: dataset[0], dataset) for dataset in firsts]
    # a mask of the other kind or size fails here, not in the middle of training
    raise_first([error for error in errors if isinstance(error, Exception)], 2, sum(map(len, firsts)))
    return data


def splits(
    classes: str,
    images: str,
    masks: str,
    val_images: str | None = None,
    val_masks: str | None = None,
    val_share: float = 0.2,
    split_seed: int = 0,
    split_by: str | None = None,
    image_template: str = NAME,
    mask_template: str = NAME,
    faults: Faults | None = None,
) -> Splits:
    """The samples of `folder`, with its arguments and errors; no picture is read.

    Where `faults` are given, images without a mask are listed there instead of being an error.
    """
    if (val_images is None) != (val_masks is None):
        raise ValueError(
            f"data.val_images and data.val_masks go together, got {val_images} and {val_masks}; set both or neither."
        )
    label_set, decoder = read_classes(Path(classes))
    left_out: Counter[str] = Counter()
    templates = Template(image_template, "data.image_template"), Template(mask_template)
    train = in_sequences(pair(Path(images), Path(masks), *templates, left_out, faults=faults), split_by)
    if val_images is not None:
        keys = "data.val_images", "data.val_masks"
        val = pair(Path(val_images), Path(val_masks), *templates, left_out, keys, faults)
    elif faults and len(train) < 2:
        val = []
    else:
        train, val = split(train, val_share, split_seed)
    return Splits(train, val, label_set, decoder, left_out)


def tolerant(**settings: Any) -> tuple["SegmentationDataModule | None", Faults]:
    """The data module of `folder`, with its arguments, for a report: what has no partner is listed, no mask is opened.

    Returns:
        The data module, None where pairs are too few for two splits; and the images without a partner, by kind.

    Raises:
        FileNotFoundError: A folder or file is missing.
        ValueError: The YAML is wrong, or the split is impossible.
    """
    from eomt.data.datamodule import feed

    faults: Faults = {}
    of_splits = {name: settings.pop(name) for name in signature(splits).parameters if name in settings}
    found = splits(**of_splits, faults=faults)
    return feed(found, **settings) if found.train and found.val else None, faults


def read_classes(path: Path) -> tuple[LabelSet, LabelDecoder]:
    """Reads names, colours and mask values of the classes.

    The file has a list `classes`, each with a `name`, a `color` and, for masks of ids, `ids`: one or more values that
    become this class. For colour masks no class has `ids`; `rgb` lists the colours that become the class, its own
    `color` if left out. `ignore_ids` or `ignore_rgb` list values that neither train nor count.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Something in it is missing, unknown, of the wrong type or given twice.
    """
    if not path.is_file():
        to = "classes.yaml" if path.is_dir() else path
        raise FileNotFoundError(
            f"data.classes must be a YAML file of classes, {path} is {'a folder' if path.is_dir() else 'not there'}; "
            f"`python scripts/dataset_report.py --init IMAGES MASKS > {to}` writes one from masks, see "
            "docs/own_images.md."
        )
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{error}; docs/data.md shows such a file, with its list `classes`.") from error
    if not content:
        raise ValueError(
            f"{path} is empty: `python scripts/dataset_report.py --init IMAGES MASKS > {path}` writes it, unless it "
            "stops with an error: do what that says, and call it again."
        )
    if not isinstance(content.get("classes"), list) or not content["classes"]:
        raise ValueError(f"{path} must have a list `classes`; see docs/data.md for an example.")
    _known_keys(content, {"classes", "ignore_ids", "ignore_rgb"}, str(path))
    entries = content["classes"]
    for position, entry in enumerate(entries):
        _check_entry(entry, f"{path}, class {position}")
    try:
        label_set = LabelSet(tuple(e["name"] for e in entries), tuple(tuple(e["color"]) for e in entries))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    remedy = f"add it to a class or to the ignored values in {path}"
    with_ids = [entry for entry in entries if "ids" in entry]
    if with_ids and len(with_ids) < len(entries):
        lacking = next(entry["name"] for entry in entries if "ids" not in entry)
        raise ValueError(f"{path}: either every class has `ids` or none, {lacking!r} has none; add them.")
    if with_ids:
        _no_key(content, "ignore_rgb", "ignore_ids", path)
        values = [(index, value) for index, entry in enumerate(entries) for value in entry["ids"]]
        table = _table(values, content.get("ignore_ids", []), _is_byte, "an id 0..255", path)
        other = f"{path} lists `ids`: take masks of ids, or leave `ids` out, so that each class has its colour"
        return label_set, IndexDecoder(table, remedy, other)
    _no_key(content, "ignore_ids", "ignore_rgb", path)
    values = [(index, value) for index, entry in enumerate(entries) for value in entry.get("rgb", [entry["color"]])]
    table = _table(values, content.get("ignore_rgb", []), _is_color, "a colour [R, G, B]", path)
    other = f"{path} lists colours alone: give every class its `ids` there, or take masks in RGB"
    return label_set, ColorDecoder({tuple(color): index for color, index in table.items()}, remedy, other)


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping with name and color, got {entry!r}; see docs/data.md.")
    _known_keys(entry, {"name", "color", "ids", "rgb"}, where)
    if not isinstance(entry.get("name"), str):
        raise ValueError(f"{where} needs a `name`, got {entry.get('name')!r}; write a word, in quotes if need be.")
    if not _is_color(entry.get("color")):
        raise ValueError(f"{where} ({entry['name']}) needs a `color` [R, G, B] of 0..255, got {entry.get('color')!r}.")
    if "ids" in entry and "rgb" in entry:
        raise ValueError(f"{where} ({entry['name']}) has both `ids` and `rgb`; keep the one that your masks have.")
    for key in ("ids", "rgb"):
        if key in entry and (not isinstance(entry[key], list) or not entry[key]):
            raise ValueError(f"{where} ({entry['name']}): `{key}` must be a list, got {entry[key]!r}; write [...].")


def _known_keys(mapping: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = [key for key in mapping if key not in known]
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; it may have {', '.join(sorted(known))}.")


def _no_key(content: Mapping[str, Any], key: str, instead: str, path: Path) -> None:
    if key in content:
        raise ValueError(f"{path} has `{key}`, which does not go with its classes; use `{instead}`.")


def _table(values: list[tuple[int, Any]], ignored: Any, valid, rule: str, path: Path) -> dict[Any, int]:  # noqa: ANN001
    """Train index, or IGNORE, of each mask value; every value may occur once."""
    if not isinstance(ignored, list):
        raise ValueError(f"{path}: the ignored values must be a list, got {ignored!r}; write [...].")
    table: dict[Any, int] = {}
    for index, value in [*values, *((IGNORE, value) for value in ignored)]:
        if not valid(value):
            raise ValueError(f"{path}: a mask value must be {rule}, got {value!r}; correct it.")
        key = tuple(value) if isinstance(value, list) else value
        if key in table:
            raise ValueError(f"{path} lists the mask value {value} more than once; leave it in one place.")
        table[key] = index
    return table


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_byte, value))


def in_sequences(samples: list[Sample], split_by: str | None) -> list[Sample]:
    """The samples with the sequences that they are of, frames in the order of their numbers; None leaves them alone."""
    if split_by is None:
        return samples
    named = [replace(sample, sequence=sequence_of(sample.name, split_by)) for sample in samples]
    return sorted(named, key=lambda sample: (sample.sequence, *by_number(sample.name)))


def sequence_of(name: str, split_by: str) -> str:
    """The sequence that an image is of, by its name, which has its path below the folder and no ending.

    Args:
        name: `drive1/left_000017`.
        split_by: `folder`: its subfolder, `drive1`. `sequence`: what stands before the number at its end,
            `drive1/left_`. Anything else is a regular expression, of which the first group counts, or all that it
            matches.

    Raises:
        ValueError: it is no regular expression, or matches nothing in the name.
    """
    if split_by == "folder":
        return os.path.dirname(name)
    if split_by == "sequence":
        return re.sub(r"\d+$", "", name)
    try:
        found = re.search(split_by, name)
    except re.error as error:
        raise ValueError(f"data.split_by {split_by!r} is no regular expression ({error}); {SPLIT_BY}") from error
    if not found or not (found[1] if found.re.groups else found[0]):
        raise ValueError(f"data.split_by {split_by!r} finds no sequence in the name {name!r}; {SPLIT_BY}")
    return found[1] if found.re.groups else found[0]


def split(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Holds out a share at random: of sequences whole ones where they are known, of a single one the last frames.

    Raises:
        ValueError: the share is not between 0 and 1, or there are fewer than two samples.
    """
    if not 0 < share < 1:
        raise ValueError(f"data.val_share must lie between 0 and 1, got {share}; set data.val_images for no split.")
    if len(samples) < 2:
        raise ValueError(f"A split needs at least 2 images, there is {len(samples)}; set data.val_images.")
    count = min(len(samples) - 1, max(1, round(share * len(samples))))
    if samples[0].sequence is not None:
        return subsets.split_sequences(samples, count, seed)
    held_out = set(random.Random(seed).sample(range(len(samples)), count))
    return (
        [sample for index, sample in enumerate(samples) if index not in held_out],
        [sample for index, sample in enumerate(samples) if index in held_out],
    )
