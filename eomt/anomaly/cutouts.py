"""Objects to paste: from COCO-style annotations, from a folder of RGBA pictures, or drawn.

Each kind's `repr` tells its settings and its content, for records and caches.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageDraw

from eomt.data.identity import file_hashes
from eomt.data.listing import list_pictures
from eomt.data.pictures import decode_picture, open_picture, to_rgb, to_rgba, upright
from eomt.files import parse_json
from eomt.toys.objects import draw_cutout

# Categories of COCO that Cityscapes has, too: an image that shows one is not used at all, for parts of it may stand
# behind the object that is cut out (Chan et al., ICCV 2021, section 4).
KNOWN_IN_COCO = (
    "person", "bicycle", "car", "motorcycle", "bus", "truck", "train", "traffic light", "stop sign",
)  # fmt: skip


@runtime_checkable
class CutOuts(Protocol):
    """Objects by number: RGBA uint8 [h, w, 4], and a name that says where one comes from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class ToyCutOuts:
    """Drawn objects, all different.

    Args:
        number: how many. seed: which.

    Raises:
        ValueError: impossible values.
    """

    number: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.number < 1 or self.seed < 0:
            raise ValueError(
                f"data.cut_paste.cutouts: number {self.number} must be 1 or more, seed {self.seed} 0 or more"
            )

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> np.ndarray:
        return draw_cutout(np.random.default_rng((self.seed, index)))

    def name(self, index: int) -> str:
        return f"drawn {self.seed}/{index}"


class FolderCutOuts:
    """PNG or WebP pictures with an alpha channel, from a folder and those in it.

    Raises:
        FileNotFoundError: the folder has none. ValueError: one is no picture, or has no alpha channel.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser()
        self.files = list_pictures(self.root, (".png", ".webp")).paths if self.root.is_dir() else []
        if not self.files:
            raise FileNotFoundError(f"{self.root} has no PNG or WebP picture to paste; give a folder of RGBA cut-outs")
        for path in self.files:
            with path.open("rb") as file:
                has_alpha = open_picture(file, str(path)).has_transparency_data
            if not has_alpha:
                raise ValueError(f"{path} has no alpha channel, so nothing in it is cut out; save it as RGBA")

    def __repr__(self) -> str:
        content = "\n".join(f"{self.name(k)} {found}" for k, found in enumerate(file_hashes(self.files)))
        return f"FolderCutOuts({str(self.root)!r}, {len(self)} pictures {digest(content.encode())})"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.files[index]
        pixels = np.asarray(to_rgba(upright(decode_picture(path.read_bytes(), str(path))), str(path)))
        if pixels[..., 3].min() == 255:
            raise ValueError(
                f"{path} is opaque all over, so nothing in it is cut out; give it a transparent "
                "background, or a border of one transparent pixel if it is meant to be a rectangle"
            )
        return trim(pixels, str(path))

    def name(self, index: int) -> str:
        return self.files[index].relative_to(self.root).as_posix()


class Instance(NamedTuple):
    """One object of COCO: its image's file and (width, height), its category and number, its outline."""

    file: str
    size: tuple[int, int]
    category: str
    number: int
    outline: list[np.ndarray] | np.ndarray


