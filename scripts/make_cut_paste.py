"""Writes a training set with objects of no class pasted on it, in the layout of Cityscapes, and a list of them."""

import argparse
import io
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _data import open_data
from PIL import Image

if TYPE_CHECKING:  # torch is imported late: --help answers at once
    from torch import Tensor

    from eomt.anomaly.cut_paste import CutPaste
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.data.dataset import SegmentationDataset

EXAMPLES = """examples:
  python scripts/make_cut_paste.py --out pasted data=toy_streets data/cut_paste=toy
  python scripts/make_cut_paste.py --out pasted data=cityscapes data.root=/data/cs data/cut_paste=folder \\
      data.cut_paste.cutouts.root=/data/objects data.cut_paste.probability=1 data.cut_paste.match_color=true
  python scripts/make_cut_paste.py --out pasted --seed 1 data=cityscapes data.root=/data/cs data/cut_paste=coco \\
      data.cut_paste.cutouts.annotations=/data/coco/annotations/instances_train2017.json \\
      data.cut_paste.cutouts.images=/data/coco/train2017

Writes leftImg8bit/ and gtFine/ (label 254: outlier; validation images as they were), manifest.json and preview.png.
Train on it with data=cityscapes data.root=pasted. Exit code 1 if something is wrong."""
SHOWN = 6  # images of the preview


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", metavar="data=NAME data.key=value", help="as for train_with_lora.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not be there")
    parser.add_argument(
        "--seed", type=int, default=0, help="what a run with this seed meets in its first epoch (default 0)"
    )
    args = parser.parse_intermixed_args()
    try:
        if args.out.exists():
            raise FileExistsError(f"{args.out} is there already, and nothing is written over: give another --out")
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}: must be 0 or more")
        # nothing is trained here: any crop size will do, and small data sets need no full batch
        name, data = open_data(args.overrides, img_size=[64, 64], batch_size=1)
        print(make(name, data, args.out, args.seed))
    except (ValueError, OSError) as error:
        message = str(error).splitlines()[-1].removeprefix(f"{type(error).__name__}: ")  # a worker tells its traceback
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0


def make(name: str, data: "SegmentationDataModule", out: Path, seed: int) -> str:
    """Writes everything, under another name until it is complete, and sums it up."""
    from eomt.data.cityscapes import CITYSCAPES
    from eomt.data.sampler import SeededSampler

    if data.cut_paste is None:
        raise ValueError("there is nothing to paste: choose cut-outs with data/cut_paste=toy, coco or folder")
    if data.classes != CITYSCAPES:
        raise ValueError(
            f"data={name} has other classes than Cityscapes, in whose layout they would be misread; paste while "
            "training instead: the same settings for train_with_lora.py"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft_", dir=out.parent))
    try:
        seeds = sorted(SeededSampler(data.train_set, seed))
        pastes = write_split(Writer(draft, "train", data.train_set, data.cut_paste), seeds, data.num_workers)
        if not pastes:
            raise ValueError(
                "no object was pasted: raise data.cut_paste.probability, or set data.cut_paste.where=anywhere if the "
                "images show no road"
            )
        val = [(index, 0) for index in range(len(data.val_set))]
        write_split(Writer(draft, "val", data.val_set), val, data.num_workers)
        facts = {"schema_version": 1, "data": name, "seed": seed, **data.fingerprint(), "pastes": pastes}
        (draft / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
        preview(draft, sorted({paste["image"] for paste in pastes}))
        draft.chmod(0o755)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    images = len({paste["image"] for paste in pastes})
    return (
        f"{out}: {len(pastes)} objects on {images} of {len(seeds)} training images, {len(val)} validation images as "
        f"they were\nmanifest.json lists them, preview.png shows some; train with data=cityscapes data.root={out}"
    )


def write_split(writer: "Writer", items: list[tuple[int, int]], num_workers: int) -> list[dict[str, Any]]:
    """Writes the images `(index, seed)` of a split; returns what was pasted."""
    from rich.progress import track
    from torch.utils.data import DataLoader

    loader = DataLoader(writer, batch_size=None, sampler=items, num_workers=num_workers)
    written = track(loader, f"Writing {writer.split}", len(items), transient=True, disable=not sys.stdout.isatty())
    return [paste for pastes in written for paste in pastes]


class Writer:
    """Item `(index, seed)` writes an image and its labels, and is a list of the objects that were pasted on it."""

    def __init__(
        self, root: Path, split: str, dataset: "SegmentationDataset", cut_paste: "CutPaste | None" = None
    ) -> None:
        self.root, self.split, self.cut_paste = root, split, cut_paste
        self.dataset = dataset.with_transform(self.transform)  # which the data set seeds, as in training

    def __len__(self) -> int:
        return len(self.dataset)

    def transform(self, image: "Tensor", labels: "Tensor") -> tuple["Tensor", "Tensor"]:
        """Pastes, and remembers what."""
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


def png(pixels: "Tensor") -> bytes:
    """Of uint8 [H, W] or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="PNG", compress_level=1)  # speed before bytes
    return buffer.getvalue()


def preview(root: Path, names: list[str]) -> None:
    """Some of the images and their labels, as they are read for training, in `preview.png`."""
    from eomt.data.cityscapes import cityscapes
    from eomt.reporting.pictures import prediction_picture

    images = cityscapes(str(root), img_size=[64, 64], batch_size=1, num_workers=0).train_set.with_transform(None)
    chosen = names[:: max(1, len(names) // SHOWN)][:SHOWN]
    rows = [images[images.names.index(name)] for name in chosen]
    prediction_picture(rows, images.classes, root / "preview.png", columns=("image", "labels"))


if __name__ == "__main__":
    sys.exit(main())
