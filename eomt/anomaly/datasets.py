"""Images of anomaly benchmarks with maps that say which pixels show something unknown."""

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from eomt.anomaly.benchmarks import find_benchmark, find_folder
from eomt.data.dataset import SegmentationDataset
from eomt.data.identity import fingerprint
from eomt.data.labels import LabelSet
from eomt.data.listing import list_pictures
from eomt.data.sources import IndexDecoder, Sample, Source

KINDS = LabelSet(("normal", "anomalous"), ((110, 110, 120), (255, 120, 0)))


class AnomalyDataset(Dataset):
    """Images uint8 [3, H, W] of any size, and labels uint8 [H, W]: 0 normal, 1 anomalous, 255 ignored.

    Its length is the number of images with labels, whose names are `frames`. A benchmark keeps the labels of its test
    images to itself: those images are `unlabelled`, and follow behind in `image`.

    Args:
        root: the folder that holds the data set's folder, or that folder itself.
        name: a key of `BENCHMARKS`.

    Raises:
        FileNotFoundError: no folder with `images/` and `labels_masks/`, no label map, or one without its image.
        ValueError: an unknown name, or two files for one image.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        self.name, self.benchmark = name, find_benchmark(name)
        self.folder = find_folder(Path(root).expanduser(), self.benchmark)
        images = by_frame(self.folder / "images")
        labels = by_frame(self.folder / "labels_masks")
        if lonely := sorted(labels.keys() - images.keys()):
            raise FileNotFoundError(f"{labels[lonely[0]]} has no image {self.folder}/images/{lonely[0]}.*")
        if not labels:
            raise FileNotFoundError(f"{self.folder}/labels_masks has no label map, so there is nothing to measure")
        self.frames = sorted(labels)
        self.unlabelled = sorted(images.keys() - labels.keys())
        wanted = self.folder / "labels_masks"
        self.pairs = SegmentationDataset(
            [
                Sample(frame, Source(str(images[frame])), Source(str(labels.get(frame, wanted / f"{frame}.png"))))
                for frame in (*self.frames, *self.unlabelled)
            ],
            KINDS,
            IndexDecoder(
                self.benchmark.labels,
                f"{self.benchmark.title} has {', '.join(map(str, self.benchmark.labels))} only: "
                "this is another data set's file, or was exported otherwise",
            ),
        )

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError where a label is none of the data set's, the sizes differ, or a file is broken."""
        return self.pairs[range(len(self))[index]]

    def image(self, index: int) -> Tensor:
        """The image alone; indices from the length on are those of `unlabelled`."""
        return self.pairs.image(index)

    def labels(self, index: int) -> Tensor:
        """The label map alone."""
        return self.pairs.labels(index)

    def check(self) -> None:
        """Reads every label map.

        Raises:
            ValueError: labels that are not the data set's, of which the first is explained and the others are named;
                nothing anomalous or nothing normal in all of them.
        """
        kinds: set[int] = set()
        wrong: dict[str, str] = {}
        for index, frame in enumerate(self.frames):
            try:
                kinds |= set(self.labels(index).unique().tolist())
            except (ValueError, OSError) as error:
                wrong[frame] = str(error)
        if wrong:
            first, *others = wrong
            further = f"; {len(others)} more cannot be used: {', '.join(others)}" if others else ""
            raise ValueError(f"{wrong[first]}{further}")
        for value, kind in enumerate(KINDS.names):
            if value not in kinds:
                raise ValueError(f"{self.folder}/labels_masks shows nothing {kind}: there is nothing to tell apart")

    def fingerprint(self, labels: bool = True) -> str:
        """Whether two runs saw the same images and labels, or images alone; see `eomt.data.identity.fingerprint`."""
        labelled = len(self) if labels else 0
        return fingerprint(
            [
                (sample.name, (sample.image, sample.label) if index < labelled else (sample.image,))
                for index, sample in enumerate(self.pairs.samples)
            ]
        )


def by_frame(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by the frame that they show; the official labels end in `_labels_semantic.png`.

    The official archives also hold labels in colours, which say nothing more.
    """
    files: dict[str, Path] = {}
    for path in list_pictures(folder, deep=False).paths:
        if path.stem.endswith("_semantic_color"):
            continue
        frame = path.stem.removesuffix("_labels_semantic")
        if frame in files:
            raise ValueError(f"{files[frame]} and {path} are two files for one frame: take one away")
        files[frame] = path
    return files
