"""Objects to paste: from COCO-style annotations, from a folder of RGBA pictures, or drawn."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

from eomt.anomaly.toy_objects import draw_cutout

# Categories of COCO that Cityscapes has, too: an image that shows one is not used at all, for parts of it may stand
# behind the object that is cut out (Chan et al., ICCV 2021, section 4).
KNOWN_IN_COCO = (
    "person", "bicycle", "car", "motorcycle", "bus", "truck", "train", "traffic light", "stop sign",
)  # fmt: skip


class CutOuts(Protocol):
    """Objects by number: RGBA uint8 [h, w, 4], and a name that says where one comes from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def name(self, index: int) -> str: ...


class ToyCutOuts:
    """Drawn objects, all different.

    Args:
        number: how many. seed: which.
    """

    def __init__(self, number: int = 200, seed: int = 0) -> None:
        self.number, self.seed = number, seed

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> np.ndarray:
        return draw_cutout(np.random.default_rng((self.seed, index)))

    def name(self, index: int) -> str:
        return f"drawn {self.seed}/{index}"


class FolderCutOuts:
    """PNG or WebP pictures with an alpha channel, from a folder and those in it.

    Raises:
        FileNotFoundError: the folder has none. ValueError: a picture has no alpha channel (when it is used).
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser()
        self.files = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in (".png", ".webp"))
        if not self.files:
            raise FileNotFoundError(f"{self.root} has no PNG or WebP picture to paste; give a folder of RGBA cut-outs")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        picture = Image.open(self.files[index])
        if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
            raise ValueError(f"{self.files[index]} has mode {picture.mode}: a cut-out needs an alpha channel (RGBA)")
        return trim(np.asarray(picture.convert("RGBA")), self.name(index))

    def name(self, index: int) -> str:
        return str(self.files[index].relative_to(self.root))


class CocoCutOuts:
    """Instances of COCO-style annotations, polygons or run lengths, in images that show nothing of known categories.

    Args:
        annotations: `instances_train2017.json`, say. images: the folder of its images.
        exclude: categories, by name, whose images are left out.
        min_area: pixels of an instance; smaller ones are left out, and crowds always are.

    Raises:
        FileNotFoundError: no such file. ValueError: an unknown category to exclude, or nothing is left.
    """

    def __init__(
        self, annotations: str, images: str, exclude: Sequence[str] = KNOWN_IN_COCO, min_area: float = 1000
    ) -> None:
        path, self.images = Path(annotations).expanduser(), Path(images).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of COCO annotations")
        content = json.loads(path.read_text())
        self.categories = {entry["id"]: entry["name"] for entry in content["categories"]}
        if unknown := sorted(set(exclude) - set(self.categories.values())):
            raise ValueError(f"exclude: {path.name} has no category {unknown[0]!r}; its names are exact")
        self.files = {entry["id"]: entry["file_name"] for entry in content["images"]}
        shown = defaultdict(set)
        for instance in content["annotations"]:
            shown[instance["image_id"]].add(self.categories[instance["category_id"]])
        clean = {image for image, names in shown.items() if not names & set(exclude)}
        self.instances = [
            instance
            for instance in content["annotations"]
            if instance["image_id"] in clean and not instance.get("iscrowd") and instance["area"] >= min_area
        ]
        if not self.instances:
            raise ValueError(
                f"{path.name}: no instance of {min_area:g} pixels or more is left after exclude={list(exclude)}"
            )

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> np.ndarray:
        instance = self.instances[index]
        picture = Image.open(self.images / self.files[instance["image_id"]]).convert("RGB")
        mask = mask_of(instance["segmentation"], picture.size)
        return trim(np.dstack((np.asarray(picture), 255 * mask)).astype(np.uint8), self.name(index))

    def name(self, index: int) -> str:
        instance = self.instances[index]
        return f"{self.files[instance['image_id']]} {self.categories[instance['category_id']]} {instance['id']}"


def mask_of(segmentation: list | dict, size: tuple[int, int]) -> np.ndarray:
    """Bool [H, W] of a COCO segmentation, polygons or uncompressed run lengths; `size` is (width, height)."""
    if isinstance(segmentation, list):
        mask = Image.new("1", size)
        for polygon in segmentation:
            ImageDraw.Draw(mask).polygon(polygon, fill=1)
        return np.asarray(mask)
    counts = segmentation["counts"]
    if not isinstance(counts, list):
        raise ValueError("compressed run lengths are not read; export polygons, or counts as a list")
    values = np.arange(len(counts)) % 2  # runs of outside and inside take turns, down the columns
    return np.repeat(values, counts).reshape(size).T.astype(bool)


def trim(pixels: np.ndarray, name: str) -> np.ndarray:
    """RGBA [H, W, 4] without its transparent border."""
    visible = pixels[..., 3] > 0
    if not visible.any():
        raise ValueError(f"{name} is transparent all over: take it out")
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
