"""Anomaly benchmarks: where each lies, how its labels read, which region they cover, and how components are judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eomt.anomaly.components import ANOMALY_TRACK, OBSTACLE_TRACK, Track
from eomt.anomaly.metrics import ANOMALY, IGNORED, NORMAL
from eomt.suggestions import did_you_mean

STANDARD = {0: NORMAL, 1: ANOMALY, 255: IGNORED}
WITHOUT_VOID = {0: NORMAL, 2: ANOMALY}


@dataclass(frozen=True)
class Benchmark:
    """A data set's convention.

    title: what tables call it. folders: where it may lie under the root, the course's layout first, then the official.
    labels: what each value of its label maps means; any other is an error. region: what is not ignored.
    track: how its components are judged.
    export_name: the name under which the SegmentMeIfYouCan benchmark looks for score maps.
    """

    title: str
    folders: tuple[str, ...]
    labels: Mapping[int, int]
    region: str
    track: Track
    export_name: str


BENCHMARKS = {
    "road_anomaly_21": Benchmark(
        title="RoadAnomaly21",
        folders=("RoadAnomaly21", "dataset_AnomalyTrack"),
        labels=STANDARD,
        region="all but void",
        track=ANOMALY_TRACK,
        export_name="AnomalyTrack-all",
    ),
    "road_obstacle_21": Benchmark(
        title="RoadObstacle21",
        folders=("RoadObsticle21", "RoadObstacle21", "dataset_ObstacleTrack"),
        labels=STANDARD,
        region="the road and what lies on it",
        track=OBSTACLE_TRACK,
        export_name="ObstacleTrack-all",
    ),
    "fs_lost_and_found": Benchmark(
        title="FS L&F",
        folders=("FS_LostFound_full",),
        labels=STANDARD,
        region="all but void",
        track=ANOMALY_TRACK,
        export_name="FishyLAFAnomaly-val",
    ),
    "fs_static": Benchmark(
        title="FS Static",
        folders=("fs_static", "FS_Static"),
        labels=STANDARD,
        region="all but void",
        track=ANOMALY_TRACK,
        export_name="FishyscapesStatic-val",
    ),
    "road_anomaly": Benchmark(
        title="Road Anomaly",
        folders=("RoadAnomaly",),
        labels=WITHOUT_VOID,
        region="the whole image",
        track=ANOMALY_TRACK,
        export_name="RoadAnomaly-test",
    ),
    "toy_anomalies": Benchmark(
        title="Toy anomalies",
        folders=("toy_anomalies",),
        labels=STANDARD,
        region="all but void",
        track=OBSTACLE_TRACK,
        export_name="ToyAnomalies-val",
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """Returns the benchmark of this name; raises ValueError where there is none."""
    if name not in BENCHMARKS:
        hint = did_you_mean(str(name), BENCHMARKS) or f"; choose from {', '.join(BENCHMARKS)}"
        raise ValueError(f"data={name} is no anomaly benchmark{hint}")
    return BENCHMARKS[name]


def find_folder(root: Path, benchmark: Benchmark) -> Path:
    """Returns the folder with `images/` and `labels_masks/`.

    Raises:
        FileNotFoundError: there is none.
    """
    places = [*(root / folder for folder in benchmark.folders), root]
    for place in places:
        if (place / "images").is_dir() and (place / "labels_masks").is_dir():
            return place
    raise FileNotFoundError(
        f"{benchmark.title} needs {places[0]}/images and {places[0]}/labels_masks; give their data.root"
    )


def benchmarks_below(root: str | Path) -> list[str]:
    """Returns the names of the benchmarks that lie below a folder; raises FileNotFoundError where there are none."""
    places = {name: [Path(root).expanduser() / folder for folder in BENCHMARKS[name].folders] for name in BENCHMARKS}
    names = [name for name in places if any((place / "labels_masks").is_dir() for place in places[name])]
    if not names:
        folders = ", ".join(benchmark.folders[0] for benchmark in BENCHMARKS.values())
        raise FileNotFoundError(f"{root} holds none of {folders}, each with images/ and labels_masks/")
    return names
