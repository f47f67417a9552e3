"""Places of pictures and label maps, and the decoding of label pictures: all that is known of data without torch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, NamedTuple
from zipfile import ZipFile

import numpy as np
from PIL import Image
from typing_extensions import Required, TypedDict

from eomt.data.labels import LabelSet
from eomt.data.masks import UnknownValues, check_mask, decode_mask, refuse_turned
from eomt.data.pictures import check_mode, decode_picture, looks_whole, open_picture

UNKNOWN = 253  # in lookup tables: a value that no class lists, unless there are as many classes

GRAY = "its colours are all gray: save one channel of it, without transparency"  # of a mask that should have ids

LabelDecoder = Callable[[Image.Image, str], np.ndarray]


class LoaderOptions(TypedDict, total=False):
    """Every dataset's function hands these on to `feed` and SegmentationDataModule, which have the defaults."""

    img_size: Required[Sequence[int]]
    batch_size: int
    num_workers: int
    scale_range: Sequence[float]
    color_jitter: bool
    flip: bool
    class_weights: Literal["inverse", "effective_number"] | None
    cut_paste: Any | None
    train_images: int | None
    hold_out: float | None
    subset_seed: int


@lru_cache(maxsize=8)
def _open_archive(path: str, state: tuple[int, ...], pid: int) -> ZipFile:
    # A file that was replaced since is another one. A forked worker must not share its parent's file handle: the two
    # would move each other's position.
    try:
        return ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # a directory of nonsense raises BadZipFile, struct.error, NotImplementedError, ...
        raise ValueError(f"{path} is no complete zip archive ({error}); download it again.") from error


def open_archive(path: str | Path) -> ZipFile:
    """The zip at `path`, opened once per process; only its central directory is read.

    Raises:
        ValueError: The file is truncated or no zip. FileNotFoundError: There is none.
    """
    facts = os.stat(path)
    return _open_archive(str(path), (facts.st_ino, facts.st_size, facts.st_mtime_ns), os.getpid())


@dataclass(frozen=True, slots=True)
class Source:
    """The place of one picture's bytes: a plain file, or a member of a zip archive."""

    path: str
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else self.path

    def check_complete(self) -> None:
        """Raises ValueError for a plain file that is no picture, or ends before its picture does.

        A picture is decoded only where its last bytes and its header do not tell.
        """
        if self.member is not None:
            return  # an archive knows its members' sizes
        with self._open() as file:
            whole = looks_whole(file, os.fstat(file.fileno()).st_size)
        if not whole:
            self.decode()

    def check_image(self) -> None:
        """As `check_complete`, of an image with a mask: what its header says against it is an error, too."""
        if self.member is None:
            with self._open() as file:
                picture = open_picture(file, str(self))
                refuse_turned(picture, str(self), "its labels")
                check_mode(picture, str(self))
        self.check_complete()

    def check_mask(self) -> None:
        """As `check_complete`, of a mask: what its header says against it is an error, too."""
        if self.member is None:
            with self._open() as file:
                check_mask(open_picture(file, str(self)), file, str(self))
        self.check_complete()

    def decode(self) -> Image.Image:
        """The picture; raises ValueError as `decode_picture` and `read` do."""
        return decode_picture(self.read(), str(self))

    def decode_mask(self) -> Image.Image:
        """The mask, whose pixels are values of classes; raises ValueError as `eomt.data.masks.decode_mask` does."""
        return decode_mask(self.read(), str(self))

    def _open(self) -> BinaryIO:
        try:
            return open(self.path, "rb")
        except FileNotFoundError:
            if os.path.islink(self.path):
                gone = f"{self.path} is a link to {os.readlink(self.path)}, which is not there; mend or remove it."
                raise FileNotFoundError(gone) from None
            raise

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            ValueError: An archive's checksum says that they are damaged, or the archive has no such member.
            FileNotFoundError: There is no such file.
        """
        if self.member is None:
            with self._open() as file:
                return file.read()
        try:
            return open_archive(self.path).read(self.member)
        except KeyError as error:
            raise ValueError(f"{self.path} has no {self.member} any more; start again, which lists it anew.") from error
        except (FileNotFoundError, PermissionError, MemoryError):
            raise
        except Exception as error:  # a wrong checksum, a password, an unknown compression: each raises its own class
            raise ValueError(f"{self} is damaged or encrypted ({error}); download the archive again.") from error


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its label map, under a name that is unique in the dataset.

    `sequence` names the video that a frame is of; samples of one sequence stand in the order of time.
    """

    name: str
    image: Source
    label: Source
    sequence: str | None = None  # of a video or a drive: its frames are neighbours


