"""Places of pictures and label maps, and the decoding of label pictures: all that is known of data without torch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import ZipFile

import numpy as np
from PIL import Image
from typing_extensions import Required, TypedDict

from eomt.data.labels import LabelSet
from eomt.data.pictures import PNG_END, decode_picture

UNKNOWN = 253  # in lookup tables: a value that no class lists, unless there are as many classes

# by the first two bytes of PNG, JPEG, BMP, TIFF and WebP, what their files end with, as far as there is anything
ENDINGS = {b"\x89P": PNG_END, b"\xff\xd8": b"\xff\xd9", b"BM": b"", b"II": b"", b"MM": b"", b"RI": b""}
TAIL = 4096  # bytes in which the ending is looked for

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

        A picture is decoded only where its last bytes do not tell.
        """
        if self.member is not None:
            return  # an archive knows its members' sizes
        with open(self.path, "rb") as file:
            start = file.read(2)
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            known = start in ENDINGS and ENDINGS[start] in file.read()
        if not known:
            self.decode()

    def decode(self) -> Image.Image:
        """The picture; raises ValueError as `decode_picture` and `read` do."""
        return decode_picture(self.read(), str(self))

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            ValueError: An archive's checksum says that they are damaged, or the archive has no such member.
            FileNotFoundError: There is no such file.
        """
        if self.member is None:
            return Path(self.path).read_bytes()
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
    """One image and its label map, under a name that is unique in the dataset."""

    name: str
    image: Source
    label: Source
    sequence: str | None = None  # of a video or a drive: its frames are neighbours


class IndexDecoder:
    """Decodes single-channel label pictures through a 256-entry table.

    Args:
        train_index: Maps pixel values 0..255 to train indices, OUTLIER or IGNORE; many to one is fine.
        remedy: What to do about a value that is not in the table; the end of the error's sentence.
    """

    def __init__(self, train_index: Mapping[int, int], remedy: str) -> None:
        self.table = [UNKNOWN] * 256
        for value, index in train_index.items():
            self.table[value] = index
        self.known = sorted(train_index)
        self.remedy = remedy

    def __call__(self, picture: Image.Image, source: str) -> np.ndarray:
        values = np.asarray(picture)
        if values.ndim != 2:
            raise ValueError(
                f"{source} must have a single channel of class ids, it has mode {picture.mode}; {self.remedy}"
            )
        if values.dtype != np.uint8:  # pictures of 1, 16 or 32 bits, or of fractions
            if (wrong := ~np.isin(values, np.arange(256))).any():
                raise ValueError(f"{source} has the value {values[wrong][0]}, label values are 0..255; {self.remedy}")
            values = values.astype(np.uint8)
        labels = np.array(Image.fromarray(values).point(self.table))  # in a sixth of the time that numpy takes
        if (doubtful := labels == UNKNOWN).any() and len(unknown := np.setdiff1d(values[doubtful], self.known)):
            raise ValueError(f"{source} has the value {unknown[0]}, which no class lists; {self.remedy}")
        return labels


class ColorDecoder:
    """Decodes RGB label pictures; `train_index` maps (R, G, B) to a train index or IGNORE."""

    def __init__(self, train_index: Mapping[tuple[int, int, int], int], remedy: str) -> None:
        codes = {(r << 16) | (g << 8) | b: index for (r, g, b), index in train_index.items()}
        self.codes = np.array(sorted(codes), dtype=np.int32)
        self.indices = np.array([codes[code] for code in sorted(codes)], dtype=np.uint8)
        self.remedy = remedy

    def __call__(self, picture: Image.Image, source: str) -> np.ndarray:
        if picture.mode not in ("RGB", "RGBA", "P"):
            raise ValueError(f"{source} must be an RGB colour mask, it has mode {picture.mode}; {self.remedy}")
        rgb = np.asarray(picture.convert("RGB")).astype(np.int32)
        values = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        position = np.searchsorted(self.codes, values).clip(max=len(self.codes) - 1)
        if (unknown := self.codes[position] != values).any():
            color = tuple(int(channel) for channel in rgb[unknown][0])
            raise ValueError(f"{source} has the colour {color}, which no class lists; {self.remedy}")
        return self.indices[position]


class Splits(NamedTuple):
    """The samples of both splits, their classes, and how their label pictures are decoded."""

    train: Sequence[Sample]
    val: Sequence[Sample]
    classes: LabelSet
    decode_labels: LabelDecoder


def spread(length: int, count: int) -> list[int]:
    """Chooses up to `count` indices, evenly over the whole length."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()
