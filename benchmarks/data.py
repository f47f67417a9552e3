"""The data path: training samples per second of one loader process, and opening Cityscapes' zips."""

import io
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from benchmarks.bench import Case, Work, bandwidth
from eomt.data.cityscapes import CITYSCAPES, TRAIN_ID_OF_ID, cityscapes
from eomt.data.dataset import SegmentationDataset
from eomt.data.sources import IndexDecoder, Sample, Source
from eomt.data.transforms import TrainTransform
from eomt.indices import IGNORE
from eomt.toys.scene import draw_scene

SIZE = (1024, 2048)
CROP = (1024, 1024)
PICTURES, SAMPLES = 4, 32
SPLITS = {"train": 2975, "val": 500}


def cases(device: str) -> list[Case]:
    facts: dict[str, Any] = {"samples": SAMPLES}
    data = Case(
        "data",
        f"data: {SAMPLES} samples, {SIZE[1]}x{SIZE[0]} PNG to a {CROP[1]}x{CROP[0]} crop with jitter, 1 thread",
        peer="plain recipe",
        build_peer=lambda device: one_thread(build_plain()),
        build_ours=lambda device: one_thread(build_ours(facts)),
        check=same_samples,
        speed_target=3.0,
        rounds=5,
        devices=("cpu",),
        floor=lambda: statistics.median(facts["decoding_seconds"]),
        facts=facts,
    )
    zips = Case(
        "zips",
        f"opening the Cityscapes zips, {sum(SPLITS.values()):,} images",
        peer="plain recipe: every label decoded (tiny ones here)",
        build_peer=lambda device: build_plain_opening(),
        build_ours=lambda device: build_opening(),
        check=same_names,
        devices=("cpu",),
        floor=lambda: directory_bytes() / bandwidth(device),
        absolute_seconds=2.0,
    )
    return [data, zips]


def one_thread(work: Work) -> Work:
    """The work as a loader process does it."""

    def alone() -> Any:
        with threads(1):
            return work()

    return alone


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- samples ------------------------------------------------------------------------------------------------------


@cache
def pictures() -> tuple[tempfile.TemporaryDirectory, list[Sample]]:
    """Toy streets at Cityscapes' size, blurred as by a lens to PNGs of 2.2 to 2.6 MB, like Cityscapes' own."""
    folder = tempfile.TemporaryDirectory()
    samples = []
    for index in range(PICTURES):
        image, label_ids = draw_scene(np.random.default_rng(index), SIZE, "clear")
        paths = [Path(folder.name) / f"{index}_{part}.png" for part in ("image", "labels")]
        Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.9)).save(paths[0])
        Image.fromarray(label_ids).save(paths[1])
        samples.append(Sample(str(index), *(Source(str(path)) for path in paths)))
    return folder, samples


