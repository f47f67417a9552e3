"""Reads every file of a dataset once and reports what is in it: counts, sizes, class shares, broken files, pictures."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _data import datasets_known, open_data

if TYPE_CHECKING:  # torch and matplotlib are imported late: --help answers at once
    from torch import Tensor

    from eomt.data.dataset import SegmentationDataset

EXAMPLES = """examples:
  python scripts/dataset_report.py data=toy_streets
  python scripts/dataset_report.py data=toy_streets data.domain=night_fog --split val
  python scripts/dataset_report.py data=cityscapes data.root=/data/cityscapes data.num_workers=8
  python scripts/dataset_report.py data=camvid data.root=/data/camvid data.sequences=[0001TP] data.val_share=0.4

Writes report.md, counts.json and grid.png. Exit code 1 if a file is broken, 2 if the dataset cannot be read at all."""


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        # nothing is trained here: any crop size will do, and small datasets need no full batch
        name, datamodule = open_data(args.overrides, img_size=[64, 64], batch_size=1)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(args.out or f"outputs/dataset_report/{name}")
    out.mkdir(parents=True, exist_ok=True)
    datasets = {"train": datamodule.train_set.with_transform(None), "val": datamodule.val_set}
    chosen = {split: dataset for split, dataset in datasets.items() if args.split in (split, "all")}
    reports = {split: examine(split, dataset, datamodule.num_workers) for split, dataset in chosen.items()}
    show(name, reports)
    (out / "counts.json").write_text(json.dumps({"data": name, "splits": reports}, indent=2) + "\n")
    (out / "report.md").write_text(markdown(name, reports))
    draw_grid(chosen, reports, out / "grid.png")
    print(f"Wrote report.md, counts.json and grid.png to {out}")
    return 1 if any(report["broken"] for report in reports.values()) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", metavar="data=NAME data.key=value", help="as for train_with_lora.py")
    parser.add_argument("--out", help="folder to write to (default: outputs/dataset_report/NAME)")
    parser.add_argument("--split", choices=("train", "val", "all"), default="all")
    args = parser.parse_intermixed_args(arguments)
    if not any(override.startswith("data=") for override in args.overrides):
        parser.error("name a dataset: data=" + ", data=".join(datasets_known()))
    return args


def examine(split: str, dataset: "SegmentationDataset", num_workers: int) -> dict[str, Any]:
    """Reads every image and label map of a split; broken ones are listed and left out of the counts."""
    import torch
    from rich.progress import track
    from torch.utils.data import DataLoader

    from eomt.data.statistics import class_weights, counts_from_histograms
    from eomt.indices import IGNORE, OUTLIER

    loader = DataLoader(Readings(dataset), batch_size=None, num_workers=num_workers)
    readings = list(track(loader, description=f"Reading {split}", total=len(dataset), transient=True))
    whole = [index for index, reading in enumerate(readings) if reading["error"] is None]
    histograms = [readings[index]["histogram"] for index in whole] or [torch.zeros(256, dtype=torch.long)]
    counts = counts_from_histograms(histograms, len(dataset.classes))
    labelled = max(1, int(counts.pixels.sum()))
    ignored = sum(int(histogram[IGNORE]) for histogram in histograms)
    outliers = sum(int(histogram[OUTLIER]) for histogram in histograms)
    weights = {kind: class_weights(counts, kind) for kind in ("inverse", "effective_number")}
    sizes = [readings[index]["size"] for index in whole]
    return {
        "images": len(dataset),
        "sizes": {size: sizes.count(size) for size in sorted(set(sizes))},
        "ignored_share": ignored / max(1, ignored + outliers + labelled),
        "outlier_share": outliers / max(1, ignored + outliers + labelled),
        "classes": [
            {
                "name": name,
                "pixels": int(counts.pixels[k]),
                "pixel_share": int(counts.pixels[k]) / labelled,
                "images": int(counts.images[k]),
                "weight_inverse": weights["inverse"][k],
                "weight_effective_number": weights["effective_number"][k],
            }
            for k, name in enumerate(dataset.classes.names)
        ],
        "empty": [dataset.names[i] for i in whole if not readings[i]["histogram"][: len(dataset.classes)].any()],
        "broken": {dataset.names[i]: reading["error"] for i, reading in enumerate(readings) if reading["error"]},
    }


class Readings:
    """Item i is what one image and its label map hold, or what is wrong with them."""

    def __init__(self, dataset: "SegmentationDataset") -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        try:
            _, labels = self.dataset[index]
        except (ValueError, OSError) as error:
            return {"error": str(error)}
        height, width = labels.shape
        histogram = torch.bincount(labels.flatten(), minlength=256)
        return {"error": None, "size": f"{height}x{width}", "histogram": histogram}


HEADER = ("class", "pixels", "images", "weight: inverse", "effective number")


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            entry["name"],
            f"{entry['pixel_share']:.2%}",
            str(entry["images"]),
            f"{entry['weight_inverse']:.3f}",
            f"{entry['weight_effective_number']:.3f}",
        )
        for entry in report["classes"]
    ]


def summary(report: dict[str, Any]) -> str:
    sizes = list(report["sizes"].items())
    shown = ", ".join(f"{size} ({count})" for size, count in sizes[:5]) + (", …" if len(sizes) > 5 else "")
    return (
        f"{report['images']} images, {len(report['broken'])} broken, {len(report['empty'])} without a labelled pixel; "
        f"height x width: {shown or 'none'}; {report['ignored_share']:.2%} of the pixels ignored"
        + (f", {report['outlier_share']:.2%} outliers" if report["outlier_share"] else "")
    )


def show(name: str, reports: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for split, report in reports.items():
        table = Table(*HEADER, title=f"{name}, {split}", caption=summary(report))
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows(report):
            table.add_row(*row)
        console.print(table)
        for file, error in report["broken"].items():
            console.print(f"[red]broken[/red] {escape(file)}: {escape(error)}", soft_wrap=True)


def markdown(name: str, reports: dict[str, Any]) -> str:
    lines = [f"# Dataset report: {name}", ""]
    for split, report in reports.items():
        lines += [f"## {split}", "", summary(report) + ".", ""]
        lines += [f"| {' | '.join(HEADER)} |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows(report)]
        lines += ["", *(f"- broken: `{file}`: {error}" for file, error in report["broken"].items())]
        lines += [*(f"- without a labelled pixel: `{file}`" for file in report["empty"]), ""]
    return "\n".join([*lines, "![images beside their labels](grid.png)", ""])


def draw_grid(
    datasets: "dict[str, SegmentationDataset]", reports: dict[str, Any], path: Path, per_split: int = 6
) -> None:
    """Images beside their labels, evenly spread over each split, above a legend of class names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    pictures = []
    for split, dataset in datasets.items():
        whole = [i for i, name in enumerate(dataset.names) if name not in reports[split]["broken"]]
        step = max(1, len(whole) // per_split)
        pictures += [(f"{split}: {dataset.names[i]}", side_by_side(dataset, i)) for i in whole[::step][:per_split]]
    if not pictures:
        return
    height = 2 * -(-len(pictures) // 2)
    figure, axes = plt.subplots(max(1, height // 2), 2, figsize=(14, 1.1 * height + 1.2), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture.numpy())
        axis.set_title(title, fontsize=7)
    classes = next(iter(datasets.values())).classes
    patches = [
        Patch(color=[channel / 255 for channel in color], label=name)
        for name, color in zip(classes.names, classes.colors, strict=True)
    ]
    patches.append(Patch(color="black", label="ignored"))
    figure.tight_layout(rect=(0, 0.9 / (1.1 * height + 1.2), 1, 1))
    figure.legend(handles=patches, loc="lower center", ncols=10, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def side_by_side(dataset: "SegmentationDataset", index: int) -> "Tensor":
    """The image and its colourised labels, uint8 [H, 2 W, 3]."""
    import torch

    image, labels = dataset[index]
    return torch.cat([image.permute(1, 2, 0), dataset.classes.colorize(labels)], dim=1)


if __name__ == "__main__":
    raise SystemExit(main())