class CocoCutOuts:
    """Instances of COCO-style annotations, polygons or run lengths, in images that show nothing of known categories.

    Crowds, and instances that the image's border cuts off, are left out.

    Args:
        annotations: `instances_train2017.json`, say.
        images: the folder of its images.
        exclude: categories, by name, whose images are left out as a whole.
        min_area: pixels of an instance; smaller ones are left out.

    Raises:
        FileNotFoundError: annotations or images are missing.
        ValueError: no annotations, an unknown category to exclude, run lengths as text, or nothing is left.
    """

    def __init__(
        self, annotations: str, images: str, exclude: Sequence[str] = KNOWN_IN_COCO, min_area: float = 1000
    ) -> None:
        path, self.images = Path(annotations).expanduser(), Path(images).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of COCO annotations")
        data = path.read_bytes()
        try:
            self.instances = clean_instances(parse_json(data), exclude, min_area)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of COCO annotations: {error!r}") from error
        except ValueError as error:  # of JSON, or of clean_instances
            raise ValueError(f"{path}: {error}") from error
        self.files = sorted({instance.file for instance in self.instances})
        if missing := [file for file in self.files if not (self.images / file).is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.files)} images are not in {self.images}, the first is {missing[0]}; "
                "data.cut_paste.cutouts.images is the folder that belongs to the annotations"
            )
        self.origin = f"{path.name} {digest(data)}, exclude={list(exclude)}, min_area={min_area:g}"

    def __repr__(self) -> str:
        content = digest("\n".join(file_hashes(self.images / file for file in self.files)).encode())
        return f"CocoCutOuts({self.origin}, {len(self)} instances in images {content})"

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> np.ndarray:
        instance = self.instances[index]
        path = self.images / instance.file
        picture = to_rgb(decode_picture(path.read_bytes(), str(path)), str(path))
        if picture.size != instance.size:
            raise ValueError(
                f"{path} has {picture.size} (width, height), but was annotated at "
                f"{instance.size}; use the images that belong to the annotations"
            )
        alpha = mask_of(instance.outline, picture.size).astype(np.uint8) * 255
        return trim(np.dstack((picture, alpha)), self.name(index))

    def name(self, index: int) -> str:
        instance = self.instances[index]
        return f"{instance.file} {instance.category} {instance.number}"


def clean_instances(content: dict, exclude: Sequence[str], min_area: float) -> list[Instance]:
    """Yields the instances that may be cut out; see CocoCutOuts.

    Raises:
        KeyError: something that COCO's format has is missing. ValueError: nothing is left, and the like.
    """
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    if unknown := sorted(set(exclude) - set(categories.values())):
        raise ValueError(
            f"exclude has {unknown[0]!r}, which is no category here; correct data.cut_paste.cutouts.exclude"
        )
    images = {entry["id"]: entry for entry in content["images"]}
    shown = defaultdict(set)
    for entry in content["annotations"]:
        shown[entry["image_id"]].add(categories[entry["category_id"]])
    clean = []
    for entry in content["annotations"]:
        if shown[entry["image_id"]] & set(exclude) or entry.get("iscrowd") or entry["area"] < min_area:
            continue
        image = images[entry["image_id"]]
        (x, y, w, h), (width, height) = entry["bbox"], (image["width"], image["height"])
        if x < 1 or y < 1 or x + w > width - 1 or y + h > height - 1:
            continue
        outline = compact(entry["segmentation"], width * height)
        clean.append(
            Instance(image["file_name"], (width, height), categories[entry["category_id"]], entry["id"], outline)
        )
    if not clean:
        raise ValueError(f"no whole instance of {min_area:g} pixels or more is left after exclude={list(exclude)}")
    return clean


def compact(segmentation: list | dict, pixels: int) -> list[np.ndarray] | np.ndarray:
    """Polygons, or run lengths that add up to an image of so many pixels, in a tenth of the memory.

    Raises:
        ValueError: run lengths as text, or of another image size.
    """
    if isinstance(segmentation, list):
        return [np.asarray(polygon, dtype=np.float32) for polygon in segmentation]
    if not isinstance(segmentation["counts"], list):
        raise ValueError("run lengths as text are not read; export polygons, or counts as a list")
    counts = np.asarray(segmentation["counts"])
    if counts.sum() != pixels:
        raise ValueError(
            f"run lengths add up to {counts.sum()}, but their image has {pixels} pixels; export them again"
        )
    return counts


def mask_of(outline: list[np.ndarray] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bool [H, W] of polygons (x, y, x, y, ...) or of uncompressed run lengths; `size` is (width, height)."""
    if isinstance(outline, np.ndarray):
        values = np.arange(len(outline)) % 2  # runs of outside and inside take turns, down the columns
        return np.repeat(values, outline).reshape(size).T.astype(bool)
    mask = Image.new("1", size)
    for polygon in outline:
        ImageDraw.Draw(mask).polygon(polygon.tolist(), fill=1)
    return np.asarray(mask)


def trim(pixels: np.ndarray, name: str) -> np.ndarray:
    """RGBA [H, W, 4] without its transparent border; ValueError if nothing is visible."""
    visible = pixels[..., 3] > 0
    if not visible.any():
        raise ValueError(f"{name} is transparent all over; remove it")
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def digest(content: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(content).hexdigest()[:16]
