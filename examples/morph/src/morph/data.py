"""Batches of pictures in [0, 1] and their labels, drawn or from a folder; persons are disjoint between the splits."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eomt.data.sampler import SeededSampler
from morph.faces import draw_split
from morph.pictures import Picture, load_picture, read_folder
from morph.settings import DRAWN, Settings

MOST_MOVED = 1 / 16  # of the side, by which a training picture is shifted


class Faces(Dataset):
    """Pictures [3, size, size] in [0, 1] and labels; by `(index, seed)` flipped and shifted as the seed says.

    Args:
        pictures: uint8 [size, size, 3], or files.
    """

    def __init__(self, pictures: Sequence[np.ndarray | Picture], labels: Sequence[int], size: int) -> None:
        self.pictures, self.labels, self.size = pictures, list(map(int, labels)), size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        picture = self.pictures[index]
        pixels = load_picture(picture.path, self.size) if isinstance(picture, Picture) else picture
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
        return (image if seed is None else augment(image, seed)), self.labels[index]


def augment(image: Tensor, seed: int) -> Tensor:
    """An image [3, H, W] flipped from left to right or not, and shifted; its border is repeated."""
    rng, most = np.random.default_rng(seed), round(image.shape[1] * MOST_MOVED)
    image = image.flip(2) if rng.integers(2) else image
    down, right = rng.integers(0, 2 * most + 1, 2)
    padded = torch.nn.functional.pad(image[None], [most] * 4, mode="replicate")[0]
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]


@functools.lru_cache(maxsize=2)
def drawn_splits(identities: int, pictures: int, size: int, val_share: float, seed: int) -> dict[str, Faces]:
    """Drawn train, val and test sets, the same for a seed; each split has persons of its own."""
    val = max(2, round(identities * val_share))
    counts = {"train": identities - val, "val": val, "test": max(2, identities // 2)}
    splits = {}
    for number, (name, count) in enumerate(counts.items()):
        images, labels, _ = draw_split(count, pictures, size, np.random.default_rng((seed, number)))
        splits[name] = Faces(images, labels, size)
    return splits


def read_splits(settings: Settings) -> dict[str, Faces]:
    """The train, val and test sets of a run; raises what `read_folder` does."""
    s = settings
    if s.data == DRAWN:
        return drawn_splits(s.identities, s.pictures, s.img_size, s.val_share, s.data_seed)
    return {
        name: Faces(pictures, [picture.label for picture in pictures], s.img_size)
        for name, pictures in read_folder(settings).items()
    }


def count_training_images(settings: Settings) -> int:
    """How many there are, for the choice of a preset."""
    return len(read_splits(settings)["train"])


class FaceData(LightningDataModule):
    """The loaders of a run.

    Raises:
        ValueError: there are fewer training pictures than a batch takes, or one class alone.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings, self.splits = settings, read_splits(settings)

    def check_training(self) -> None:
        """Raises ValueError where the training pictures are fewer than a batch, or of one class."""
        train = self.splits["train"]
        if len(train) < self.settings.batch_size:
            raise ValueError(
                f"data {self.settings.data} has {len(train)} training pictures, batch_size is "
                f"{self.settings.batch_size}: lower it"
            )
        if len({*train.labels}) < 2:
            raise ValueError(
                f"data {self.settings.data}: all training pictures are {'morphs' if train.labels[0] else 'bona fide'}; "
                "both kinds are needed"
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented, the same for a seed, from wherever resumed."""
        train = self.splits["train"]
        return self._loader("train", sampler=SeededSampler(train, self.settings.seed), drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, split: str, **options: object) -> DataLoader:
        s = self.settings
        return DataLoader(self.splits[split], s.batch_size, num_workers=s.num_workers, **options)
