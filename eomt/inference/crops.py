"""Crops of real images to compare a network with itself on, before and after it is merged or exported."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eomt.data.listing import list_pictures, match_pictures
from eomt.files import PICTURES
from eomt.settings.compose import check_data_for, data_of_run

if TYPE_CHECKING:  # mistakes are told before torch is there
    from torch import Tensor

CROPS = 4


def check_images(images: Sequence[str] | None, run: Path) -> list[Path]:
    """Returns the pictures that are named; without any, checks the run's data as far as it can be done without torch.

    Raises:
        ValueError, FileNotFoundError: there is nothing to compare on.
    """
    if images:
        return find_images(images)
    try:
        check_data_for(run, ())
    except (ValueError, OSError) as error:
        raise ValueError(f"the run's validation data cannot be read ({error}): give --images") from error
    return []


def crops_or_drawings(pictures: Sequence[Path], run: Path, img_size: Sequence[int]) -> "tuple[list[Tensor], str]":
    """Reads the crops of `read_crops`, or draws toy streets where no picture is named and a run has no data here.

    Returns:
        The crops uint8 [3, h, w], and what they are of.
    """
    try:
        return read_crops(pictures, run, img_size), "--images" if pictures else "the run's validation images"
    except (ValueError, OSError):
        if pictures:
            raise
        return draw_crops(img_size), "drawn toy streets, since no --images are given and no run's data are here"


def draw_crops(img_size: Sequence[int]) -> "list[Tensor]":
    """Draws the first evaluation window, uint8 [3, h, w], of `CROPS` toy streets."""
    import numpy as np
    import torch

    from eomt.inference.windows import to_windows
    from eomt.toys.scene import draw_scene

    scenes = [draw_scene(np.random.default_rng(k), (128, 256), "clear")[0] for k in range(CROPS)]
    return [to_windows(torch.from_numpy(scene).permute(2, 0, 1), tuple(img_size))[0][0] for scene in scenes]


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Returns the pictures that folders hold or patterns name; raises FileNotFoundError if there are none."""
    names = [Path(pattern).expanduser() for pattern in patterns]
    found = [list_pictures(name) if name.is_dir() else match_pictures(name) for name in names]
    pictures = sorted({path for listing in found for path in listing.paths})
    if not pictures:
        raise FileNotFoundError(f"--images {' '.join(patterns)}: no pictures there ({', '.join(PICTURES)})")
    return pictures


def read_crops(pictures: Sequence[Path], run: Path, img_size: Sequence[int]) -> "list[Tensor]":
    """Reads the first evaluation window, uint8 [3, h, w], of up to `CROPS` pictures or of the run's validation images.

    Raises:
        ValueError: there is no such picture.
    """
    from eomt.inference.prediction import read_image
    from eomt.inference.windows import to_windows

    if pictures:
        images = [read_image(path) for path in spread(pictures)]
    else:
        try:
            _, data = data_of_run(run)
        except (ValueError, OSError) as error:
            raise ValueError(f"the run's validation data cannot be read ({error}): give --images") from error
        images = [data.val_set.image(i) for i in spread(range(len(data.val_set)))]
    return [to_windows(image, tuple(img_size))[0][0] for image in images]


def spread(items: Sequence) -> list:
    """Returns up to `CROPS` items, evenly spread over all of them."""
    return list(items[:: max(1, len(items) // CROPS)][:CROPS])
