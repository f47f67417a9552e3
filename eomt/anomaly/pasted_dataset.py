"""Writes a training set with objects of no class pasted on it, in the layout of Cityscapes."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from eomt.anomaly.cut_paste import CutPaste
from eomt.command_line import one_sentence
from eomt.data.cityscapes import CITYSCAPES, cityscapes
from eomt.data.datamodule import SegmentationDataModule
from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.sampler import SeededSampler
from eomt.files import replacing_folder, write_json

SHOWN = 6  # images of the preview
Draw = Callable[[Sequence[tuple[Tensor, ...]], LabelSet, Path], None]  # rows of image and labels, their classes, a PNG


def write_pasted_dataset(name: str, data: SegmentationDataModule, out: Path, seed: int, draw: Draw) -> str:
    """Writes leftImg8bit/, gtFine/ (254: outlier; validation images as they were), manifest.json and preview.png.

    Args:
        name: of the data set, for messages and the manifest.
        data: with the classes of Cityscapes, and `cut_paste`, which pastes.
        out: the folder to write, as a whole or not at all.
        seed: of the first epoch of a run, whose pasted objects these are.
        draw: writes the preview.

    Returns:
        A summary in two lines.

    Raises:
        ValueError: there is nothing to paste or to paste on, or a file is broken.
    """
    if data.cut_paste is None:
        raise ValueError("there is nothing to paste: choose cut-outs with data/cut_paste=toy, coco or folder")
    if data.classes != CITYSCAPES:
        raise ValueError(
            f"data={name} has other classes than Cityscapes, in whose layout they would be misread; paste while "
            "training instead: the same settings for train_with_lora.py"
        )
    seeds, val = sorted(SeededSampler(data.train_set, seed)), [(index, 0) for index in range(len(data.val_set))]
    with replacing_folder(out) as draft:
        pastes = write_split(Writer(draft, "train", data.train_set, data.cut_paste), seeds, data.num_workers)
        if not pastes:
            raise ValueError(
                "no object was pasted: raise data.cut_paste.probability, or set data.cut_paste.where=anywhere if the "
                "images show no road"
            )
        write_split(Writer(draft, "val", data.val_set), val, data.num_workers)
        facts = {"schema_version": 1, "data": name, "seed": seed, **data.fingerprint(), "pastes": pastes}
        write_json(draft / "manifest.json", facts)
        pasted_on = sorted({paste["image"] for paste in pastes})
        draw(*preview(draft, pasted_on), draft / "preview.png")
    return (
        f"{out}: {len(pastes)} objects on {len(pasted_on)} of {len(seeds)} training images, {len(val)} validation "
        f"images as they were\nmanifest.json lists them, preview.png shows some; train with data=cityscapes "
        f"data.root={out}"
    )


def write_split(writer: "Writer", items: Sequence[tuple[int, int]], num_workers: int) -> list[dict[str, Any]]:
    """Writes the images `(index, seed)` of a split, and returns what was pasted.

    Raises:
        ValueError: an image or a cut-out cannot be used.
    """
    loader = DataLoader(writer, batch_size=None, sampler=items, num_workers=num_workers)
    written = track(loader, f"Writing {writer.split}", len(items), transient=True, disable=not sys.stdout.isatty())
    try:
        return [paste for pastes in written for paste in pastes]
    except (ValueError, OSError) as error:  # a worker's error is its traceback
        raise ValueError(one_sentence(error)) from error


class Writer:
    """A data set whose item `(index, seed)` writes an image and its labels; the item lists the objects pasted on it."""

    def __init__(self, root: Path, split: str, dataset: SegmentationDataset, cut_paste: CutPaste | None = None) -> None:
        self.root, self.split, self.cut_paste = root, split, cut_paste
        self.dataset = dataset.with_transform(self.transform)  # which the data set seeds, as in training

    def __len__(self) -> int:
        return len(self.dataset)

    def transform(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pastes objects on an image, and remembers them for the list."""
        self.pastes = self.cut_paste.draw(labels) if self.cut_paste else []
        return self.cut_paste.apply(image, labels, self.pastes) if self.pastes else (image, labels)

    def __getitem__(self, item: tuple[int, int]) -> list[dict[str, Any]]:
        index, seed = item
        image, labels = self.dataset[item]
        sample = self.dataset.samples[index]
        original = sample.image.read()
        as_it_was = not self.pastes and original.startswith(b"\x89PNG")
        pixels = original if as_it_was else png(image.permute(1, 2, 0))
        name = sample.name.replace("/", "_")
        for part, suffix, content in (
            ("leftImg8bit", "leftImg8bit", pixels),
            ("gtFine", "gtFine_labelTrainIds", png(labels)),
        ):
            folder = self.root / part / self.split / name.split("_")[0]
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{name}_{suffix}.png", "xb") as file:
                file.write(content)
        return [{"image": name, "seed": seed, **asdict(paste)} for paste in self.pastes]


def png(pixels: Tensor) -> bytes:
    """Encodes uint8 [H, W] or [H, W, 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="PNG", compress_level=1)  # speed before bytes
    return buffer.getvalue()


def preview(root: Path, names: Sequence[str]) -> tuple[list[tuple[Tensor, Tensor]], LabelSet]:
    """Reads some of the written images and their labels as training does; returns them and their classes."""
    images = cityscapes(str(root), img_size=[64, 64], batch_size=1, num_workers=0).train_set.with_transform(None)
    chosen = names[:: max(1, len(names) // SHOWN)][:SHOWN]
    return [images[images.names.index(name)] for name in chosen], images.classes