class IndexDecoder:
    """Decodes single-channel label pictures through a 256-entry table; of a palette the indices count, not the colours.

    Args:
        train_index: Maps pixel values 0..255 to train indices, OUTLIER or IGNORE; many to one is fine.
        remedy: What to do about a value that is not in the table; the end of the error's sentence.
        remedy_for_colors: The same about a mask in colours, where that is something else.
    """

    def __init__(self, train_index: Mapping[int, int], remedy: str, remedy_for_colors: str | None = None) -> None:
        self.table = [UNKNOWN] * 256
        for value, index in train_index.items():
            self.table[value] = index
        self.known = sorted(train_index)
        self.remedy = remedy
        self.remedy_for_colors = remedy_for_colors or remedy

    def __call__(self, picture: Image.Image, source: str) -> np.ndarray:
        values = np.asarray(picture)
        if values.ndim != 2:
            colors = np.asarray(picture.convert("RGB"))
            remedy = GRAY if (colors == colors[..., :1]).all() else self.remedy_for_colors
            raise ValueError(f"{source} must have a single channel of class ids, it has mode {picture.mode}; {remedy}")
        if values.dtype != np.uint8:  # pictures of 1, 16 or 32 bits, or of fractions
            if (wrong := ~np.isin(values, np.arange(256))).any():
                unknown = np.unique(values[wrong]).tolist()
                first = f"{source} has the value {values[wrong][0]}, label values are 0..255; {self.remedy}"
                raise UnknownValues(first, unknown)
            values = values.astype(np.uint8)
        if picture.mode == "P":
            self._check_palette(picture, source)
        labels = np.array(Image.fromarray(values).point(self.table))  # in a sixth of the time that numpy takes
        if (doubtful := labels == UNKNOWN).any() and len(unknown := np.setdiff1d(values[doubtful], self.known)):
            first = f"{source} has the value {unknown[0]}, which no class lists; {self.remedy}"
            raise UnknownValues(first, unknown.tolist())
        return labels

    def _check_palette(self, picture: Image.Image, source: str) -> None:
        """Raises ValueError where a palette is gray in another order, as programs store gray that has few values.

        Such gray values may be the class ids, if the table has them all: whoever looks at the mask sees those.
        """
        palette = np.array(picture.getpalette("RGB")).reshape(-1, 3)
        if (palette != palette[:, :1]).any():
            return
        used = [index for _, index in picture.getcolors() if index < len(palette)]
        grays = palette[used, 0].tolist()
        if {*used, *grays} <= {*self.known} and [self.table[i] for i in used] != [self.table[gray] for gray in grays]:
            raise ValueError(
                f"{source} has a palette of gray in which the index {used[0]} is the gray value {grays[0]}, and both "
                "may be its classes; save it without a palette, as gray of 8 bits."
            )


class ColorDecoder:
    """Decodes RGB label pictures; `train_index` maps (R, G, B) to a train index or IGNORE, transparency is left out.

    The remedies are those of `IndexDecoder`, the second one about a mask of ids.
    """

    def __init__(
        self, train_index: Mapping[tuple[int, int, int], int], remedy: str, remedy_for_ids: str | None = None
    ) -> None:
        codes = {(r << 16) | (g << 8) | b: index for (r, g, b), index in train_index.items()}
        self.codes = np.array(sorted(codes), dtype=np.int32)
        self.indices = np.array([codes[code] for code in sorted(codes)], dtype=np.uint8)
        self.remedy = remedy
        self.remedy_for_ids = remedy_for_ids or remedy

    def __call__(self, picture: Image.Image, source: str) -> np.ndarray:
        if picture.mode not in ("RGB", "RGBA", "P"):
            raise ValueError(f"{source} must be an RGB colour mask, it has mode {picture.mode}; {self.remedy_for_ids}")
        rgb = np.asarray(picture.convert("RGB")).astype(np.int32)
        values = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        position = np.searchsorted(self.codes, values).clip(max=len(self.codes) - 1)
        if (unknown := self.codes[position] != values).any():
            color = tuple(int(channel) for channel in rgb[unknown][0])
            colors = [(code >> 16, code >> 8 & 255, code & 255) for code in np.unique(values[unknown]).tolist()]
            first = f"{source} has the colour {color}, which no class lists; {self._remedy(picture)}"
            raise UnknownValues(first, colors)
        return self.indices[position]

    def _remedy(self, picture: Image.Image) -> str:
        if picture.mode != "P" or self.remedy_for_ids == self.remedy:
            return self.remedy
        return f"{self.remedy}, or if the indices of its palette are the class ids: {self.remedy_for_ids}"


class Splits(NamedTuple):
    """The samples of both splits, their classes, how their label pictures are decoded, and what was left out.

    `left_out` counts, by reason, the files of the data set's folders that belong to no sample.
    """

    train: Sequence[Sample]
    val: Sequence[Sample]
    classes: LabelSet
    decode_labels: LabelDecoder
    left_out: Mapping[str, int] = MappingProxyType({})


def spread(length: int, count: int) -> list[int]:
    """Chooses up to `count` indices, evenly over the whole length."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()
