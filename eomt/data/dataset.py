"""Pairs of images and label maps, read from plain files or from members of zip archives."""

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from eomt.data.labels import LabelSet

ORIENTATION = 0x0112  # EXIF tag
UNKNOWN = 253  # in lookup tables: a value that no class lists, unless there are as many classes

LabelDecoder = Callable[[Image.Image, str], np.ndarray]
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@lru_cache(maxsize=8)
def _archive_of_process(path: str, pid: int) -> ZipFile:
    # A forked worker must not share its parent's file handle: the two would move each other's position.
    try:
        return ZipFile(path)
    except BadZipFile as error:
        raise ValueError(f"{path} is no complete zip archive ({error}); download it again.") from error


def open_archive(path: str | Path) -> ZipFile:
    """The zip at `path`, opened once per process; only its central directory is read.

    Raises:
        ValueError: The file is truncated or no zip.
    """
    return _archive_of_process(str(path), os.getpid())


@dataclass(frozen=True)
class Source:
    """Where the bytes of one picture are: a plain file, or a member of a zip archive."""

    path: str
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else self.path

    def check_complete(self) -> None:
        """Raises ValueError for a plain file that is empty or ends before its picture does."""
        if self.member is not None:
            return  # an archive knows its members' sizes
        with open(self.path, "rb") as file:
            start = file.read(8)
            file.seek(max(0, os.stat(self.path).st_size - 4096))
            tail = file.read()
        ending = {b"\x89P": b"IEND\xaeB`\x82", b"\xff\xd8": b"\xff\xd9"}.get(start[:2], b"")  # PNG, JPEG
        if not start or ending not in tail:
            raise ValueError(f"{self} is incomplete ({os.stat(self.path).st_size} bytes); copy or download it again.")

    def read(self) -> bytes:
        """The file's bytes; raises ValueError where an archive's checksum says that they are damaged."""
        if self.member is None:
            return Path(self.path).read_bytes()
        try:
            return open_archive(self.path).read(self.member)
        except BadZipFile as error:  # a wrong checksum
            raise ValueError(f"{self} is damaged ({error}); download the archive again.") from error

    def identity(self) -> str:
        """Byte size, and the checksum where an archive knows it: cheap, nothing is decoded."""
        if self.member is None:
            return str(os.stat(self.path).st_size)
        entry = open_archive(self.path).getinfo(self.member)
        return f"{entry.file_size}:{entry.CRC:08x}"


@dataclass(frozen=True)
class Sample:
    """One image and its label map, under a name that is unique in the dataset."""

    name: str
    image: Source
    label: Source


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
        if values.dtype != np.uint8:  # 1-bit or 16-bit pictures
            if values.max() > 255:
                raise ValueError(f"{source} has the value {values.max()}, label values are 0..255; {self.remedy}")
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


class SegmentationDataset(Dataset):
    """Images with label maps: item i is `(image uint8 [3, H, W], labels uint8 [H, W])`.

    Label values are train indices 0..K-1, 255 for ignored pixels, or 254 for outliers, which belong to no class.

    Args:
        samples: Where each image and its label map are.
        classes: What the train indices mean.
        decode_labels: Turns a label picture (and its path, for errors) into train indices, uint8 [H, W].
        transform: Applied to (image, labels), for augmentation.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: LabelSet,
        decode_labels: LabelDecoder,
        transform: Transform | None = None,
    ) -> None:
        self.samples = tuple(samples)
        self.classes = classes
        self.decode_labels = decode_labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Item `index`; of a pair `(index, seed)`, the transform draws with that seed and disturbs nobody's.

        Raises:
            ValueError: A file cannot be decoded, or image and labels differ in size.
        """
        if isinstance(index, tuple):
            index, seed = index
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach out to the GPUs
                return self[index]
        sample = self.samples[index]
        image, labels = self.image(index), self.labels(index)
        if image.shape[1:] != labels.shape:
            raise ValueError(
                f"An image and its labels must have one size: {sample.image} is {_size(image[0])}, {sample.label} is "
                f"{_size(labels)} (height x width); export one of them again."
            )
        return self.transform(image, labels) if self.transform else (image, labels)

    @property
    def names(self) -> list[str]:
        return [sample.name for sample in self.samples]

    def image(self, index: int) -> Tensor:
        """The image alone, uint8 [3, H, W], in memory pixel by pixel (channels last) as it was decoded.

        Raises:
            ValueError: it cannot be decoded, or is stored turned: its labels may have been drawn on either view.
        """
        source = self.samples[index].image
        picture = _decode(source)
        if picture.getexif().get(ORIENTATION, 1) != 1:
            raise ValueError(
                f"{source} is stored turned (EXIF orientation {picture.getexif()[ORIENTATION]}), and its labels may "
                "belong to either view; save it upright, without the tag."
            )
        return pil_to_tensor(picture if picture.mode == "RGB" else picture.convert("RGB"))  # which would copy

    def labels(self, index: int) -> Tensor:
        """The label map alone, uint8 [H, W]; the image is not read."""
        source = self.samples[index].label
        return torch.from_numpy(self.decode_labels(_decode(source), str(source)))

    def with_transform(self, transform: Transform | None) -> "SegmentationDataset":
        return SegmentationDataset(self.samples, self.classes, self.decode_labels, transform)

    def fingerprint(self) -> str:
        """A sha256 of names, byte sizes and, inside zips, checksums: whether two runs saw the same files."""
        lines = sorted(f"{s.name} {s.image.identity()} {s.label.identity()}" for s in self.samples)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _decode(source: Source) -> Image.Image:
    data = source.read()
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError on broken PNG chunks
        raise ValueError(f"{source} cannot be decoded as a picture ({error}); replace the file.") from error
    return picture


def _size(plane: Tensor) -> str:
    return f"{plane.shape[0]}x{plane.shape[1]}"
