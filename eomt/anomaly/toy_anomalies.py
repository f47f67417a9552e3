"""Toy streets with unknown objects on the road, drawn once, in the layout of the real benchmarks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import track

from eomt.anomaly.metrics import ANOMALY, IGNORED, NORMAL
from eomt.data.cityscapes import TRAIN_ID_OF_ID
from eomt.files import cache_folder, replacing_folder
from eomt.indices import IGNORE, OUTLIER
from eomt.toys.canvas import ROAD
from eomt.toys.objects import draw_stranger
from eomt.toys.scene import draw_scene
from eomt.toys.things import Stranger

VERSION = 1  # of the drawings; part of the folder's name
PARTS = ("images", "labels_masks")
STREAM = 2**20  # keeps these scenes apart from those of toy streets
TRIES = 16  # to find a place for an object
LEAST = 0.002  # share of the image that an object must cover to be there at all
ON_ROAD = 0.8  # share of it that must hide road, and nothing else


def write_toy_anomalies(
    root: str | None = None, number: int = 60, size: Sequence[int] = (128, 256), seed: int = 0
) -> Path:
    """Draws the images and label maps, unless they are there, all of them.

    Args:
        root: folder to keep them in; None: `$EOMT_CACHE/toy_anomalies`, or else `~/.cache/eomt/toy_anomalies`.
        number: of images; the first eighth of them shows no unknown object.
        size: (height, width). seed: which scenes.

    Returns:
        The folder with `images/` and `labels_masks/`.

    Raises:
        ValueError: impossible settings.
    """
    check_settings(number, size, seed)
    base = Path(root).expanduser() if root else cache_folder("toy_anomalies")
    folder = base / f"v{VERSION}_{size[0]}x{size[1]}_{number}_seed{seed}" / "toy_anomalies"
    if not is_whole(folder, number):
        base.mkdir(parents=True, exist_ok=True)
        with FileLock(base / ".lock"):
            if not is_whole(folder, number):  # now that nobody else is drawing
                with replacing_folder(folder) as draft:
                    draw(draft, number, (size[0], size[1]), seed)
    return folder


def is_whole(folder: Path, number: int) -> bool:
    """Whether every picture is there; an empty file is none."""
    files = (folder / part / file_name(index) for part in PARTS for index in range(number))
    return all(file.is_file() and file.stat().st_size for file in files)


def file_name(index: int) -> str:
    return f"toy_{index:04d}.png"


def check_settings(number: int, size: Sequence[int], seed: int) -> None:
    """Raises ValueError where no images can be made of them."""
    for name, value, least in (("number", number, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"data.{name}={value} must be a whole number from {least} on")
    sides = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else [size]
    if len(sides) != 2 or not all(type(side) is int and side >= 32 for side in sides):
        raise ValueError(f"data.size={size} must be [height,width] of at least 32 pixels each")


def draw(folder: Path, number: int, size: tuple[int, int], seed: int) -> None:
    """Writes all images and label maps."""
    for part in PARTS:
        (folder / part).mkdir()
    console = Console(stderr=True)
    indices = range(number)
    for index in track(
        indices, "Drawing toy anomalies", console=console, transient=True, disable=not console.is_terminal
    ):
        image, ids = draw_street((seed, STREAM, index), size, with_strangers=index >= number // 8)
        Image.fromarray(image).save(folder / "images" / file_name(index))
        Image.fromarray(anomaly_labels(ids)).save(folder / "labels_masks" / file_name(index))


def draw_street(stream: tuple[int, ...], size: tuple[int, int], with_strangers: bool) -> tuple[np.ndarray, np.ndarray]:
    """A scene, uint8 [H, W, 3], and its label ids, uint8 [H, W], with one to three unknown objects on its road.

    Each stands where it can be seen: alone, it hides road and hardly anything else.
    """

    def scene(strangers: Sequence[Stranger]) -> tuple[np.ndarray, np.ndarray]:
        return draw_scene(np.random.default_rng(stream), size, "clear", strangers)

    rng = np.random.default_rng((*stream, 1))
    image, ids = scene([])
    standing: list[Stranger] = []
    wanted = int(rng.integers(1, 4)) if with_strangers else 0
    for _ in range(TRIES):
        if len(standing) == wanted:
            break
        stranger = draw_stranger(rng)
        covered = ids[scene([stranger])[1] == OUTLIER]
        if len(covered) >= LEAST * ids.size and (covered == ROAD).mean() >= ON_ROAD:
            standing.append(stranger)
    return scene(standing) if standing else (image, ids)


def anomaly_labels(ids: np.ndarray) -> np.ndarray:
    """Maps Cityscapes' ids and OUTLIER to labels: pixels without a class are void, unknown objects anomalous."""
    table = np.full(256, IGNORED, np.uint8)
    for label_id, index in TRAIN_ID_OF_ID.items():
        table[label_id] = IGNORED if index == IGNORE else NORMAL
    table[OUTLIER] = ANOMALY
    return table[ids]
