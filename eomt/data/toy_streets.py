"""Toy streets: drawn street scenes in the layout of Cityscapes' zips, in clear weather or in a foggy night.

Nothing is downloaded. The scenes depend on the settings alone, are written once, and are read by Cityscapes' own
reader.
"""

import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from PIL import Image
from rich.progress import track
from typing_extensions import Unpack

from eomt.data import cityscapes
from eomt.data.sources import LoaderOptions, Sample, open_archive
from eomt.files import cache_folder, new_folder
from eomt.toys.scene import draw_scene

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule

VERSION = 1  # of the drawings; part of the folder's name
DOMAINS = ("clear", "night_fog")
CITIES = {"train": "toyville", "val": "toyburg"}


def toy_streets(
    root: str | None = None,
    domain: Literal["clear", "night_fog"] = "clear",
    num_train: int = 300,
    num_val: int = 60,
    size: Sequence[int] = (128, 256),
    data_seed: int = 0,
    **loader: Unpack[LoaderOptions],
) -> "SegmentationDataModule":
    """Toy streets with the 19 classes of Cityscapes; all but train and motorcycle occur.

    Args:
        root: Folder to keep the zips in; None for `$EOMT_CACHE/toy_streets`, or else `~/.cache/eomt/toy_streets`.
        domain: `clear`, or `night_fog`: other scenes, with dark, tinted, hazy and noisy pictures.
        num_train: Training images. More images begin with the same ones.
        num_val: Validation images.
        size: (height, width) of the images.
        data_seed: Which scenes are drawn.
        **loader: See SegmentationDataModule.

    Raises:
        ValueError: An unknown domain, fewer than one image a split, or a size under 32 pixels.
    """
    from eomt.data.datamodule import feed

    place = Path(root) if root else cache_folder("toy_streets")
    folder = write_toy_streets(place, domain, num_train=num_train, num_val=num_val, size=size, data_seed=data_seed)
    found = cityscapes.splits(str(folder))
    return feed(found._replace(train=_alone(found.train), val=_alone(found.val)), **loader)


def _alone(samples: Sequence[Sample]) -> list[Sample]:
    """Scenes that are no frames of a drive, though their names have a city as Cityscapes' have."""
    return [replace(sample, sequence=None) for sample in samples]


def write_toy_streets(
    root: Path, domain: Literal["clear", "night_fog"], num_train: int, num_val: int, size: Sequence[int], data_seed: int
) -> Path:
    """Draws and writes both zips, unless they are there, whole; returns their folder."""
    if domain not in DOMAINS:
        raise ValueError(f"data.domain must be one of {', '.join(DOMAINS)}, got {domain!r}.")
    if num_train < 1 or num_val < 1:
        raise ValueError(f"data.num_train and data.num_val must be at least 1, got {num_train} and {num_val}.")
    if len(size) != 2 or min(size) < 32:
        raise ValueError(f"data.size must be (height, width) of at least 32 pixels each, got {tuple(size)}.")
    if data_seed < 0:
        raise ValueError(f"data.data_seed must be 0 or more, got {data_seed}.")
    height, width = size
    folder = root / f"v{VERSION}_{domain}_{height}x{width}_{num_train}train_{num_val}val_seed{data_seed}"
    if not _is_whole(folder, num_train + num_val):
        shutil.rmtree(folder, ignore_errors=True)  # what is left of one that was damaged
        with new_folder(folder) as draft:
            _write_zips(draft, domain, {"train": num_train, "val": num_val}, (height, width), data_seed)
    return folder


def _is_whole(folder: Path, pictures: int) -> bool:
    try:
        archives = [open_archive(folder / f"{part}_trainvaltest.zip") for part in ("leftImg8bit", "gtFine")]
    except (OSError, ValueError):
        return False
    return all(len(archive.namelist()) == pictures for archive in archives)


def _write_zips(folder: Path, domain: str, counts: dict[str, int], size: tuple[int, int], data_seed: int) -> None:
    scenes = [(split, index) for split, count in counts.items() for index in range(count)]
    with (
        ZipFile(folder / "leftImg8bit_trainvaltest.zip", "w") as images,
        ZipFile(folder / "gtFine_trainvaltest.zip", "w") as labels,
    ):
        for split, index in track(scenes, description=f"Drawing toy streets ({domain})", transient=True):
            # A stream of its own for each scene: its pixels do not depend on how many others are drawn.
            stream = (data_seed, DOMAINS.index(domain), list(counts).index(split), index)
            image, label_ids = draw_scene(np.random.default_rng(stream), size, domain)
            stem = f"{split}/{CITIES[split]}/{CITIES[split]}_{index:06d}_000019"
            _write_png(images, f"leftImg8bit/{stem}_leftImg8bit.png", image)
            _write_png(labels, f"gtFine/{stem}_gtFine_labelIds.png", label_ids)


def _write_png(archive: ZipFile, member: str, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)  # speed before bytes
    archive.writestr(ZipInfo(member), buffer.getvalue(), ZIP_STORED)  # ZipInfo's fixed date: the same bytes every time