def build_ours(facts: dict[str, Any]) -> Work:
    """Notes beside each round's samples what reading and decoding alone took: the floor of what follows them."""
    augment, rounds = TrainTransform(CROP), facts.setdefault("decoding_seconds", [])

    def timed(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        crop = augment(image, labels)
        rounds[-1] -= time.perf_counter() - start
        return crop

    dataset = SegmentationDataset(pictures()[1], CITYSCAPES, IndexDecoder(TRAIN_ID_OF_ID, "draw it again"), timed)
    facts["picture_bytes"] = [Path(sample.image.path).stat().st_size for sample in dataset.samples]

    def work() -> list[tuple[Tensor, Tensor]]:
        rounds.append(0.0)
        start = time.perf_counter()
        samples = [dataset[seed % PICTURES, seed] for seed in range(SAMPLES)]
        rounds[-1] += time.perf_counter() - start
        return samples

    return work


def build_plain() -> Work:
    samples = pictures()[1]
    return lambda: [plain_sample(samples[seed % PICTURES], seed) for seed in range(SAMPLES)]


class Draws(NamedTuple):
    """What is random in a sample, the place of the crop as shares of the room that it has."""

    flip: bool
    scale: float
    adjustments: list[tuple[Any, float]]
    generator: torch.Generator

    def place(self, room: int) -> int:
        return int(torch.randint(0, room + 1, (), generator=self.generator))


def draw(seed: int) -> Draws:
    """The same draws as ours, in the same order."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def coin() -> bool:
        return uniform(0, 1) < 0.5

    flip, scale = coin(), uniform(0.5, 2.0)
    adjustments = []

    def maybe(adjust: Any, center: float, reach: float) -> None:
        if coin():
            adjustments.append((adjust, uniform(center - reach, center + reach)))

    maybe(F.adjust_brightness, 1, 32 / 255)
    contrast_second = coin()
    if contrast_second:
        maybe(F.adjust_contrast, 1, 0.5)
    maybe(F.adjust_saturation, 1, 0.5)
    maybe(F.adjust_hue, 0, 18 / 360)
    if not contrast_second:
        maybe(F.adjust_contrast, 1, 0.5)
    return Draws(flip, scale, adjustments, generator)


def plain_sample(sample: Sample, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """Decoded, a boolean mask for each class, and augmented."""
    image = F.pil_to_tensor(Image.open(sample.image.path).convert("RGB"))
    ids = F.pil_to_tensor(Image.open(sample.label.path))[0]
    present = [i for i in ids.unique().tolist() if TRAIN_ID_OF_ID[i] != IGNORE]
    masks = torch.stack([ids == i for i in present])  # bool [K, H, W]
    return plain_augmentation(image, masks, [TRAIN_ID_OF_ID[i] for i in present], seed, CROP)


def plain_augmentation(
    image: Tensor, masks: Tensor, classes: list[int], seed: int, crop: tuple[int, int]
) -> tuple[Tensor, Tensor, list[int]]:
    """The published order: colours of the whole image, flip, resize, pad, crop; image, masks and classes shown."""
    draws = draw(seed)
    for adjust, factor in draws.adjustments:
        image = adjust(image, factor)
    if draws.flip:
        image, masks = F.horizontal_flip(image), F.horizontal_flip(masks)
    height, width = image.shape[1:]
    scale = min(crop[0] / height, crop[1] / width) * draws.scale
    size = [int(height * scale), int(width * scale)]
    image = F.resize(image, size, InterpolationMode.BILINEAR, antialias=True)
    masks = F.resize(masks, size, InterpolationMode.NEAREST)
    padding = [0, 0, max(0, crop[1] - size[1]), max(0, crop[0] - size[0])]
    image, masks = F.pad(image, padding), F.pad(masks, padding)
    top, left = draws.place(image.shape[1] - crop[0]), draws.place(image.shape[2] - crop[1])
    image, masks = F.crop(image, top, left, *crop), F.crop(masks, top, left, *crop)
    shown = masks.flatten(1).any(1)
    return image, masks[shown], [c for c, is_shown in zip(classes, shown.tolist(), strict=True) if is_shown]


def same_samples(plain: list[Any], ours: list[Any]) -> str:
    """Labels must be equal, images alike: the plain recipe changes colours before it resizes."""
    differences = []
    for (plain_image, masks, classes), (image, labels) in zip(plain, ours, strict=True):
        if set(labels.unique().tolist()) - {IGNORE} != set(classes):
            raise AssertionError("The two sides show different classes.")
        for mask, index in zip(masks, classes, strict=True):
            if not torch.equal(labels == index, mask):
                raise AssertionError(f"The masks of class {index} differ.")
        differences.append((plain_image.int() - image.int()).abs().float().mean().item())
    if max(differences) > 1:
        raise AssertionError(f"Images differ by {max(differences):.2f} gray levels on average, 1 is allowed.")
    return f"labels equal, images within {max(differences):.2f} gray levels on average"


# --- zips ---------------------------------------------------------------------------------------------------------


@cache
def zips() -> tempfile.TemporaryDirectory:
    """Both archives in the official layout, each member but the JSON a tiny PNG."""
    folder = tempfile.TemporaryDirectory()
    picture, labels = (png(np.full((16, 32, *channels), 7, np.uint8)) for channels in ((3,), ()))
    order = random.Random(0)
    with (
        ZipFile(Path(folder.name) / "leftImg8bit_trainvaltest.zip", "w") as images,
        ZipFile(Path(folder.name) / "gtFine_trainvaltest.zip", "w") as annotations,
    ):
        for split, number in SPLITS.items():
            for index in range(number):
                city = f"city{order.randrange(18):02d}"
                stem = f"{split}/{city}/{city}_{index:06d}_000019"
                images.writestr(f"leftImg8bit/{stem}_leftImg8bit.png", picture)
                for kind in ("color", "instanceIds", "labelIds"):
                    annotations.writestr(f"gtFine/{stem}_gtFine_{kind}.png", labels)
                annotations.writestr(f"gtFine/{stem}_gtFine_polygons.json", "{}")
    return folder


def directory_bytes() -> int:
    """Of what lists the archives' members, at their ends: all that opening has to read."""
    size = 0
    for path in Path(zips().name).glob("*.zip"):
        with ZipFile(path) as archive:
            size += path.stat().st_size - archive.start_dir
    return size


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def build_opening() -> Work:
    rounds, archives = count(), Path(zips().name)

    def open_anew() -> list[list[str]]:
        root = archives / f"round_{next(rounds)}"  # another path: archives that are open stay open in a process
        root.symlink_to(archives)
        data = cityscapes(str(root), img_size=CROP)
        return [data.train_set.names, data.val_set.names]

    return open_anew


def build_plain_opening() -> Work:
    archives = Path(zips().name)

    def open_and_decode() -> list[list[str]]:
        found: dict[str, list[str]] = {split: [] for split in SPLITS}
        with (
            ZipFile(archives / "leftImg8bit_trainvaltest.zip") as images,
            ZipFile(archives / "gtFine_trainvaltest.zip") as annotations,
        ):
            for member in sorted(images.namelist()):
                _, split, city, file = member.split("/")
                name = file.removesuffix("_leftImg8bit.png")
                with annotations.open(f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png") as label:
                    Image.open(label).getextrema()  # for an image without labels is left out
                found[split].append(name)
        return list(found.values())

    return open_and_decode


def same_names(plain: list[list[str]], ours: list[list[str]]) -> str:
    if plain != ours:
        raise AssertionError("The two sides found different images.")
    return f"the same {len(ours[0]):,} + {len(ours[1]):,} images"
