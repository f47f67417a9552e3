"""Cityscapes: 19 classes of European streets (Cordts et al., CVPR 2016), from its zips or extracted folders."""

import os
from collections import Counter
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from eomt.data.labels import LabelSet
from eomt.data.listing import LEFT_BY_SYSTEMS, is_left_by_system
from eomt.data.sources import IndexDecoder, LoaderOptions, Sample, Source, Splits, open_archive
from eomt.indices import IGNORE, OUTLIER

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule

# Official table (cityscapesScripts, helpers/labels.py): name, label id, colour; the train id is the position.
_CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CITYSCAPES = LabelSet(tuple(name for name, _, _ in _CLASSES), tuple(color for _, _, color in _CLASSES))
TRAIN_ID_OF_ID: dict[int, int] = dict.fromkeys(range(34), IGNORE) | {
    label_id: train_id for train_id, (_, label_id, _) in enumerate(_CLASSES)
}

_SUFFIX = "_leftImg8bit.png"  # of images
OTHER_NAMES = f"not named *{_SUFFIX}"
_REMEDY = "make the label files again with cityscapesScripts"
# In the order of preference; 255 is how either kind stores pixels without a class, 254 how a pasted data set stores
# outliers (scripts/make_cut_paste.py).
_DECODERS = {
    "labelTrainIds": IndexDecoder({index: index for index in (*range(19), OUTLIER, IGNORE)}, _REMEDY),
    "labelIds": IndexDecoder(TRAIN_ID_OF_ID | {IGNORE: IGNORE}, _REMEDY),
}
_DOWNLOAD = "download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com"


def cityscapes(root: str, **loader: Unpack[LoaderOptions]) -> "SegmentationDataModule":
    """Cityscapes' official train and val splits.

    Args:
        root: Folder with `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip`, read in place, or with the
            extracted folders `leftImg8bit/` and `gtFine/`. A folder is preferred to its zip, since label files made
            by cityscapesScripts are written there.
        **loader: See SegmentationDataModule.

    Raises:
        FileNotFoundError: Images, labels or the label of an image are missing.
        ValueError: A zip is not complete.
    """
    from eomt.data.datamodule import feed

    return feed(splits(root), **loader)


def splits(root: str) -> Splits:
    """The samples of `cityscapes`, with its errors."""
    left_out: Counter[str] = Counter()
    images, labels = (find_pictures(Path(root), part, left_out) for part in ("leftImg8bit", "gtFine"))
    pairs = {split: _images_and_stems(images, split, root) for split in ("train", "val")}
    kind = _choose_kind([stem for stems in pairs.values() for stem in stems], labels, root)
    train, val = (
        [_sample(stem, image, labels[f"{stem}_gtFine_{kind}.png"]) for stem, image in stems.items()]
        for stems in pairs.values()
    )
    others = sum(name.startswith(("train/", "val/")) and not name.endswith(_SUFFIX) for name in images)
    left_out.update(+Counter({OTHER_NAMES: others}))
    return Splits(train, val, CITYSCAPES, _DECODERS[kind], left_out)


def _sample(stem: str, image: Source, label: Source) -> Sample:
    """`stem` is SPLIT/CITY/NAME; a city was driven through once, and names are in the order of that drive."""
    _, city, name = stem.split("/")
    return Sample(name, image, label, city)


def find_pictures(root: Path, part: str, left_out: Counter[str]) -> dict[str, Source]:
    """Finds every PNG of `part` (leftImg8bit or gtFine), by its path inside that part: `train/CITY/NAME.png`.

    Adds to what is left out.
    """
    folder, archive = root / part, root / f"{part}_trainvaltest.zip"
    if extracted := [name for end in ("*.png", ".*.png") for name in glob(f"*/*/{end}", root_dir=folder)]:
        names = sorted((name.replace(os.sep, "/") for name in extracted), key=lambda name: name.split("/"))
        return {name: Source(f"{folder}/{name}") for name in _known(names, left_out)}
    if archive.is_file():
        members = sorted(name for name in open_archive(archive).namelist() if name.endswith(".png"))
        return {name.removeprefix(f"{part}/"): Source(str(archive), name) for name in _known(members, left_out)}
    raise FileNotFoundError(f"Cityscapes needs {archive} or the folder {folder}, found neither; {_DOWNLOAD} there.")


def _known(names: list[str], left_out: Counter[str]) -> list[str]:
    """Those that no system has left."""
    known = [name for name in names if not is_left_by_system(name.split("/"))]
    left_out.update(+Counter({LEFT_BY_SYSTEMS: len(names) - len(known)}))
    return known


def _images_and_stems(images: Mapping[str, Source], split: str, root: str) -> dict[str, Source]:
    """The images of a split by the part of their path that their labels share: `train/CITY/NAME`."""
    found = {
        name.removesuffix(_SUFFIX): image
        for name, image in images.items()
        if name.startswith(f"{split}/") and name.endswith(_SUFFIX)
    }
    if not found:
        raise FileNotFoundError(f"No image leftImg8bit/{split}/CITY/*{_SUFFIX} in {root}; {_DOWNLOAD} there.")
    return found


def _choose_kind(stems: list[str], labels: Mapping[str, Source], root: str) -> str:
    """The preferred kind of label file that every image has; a label without an image means missing images."""
    known = set(stems)
    for name in labels:
        stem, _, kind = name.partition("_gtFine_")
        if kind == "labelIds.png" and name.startswith(("train/", "val/")) and stem not in known:
            raise FileNotFoundError(
                f"gtFine/{name} in {root} has no image leftImg8bit/{stem}_leftImg8bit.png; {_DOWNLOAD} there again."
            )
    missing = {kind: [s for s in stems if f"{s}_gtFine_{kind}.png" not in labels] for kind in _DECODERS}
    for kind, lacking in missing.items():
        if not lacking:
            return kind
    kind = min(missing, key=lambda k: len(missing[k]))
    raise FileNotFoundError(
        f"{len(missing[kind])} of {len(stems)} images in {root} have no label file, the first is "
        f"gtFine/{missing[kind][0]}_gtFine_{kind}.png; {_DOWNLOAD} there again."
    )
