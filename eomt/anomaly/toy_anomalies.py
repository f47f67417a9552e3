"""Toy streets with unknown objects on the road, drawn once, in the layout of the real benchmarks."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from rich.progress import track

from eomt.anomaly.metrics import ANOMALY, IGNORED, NORMAL
from eomt.anomaly.toy_objects import draw_strangers
from eomt.data.cityscapes import TRAIN_ID_OF_ID
from eomt.data.labels import IGNORE, OUTLIER
from eomt.data.toy_scene import draw_scene

VERSION = 1  # of the drawings; part of the folder's name
STREAM = 2**20  # keeps these scenes apart from those of toy streets


def write_toy_anomalies(
    root: str | None = None, number: int = 60, size: Sequence[int] = (128, 256), seed: int = 0
) -> Path:
    """Draws the images and label maps, unless they are there.

    Args:
        root: folder to keep them in; None: `$EOMT_CACHE/toy_anomalies`, or else `~/.cache/eomt/toy_anomalies`.
        number: of images; the first eighth of them shows no unknown object.
        size: (height, width). seed: which scenes.

    Returns:
        The folder with `images/` and `labels_masks/`.
    """
    if number < 1 or seed < 0 or len(size) != 2 or min(size) < 32:
        raise ValueError(f"number {number}, size {list(size)}, seed {seed}: at least 1, 32 pixels a side, and 0")
    cache = Path(os.environ.get("EOMT_CACHE") or Path.home() / ".cache" / "eomt")
    base = Path(root).expanduser() if root else cache / "toy_anomalies"
    folder = base / f"v{VERSION}_{size[0]}x{size[1]}_{number}_seed{seed}" / "toy_anomalies"
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / ".lock"):
        if not folder.is_dir():
            draft = Path(tempfile.mkdtemp(prefix=".draft_", dir=base))
            try:
                draw(draft, number, (size[0], size[1]), seed)
                folder.parent.mkdir(exist_ok=True)
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


def draw(folder: Path, number: int, size: tuple[int, int], seed: int) -> None:
    for part in ("images", "labels_masks"):
        (folder / part).mkdir()
    for index in track(range(number), description="Drawing toy anomalies", transient=True):
        strangers = draw_strangers(np.random.default_rng((seed, STREAM, index, 1))) if index >= number // 8 else []
        image, ids = draw_scene(np.random.default_rng((seed, STREAM, index)), size, "clear", strangers)
        Image.fromarray(image).save(folder / "images" / f"toy_{index:04d}.png")
        Image.fromarray(anomaly_labels(ids)).save(folder / "labels_masks" / f"toy_{index:04d}.png")


def anomaly_labels(ids: np.ndarray) -> np.ndarray:
    """Of Cityscapes' ids and OUTLIER: pixels without a class are void, unknown objects anomalous."""
    table = np.full(256, IGNORED, np.uint8)
    for label_id, index in TRAIN_ID_OF_ID.items():
        table[label_id] = IGNORED if index == IGNORE else NORMAL
    table[OUTLIER] = ANOMALY
    return table[ids]
