"""What the labels of both splits can teach and judge, seen on a sample before a run."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eomt.data.alike import difference_hash, nearly_same, neighbours
from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.listing import SHOWN, listed
from eomt.data.overlap import identify, shared_images
from eomt.data.sources import ColorDecoder, LabelDecoder, Source, spread
from eomt.indices import IGNORE, OUTLIER

IMAGES = 64  # of a split that are decoded with their labels
MASKS = 256  # of a split whose labels are counted as long as a class has no pixel
LEAST = 8  # of a split, however large its files are
BYTES = 2**25  # of the files that are read from a split, so that large ones do not delay a run
THREADS = 8

Enlarge = Callable[[Tensor], Tensor]
Stored = int | tuple[int, ...]  # a value of a mask in its file: an id, or (R, G, B)


@dataclass
class Sampled:
    """What was seen of one split.

    Attributes:
        total: Images of the split.
        sizes: (height, width) of the images that were decoded.
        masks: Positions of the label maps that were counted.
        pixels: Pixels of each label value in them, int64 [256].
        at_full_size: Label values in the label maps of the decoded images, bool [256].
        trained: Those of them that are left at the largest scale of training, bool [256].
        empty: Label maps without a labelled pixel among those of the decoded images.
        contents: Names of the decoded images by what identifies their pixels.
        hashes: What they look like, by name; see `eomt.data.alike`.
    """

    total: int
    sizes: list[tuple[int, int]] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    pixels: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.long))
    at_full_size: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.bool))
    trained: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.bool))
    empty: int = 0
    contents: dict[bytes, str] = field(default_factory=dict)
    hashes: dict[str, np.ndarray] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"all {self.total}" if len(self.masks) == self.total else f"{len(self.masks)} of {self.total}"


@dataclass(frozen=True)
class Survey:
    """Samples of both splits, with what is to be said about them."""

    classes: LabelSet
    train: Sampled
    val: Sampled
    warnings: list[str]

    def line(self, left_out: Mapping[str, int]) -> str:
        """One line on the data; `left_out` are numbers of files by the reason why they are no samples."""
        files = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        parts = [f"{self.train.total} + {self.val.total} pairs" + (f" (left out: {files})" if files else "")]
        parts.append(f"images {span([*self.train.sizes, *self.val.sizes])}")
        counts = [int((part.pixels[: len(self.classes)] > 0).sum()) for part in (self.train, self.val)]
        shown = f"{counts[0]}" if counts[0] == counts[1] else f"{counts[0]} + {counts[1]}"
        parts.append(f"{shown} of {len(self.classes)} classes with pixels")
        if empty := self.train.empty + self.val.empty:
            parts.append(f"{empty} without a labelled pixel")
        pixels = self.train.pixels + self.val.pixels
        parts.append(f"{percent(pixels[IGNORE] / pixels.sum())} of the pixels ignored")
        looked, total = len(self.train.sizes) + len(self.val.sizes), self.train.total + self.val.total
        seen = f"read all {total:,} pairs" if looked == total else f"looked at {looked:,} of {total:,} pairs"
        return f"data: {', '.join(parts)} ({self.train} + {self.val} label maps counted); {seen}"


def take_survey(train: SegmentationDataset, val: SegmentationDataset, largest: Enlarge) -> Survey:
    """Decodes a sample of both splits, spread evenly, and counts its labels.

    Args:
        train: without augmentation.
        val: as it is validated on.
        largest: gives a label map at the largest scale that training shows it in.

    Raises:
        ValueError: no pixel of a split is labelled, of all its label maps; or a picture cannot be read.
        OSError: a file is gone.
    """
    trained, validated = sample_split("training", train, largest), sample_split("validation", val)
    warnings = [
        *about_classes(train, trained, validated),
        *about_scale(train.classes, trained),
        *about_overlap(train, val, trained, validated),
        *about_likeness(train, val, trained, validated),
    ]
    return Survey(train.classes, trained, validated, warnings)


def sample_split(split: str, dataset: SegmentationDataset, largest: Enlarge = lambda labels: labels) -> Sampled:
    """Looks at images with labels, then at labels alone while a class has no pixel; raises as `take_survey` does."""
    classes, found = len(dataset.classes), Sampled(len(dataset))
    images = affordable([sample.image for sample in dataset.samples], IMAGES)
    with ThreadPool(threads([dataset.samples[index].image for index in images])) as pool:
        errors = []
        for reading in pool.imap(partial(without_raising, partial(_read, dataset)), images):
            if isinstance(reading, Exception):
                errors.append(reading)
                continue
            labels, name, content, look = reading
            pixels = count_labels(labels)
            found.sizes.append(tuple(labels.shape))
            found.contents.setdefault(content, name)
            found.hashes[name] = look
            found.pixels += pixels
            found.empty += not pixels[:classes].any()
            found.at_full_size |= pixels > 0
            found.trained |= count_labels(largest(labels)) > 0
        raise_first(errors, len(images), len(dataset))
        found.masks += images
        if not found.pixels[:classes].all():
            more = affordable([sample.label for sample in dataset.samples], MASKS)
            more = sorted(set(more) - set(images))
            found.pixels += sum(pool.imap(partial(histogram, dataset), more), torch.zeros_like(found.pixels))
            found.masks += more
        rest = sorted(set(range(len(dataset))) - set(found.masks)) if not found.pixels[:classes].any() else []
        for index, pixels in zip(rest, pool.imap(partial(histogram, dataset), rest), strict=True):
            found.pixels += pixels
            found.masks.append(index)
            if pixels[:classes].any():
                break
    if not found.pixels[:classes].any():
        values = values_text(mask_values(dataset, found.masks[:IMAGES]), dataset.classes)
        raise ValueError(
            f"The {split} split has no labelled pixel in any of its {len(dataset)} label maps, which hold {values}; "
            "make one of these values that of a class."
        )
    return found


def affordable(files: Sequence[Source], count: int) -> list[int]:
    """Positions of up to `count` files, evenly spread; of large ones fewer."""
    chosen = spread(len(files), count)
    size = sum(identify(files[index])[0] for index in chosen)
    return chosen if size <= BYTES else spread(len(files), max(LEAST, int(len(chosen) * BYTES / size)))


def threads(files: Sequence[Source]) -> int:
    """How many of these files are decoded at a time: of large ones, which need much memory, one."""
    return 1 if max(identify(file)[0] for file in files) > BYTES / LEAST else THREADS


def _read(dataset: SegmentationDataset, index: int) -> tuple[Tensor, str, bytes, np.ndarray]:
    """Labels [H, W] of image `index`, its name, what identifies its pixels, and what they look like."""
    image, labels = dataset[index]
    content = hashlib.sha256(repr(image.shape).encode() + image.permute(1, 2, 0).contiguous().numpy().tobytes())
    return labels, dataset.samples[index].name, content.digest(), difference_hash(image)


def without_raising(read: Callable[[Any], Any], item: Any) -> Any:
    """What `read` returns, or the error of a file that is wrong."""
    try:
        return read(item)
    except (ValueError, OSError) as error:
        return error


def raise_first(errors: Sequence[Exception], looked: int, total: int) -> None:
    """Raises the first of these errors, if there is one, and says how many there are."""
    if not errors:
        return
    if len(errors) == 1 and looked == total:
        raise errors[0]
    text = str(errors[0]).rstrip(".")
    kind = type(errors[0]) if isinstance(errors[0], OSError) else ValueError
    are = "is" if len(errors) == 1 else "are"
    raise kind(
        f"{text} ({len(errors):,} of {looked:,} pairs looked at {are} wrong, of {total:,} in all: "
        "scripts/dataset_report.py lists every fault)"
    ) from errors[0]


def histogram(dataset: SegmentationDataset, index: int) -> Tensor:
    """Pixels of each value in label map `index`, int64 [256]; the image is not read."""
    return count_labels(dataset.labels(index))


def count_labels(labels: Tensor) -> Tensor:
    return torch.bincount(labels.flatten(), minlength=256)


def about_classes(dataset: SegmentationDataset, train: Sampled, val: Sampled) -> Iterator[str]:
    """Says which classes cannot be learnt or judged, and what the training masks hold in their place."""
    names, count = dataset.classes.names, len(dataset.classes)
    if count == 1:
        yield (
            f"{names[0]!r} is the only class, so every pixel is predicted as it and mIoU says little: make the "
            "background a class, if the masks have one"
        )
    trained, validated = train.pixels[:count] > 0, val.pixels[:count] > 0
    only_validated = [name for k, name in enumerate(names) if validated[k] and not trained[k]]
    nowhere = [name for k, name in enumerate(names) if not validated[k] and not trained[k]]
    found = []
    if only_validated:
        found.append(
            f"no training pixel of {listed(only_validated)} in {train} label maps, but validation pixels: what is not "
            "learnt counts with an IoU of 0"
        )
    if nowhere:
        found.append(f"no pixel of {listed(nowhere)} in {train} training and {val} validation label maps")
    if found:
        values = mask_values(dataset, train.masks[:IMAGES])
        found.append(f"the training masks hold {values_text(values, dataset.classes)}")
        ignored = [value for (value, index), _ in values.most_common() if index == IGNORE]
        if trained.sum() == 1 and ignored:
            found.append(f"{ignored[0]} is ignored: if a class is meant by it, list it there instead")
        yield "; ".join(found)


def about_scale(classes: LabelSet, train: Sampled) -> Iterator[str]:
    """Says which classes are lost when images are scaled down to the crop."""
    lost = (train.at_full_size & ~train.trained)[: len(classes)].nonzero().flatten().tolist()
    if lost:
        names = listed([classes.names[k] for k in lost])
        yield (
            f"no pixel of {names} is left in the training masks looked at, once scaled to the crop "
            "by the largest scale of training: raise data.img_size or data.scale_range, or cut the images into tiles"
        )


def about_overlap(
    train: SegmentationDataset, val: SegmentationDataset, trained: Sampled, validated: Sampled
) -> Iterator[str]:
    """Says which validation images are training images, by their files or by the pixels of the samples."""
    shared = shared_images(train.samples, val.samples)
    shared |= {name for content, name in validated.contents.items() if content in trained.contents}
    if shared:
        names = [name for name in val.names if name in shared]
        yield (
            f"{'at least ' * (len(names) < len(val))}{len(names)} of {len(val)} validation images are training images, "
            f"too ({listed(names)}): scores on them say nothing about new images; take them out of one of the splits"
        )


def about_likeness(
    train: SegmentationDataset, val: SegmentationDataset, trained: Sampled, validated: Sampled
) -> Iterator[str]:
    """Says which validation images of the sample nearly are training images.

    Where no sequences are known, training images whose names come just before theirs are looked at, too.
    """
    looks = dict(trained.hashes)
    if not any(train.sequences) and not any(val.sequences):
        near = [train.samples[index] for index in neighbours(train.samples, val.samples)]
        near = [near[k] for k in affordable([sample.image for sample in near], len(near))]
        places = {sample.name: index for index, sample in enumerate(train.samples)}
        with ThreadPool(threads([sample.image for sample in near])) as pool:
            new = [sample.name for sample in near if sample.name not in looks]
            looks |= zip(new, pool.map(lambda name: difference_hash(train.image(places[name])), new), strict=True)
    same = {name for content, name in validated.contents.items() if content in trained.contents}
    new = {name: look for name, look in validated.hashes.items() if name not in same}
    if found := nearly_same(new, looks):
        pairs = listed([f"{name} like {other}" for name, other in found.items()])
        yield (
            f"at least {len(found)} of the {len(validated.hashes)} validation images looked at nearly are training "
            f"images ({pairs}): scores on neighbouring frames of a video, or on copies, say little about new images; "
            "hold out whole sequences (data.split_by=sequence or folder), or take them out of one of the splits"
        )


def mask_values(dataset: SegmentationDataset, indices: Sequence[int]) -> Counter[tuple[Stored, int]]:
    """Pixels of each (stored value, label value) in these masks."""
    with ThreadPool(THREADS) as pool:
        return sum(pool.map(partial(values_of_mask, dataset), indices), Counter())


def values_text(values: Counter[tuple[Stored, int]], classes: LabelSet) -> str:
    """`0 (83.6 %, background), 255 (16.4 %, ignored)`: values of masks as they are stored, and what they become."""
    shown = [
        f"{value} ({percent(pixels / values.total())}, {meaning_of(index, classes)})"
        for (value, index), pixels in values.most_common(SHOWN)
    ]
    return ", ".join(shown) + (f" and {len(values) - SHOWN} more values" if len(values) > SHOWN else "")


def values_of_mask(dataset: SegmentationDataset, index: int) -> Counter[tuple[Stored, int]]:
    """Pixels of each (stored value, label value) in mask `index`."""
    source = dataset.samples[index].label
    picture = source.decode()
    labels = dataset.decode_labels(picture, str(source))
    stored, in_colors = stored_values(picture, dataset.decode_labels)
    pairs, pixels = count(stored.astype(np.int32) << 8 | labels)
    values = (((code >> 16, code >> 8 & 255, code & 255) if in_colors else code) for code in (pairs >> 8).tolist())
    return Counter(dict(zip(zip(values, (pairs & 255).tolist(), strict=True), pixels.tolist(), strict=True)))


def count(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, none below 0, and how often each occurs."""
    if values.max() >= 2**16:
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.ravel())  # in a tenth of the time
    return counts.nonzero()[0], counts[counts > 0]


def stored_values(picture: Image.Image, decode: LabelDecoder) -> tuple[np.ndarray, bool]:
    """The values of a mask [H, W] before they are decoded, and whether they are colours, R << 16 | G << 8 | B."""
    values = np.asarray(picture)
    if values.ndim == 2 and not isinstance(decode, ColorDecoder):
        return values, False
    red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB")).astype(np.int64), 2, 0)
    return red << 16 | green << 8 | blue, True


def meaning_of(index: int, classes: LabelSet) -> str:
    return {IGNORE: "ignored", OUTLIER: "outliers"}.get(index) or classes.names[index]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def span(sizes: Sequence[tuple[int, int]]) -> str:
    """`360x480 to 720x960`, height x width, by area."""
    low, high = (choose(sizes, key=lambda size: (size[0] * size[1], size)) for choose in (min, max))
    return " to ".join(f"{height}x{width}" for height, width in dict.fromkeys((low, high)))
