"""Anomaly benchmarks: images with maps that say which pixels show something unknown.

A registry says of each data set where it lies, how its labels read, and on which track its components are judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from eomt.anomaly.components import ANOMALY_TRACK, OBSTACLE_TRACK, Track
from eomt.anomaly.metrics import ANOMALY, IGNORED, NORMAL

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
STANDARD = {0: NORMAL, 1: ANOMALY, 255: IGNORED}  # 255: outside the region of interest, or void


@dataclass(frozen=True)
class Benchmark:
    """A data set's convention.

    title: what tables call it. folders: where it may lie under the root, the course's layout first.
    labels: what each value of its label maps means; any other is an error. track: how its components are judged.
    export_name: the name under which the SegmentMeIfYouCan benchmark expects score maps.
    """

    title: str
    folders: tuple[str, ...]
    labels: Mapping[int, int]
    track: Track
    export_name: str


BENCHMARKS = {
    "road_anomaly_21": Benchmark(
        "RoadAnomaly21", ("RoadAnomaly21", "dataset_AnomalyTrack"), STANDARD, ANOMALY_TRACK, "AnomalyTrack-all"
    ),
    "road_obstacle_21": Benchmark(
        "RoadObstacle21",
        ("RoadObsticle21", "RoadObstacle21", "dataset_ObstacleTrack"),
        STANDARD,
        OBSTACLE_TRACK,
        "ObstacleTrack-all",
    ),
    "fs_lost_and_found": Benchmark(
        "FS L&F", ("FS_LostFound_full", "dataset_FishyLAF"), STANDARD, ANOMALY_TRACK, "FishyLAFAnomaly-val"
    ),
    "fs_static": Benchmark("FS Static", ("fs_static", "FS_Static"), STANDARD, ANOMALY_TRACK, "FishyscapesStatic-val"),
    "road_anomaly": Benchmark(
        "Road Anomaly", ("RoadAnomaly",), {0: NORMAL, 2: ANOMALY}, ANOMALY_TRACK, "RoadAnomaly-test"
    ),
    "toy_anomalies": Benchmark("Toy anomalies", ("toy_anomalies",), STANDARD, OBSTACLE_TRACK, "ToyAnomalies-val"),
}


class AnomalyDataset(Dataset):
    """Images uint8 [3, H, W] of any size, and labels uint8 [H, W]: 0 normal, 1 anomalous, 255 ignored.

    Args:
        root: the folder that holds the data set's folder, or that folder itself.
        name: a key of `BENCHMARKS`.

    Raises:
        FileNotFoundError: no folder with `images/` and `labels_masks/`, or a label map without its image.
        ValueError: an unknown name.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        if name not in BENCHMARKS:
            raise ValueError(f"{name!r} is no benchmark; choose from {', '.join(BENCHMARKS)}")
        self.name, self.benchmark = name, BENCHMARKS[name]
        root = Path(root).expanduser()
        places = [root / folder for folder in self.benchmark.folders] + [root]
        self.folder = next((place for place in places if (place / "labels_masks").is_dir()), None)
        if self.folder is None:
            raise FileNotFoundError(
                f"{self.benchmark.title} needs {places[0]}/images and {places[0]}/labels_masks, which are not there"
            )
        images = {path.stem: path for path in sorted((self.folder / "images").glob("*")) if path.suffix in PICTURES}
        labels = {frame_of(path): path for path in sorted((self.folder / "labels_masks").glob("*.png"))}
        labels.pop(None, None)
        self.frames = sorted(images.keys() & labels.keys())
        if lonely := sorted(labels.keys() - images.keys()):
            raise FileNotFoundError(f"{labels[lonely[0]]} has no image {self.folder}/images/{lonely[0]}.*")
        if not self.frames:
            raise FileNotFoundError(f"{self.folder} has no image with a label map, so there is nothing to measure")
        self.files = [(images[frame], labels[frame]) for frame in self.frames]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError where a label is none of the data set's, or the sizes differ."""
        image_file, label_file = self.files[index]
        image = torch.from_numpy(np.array(Image.open(image_file).convert("RGB"))).permute(2, 0, 1)
        labels = self.read_labels(label_file)
        if image.shape[1:] != labels.shape:
            raise ValueError(f"{image_file} is {tuple(image.shape[1:])}, {label_file} {tuple(labels.shape)} (h, w)")
        return image, labels

    def read_labels(self, path: Path) -> Tensor:
        """0, 1 and 255 from the data set's own values."""
        values = np.asarray(Image.open(path))
        if values.ndim != 2:
            raise ValueError(f"{path} must have a single channel of label values, it has shape {values.shape}")
        meaning = self.benchmark.labels
        if strange := sorted(set(np.unique(values).tolist()) - set(meaning)):
            raise ValueError(
                f"{path} has the value {strange[0]}, {self.benchmark.title} has {sorted(meaning)} only: "
                "it is another data set's file, or was exported otherwise"
            )
        table = np.zeros(256, np.uint8)
        for value, kind in meaning.items():
            table[value] = kind
        return torch.from_numpy(table[values])


def frame_of(path: Path) -> str | None:
    """The image that a label file belongs to; None for the coloured copies in the official archives."""
    if path.stem.endswith("_color"):
        return None
    return path.stem.removesuffix("_labels_semantic")
