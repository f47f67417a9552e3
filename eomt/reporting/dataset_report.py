"""Reports what is in a data set: counts, sizes, class shares, broken files, and pictures."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from eomt.data.datamodule import SegmentationDataModule
from eomt.data.dataset import SegmentationDataset
from eomt.data.faults import Faults, by_kind, examine_pair, fault_lines
from eomt.data.statistics import class_weights, counts_from_histograms
from eomt.files import replacing, write_json, write_text
from eomt.indices import IGNORE, OUTLIER
from eomt.reporting.markup import markdown_escape

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

HEADER = ("class", "pixels", "images", "weight: inverse", "effective number")


def report_dataset(
    name: str,
    datamodule: SegmentationDataModule,
    out: Path,
    splits: Collection[str] = ("train", "val"),
    lonely: Faults = MappingProxyType({}),
) -> bool:
    """Reads every file of the splits once, prints what is in them, and writes report.md, counts.json and grid.png.

    Args:
        name: of the data set.
        datamodule: its splits.
        out: folder to write to.
        splits: that are read.
        lonely: what is wrong with files that belong to no pair, by kind and name.

    Returns:
        Whether nothing is wrong.
    """
    datasets = {"train": datamodule.train_set.with_transform(None), "val": datamodule.val_set}
    chosen = {split: dataset for split, dataset in datasets.items() if split in splits}
    reports = {split: examine(split, dataset, datamodule.num_workers) for split, dataset in chosen.items()}
    faults = {split: report["faults"] for split, report in reports.items()} | ({"pairs": lonely} if lonely else {})
    print_report(name, reports, datamodule.left_out)
    print_faults(faults, {split: report["unknown_values"] for split, report in reports.items()})
    facts = {"data": name, "splits": reports, "left_out": dict(datamodule.left_out), "unpaired": dict(lonely)}
    write_json(out / "counts.json", facts)
    write_text(out / "report.md", markdown(name, reports, datamodule.left_out, lonely))
    draw_grid(chosen, reports, out / "grid.png")
    return not any(faults.values())


def examine(split: str, dataset: SegmentationDataset, num_workers: int) -> dict[str, Any]:
    """Reads every image and label map of a split; wrong ones are listed and left out of the counts.

    Returns:
        `images`, `sizes` ("HxW": count), `ignored_share` and `outlier_share` of the pixels, `classes` (pixels, images
        and weights of each), `empty` (names of images without a labelled pixel), `broken` (the first error by name),
        `faults` (all of them, by kind and name) and `unknown_values` (masks by each value of no class).
    """
    loader = DataLoader(Readings(dataset), batch_size=None, num_workers=num_workers)
    readings = list(track(loader, description=f"Reading {split}", total=len(dataset), transient=True))
    whole = [index for index, reading in enumerate(readings) if not reading["faults"]]
    histograms = [readings[index]["histogram"] for index in whole] or [torch.zeros(256, dtype=torch.long)]
    counts = counts_from_histograms(histograms, len(dataset.classes))
    labelled = max(1, int(counts.pixels.sum()))
    ignored = sum(int(histogram[IGNORE]) for histogram in histograms)
    outliers = sum(int(histogram[OUTLIER]) for histogram in histograms)
    weights = {kind: class_weights(counts, kind) for kind in ("inverse", "effective_number")}
    names = dataset.names
    sizes = [readings[index]["size"] for index in whole]
    wrong = {names[index]: reading["faults"] for index, reading in enumerate(readings) if reading["faults"]}
    return {
        "images": len(dataset),
        "sizes": dict(sorted(Counter(sizes).items())),
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
        "empty": [names[i] for i in whole if not readings[i]["histogram"][: len(dataset.classes)].any()],
        "broken": {names[i]: reading["error"] for i, reading in enumerate(readings) if reading["error"]},
        "faults": by_kind(wrong),
        "unknown_values": dict(Counter(str(value) for reading in readings for value in reading["unknown"])),
    }


class Readings:
    """Facts of one image and its label map as item i: size and histogram of labels, or what is wrong with them."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = examine_pair(self.dataset, index)
        facts = {"error": found.error, "faults": found.faults, "unknown": found.unknown}
        if found.labels is None:
            return facts
        height, width = found.labels.shape
        histogram = torch.bincount(found.labels.flatten(), minlength=256)
        return facts | {"size": f"{height}x{width}", "histogram": histogram}


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the cells of a split's table, a row for each class."""
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
    """Returns a sentence with counts, sizes and shares of a split."""
    sizes = list(report["sizes"].items())
    shown = ", ".join(f"{size} ({count})" for size, count in sizes[:5]) + (", …" if len(sizes) > 5 else "")
    return (
        f"{report['images']} images, {len(report['broken'])} broken, {len(report['empty'])} without a labelled pixel; "
        f"height x width: {shown or 'none'}; {report['ignored_share']:.2%} of the pixels ignored"
        + (f", {report['outlier_share']:.2%} outliers" if report["outlier_share"] else "")
    )


def left_out_line(left_out: Mapping[str, int]) -> str:
    """Returns how many files belong to no image, by reason."""
    return "left out: " + (", ".join(f"{count} ({reason})" for reason, count in left_out.items()) or "nothing")


def print_report(name: str, reports: dict[str, Any], left_out: Mapping[str, int]) -> None:
    """Prints a table for each split, the broken files below it, and what was left out."""
    console = Console()
    for split, report in reports.items():
        table = Table(*HEADER, title=f"{name}, {split}", caption=summary(report))
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows(report):
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(escape(left_out_line(left_out)), soft_wrap=True)


def print_faults(faults: Mapping[str, Faults], unknown: Mapping[str, Mapping[str, int]]) -> None:
    """Prints what is wrong in each split, by kind, with the first names and one sentence of each."""
    console = Console()
    for split, kinds in faults.items():
        for line in fault_lines(kinds, unknown.get(split, {})):
            head = "" if line.startswith(" ") else f"[red]{split}:[/red] "
            console.print(head + escape(line), soft_wrap=True)


def markdown(name: str, reports: dict[str, Any], left_out: Mapping[str, int], lonely: Faults) -> str:
    """Returns the report as Markdown, with `grid.png` at its end."""
    lines = [f"# Dataset report: {markdown_escape(name)}", ""]
    for split, report in reports.items():
        lines += [f"## {split}", "", markdown_escape(summary(report)) + ".", ""]
        lines += [f"| {' | '.join(HEADER)} |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        lines += [f"| {' | '.join(map(markdown_escape, row))} |" for row in rows(report)]
        lines += ["", *fault_list(report["faults"])]
        lines += [*(f"- without a labelled pixel: {markdown_escape(file)}" for file in report["empty"]), ""]
    lines += [*fault_list(lonely), ""] if lonely else []
    return "\n".join(
        [*lines, markdown_escape(left_out_line(left_out)), "", "![images beside their labels](grid.png)", ""]
    )


def fault_list(faults: Faults) -> list[str]:
    """Returns a line of Markdown for each fault."""
    return [
        f"- {markdown_escape(f'{kind}: {file}: {sentence}')}"
        for kind, names in faults.items()
        for file, sentence in names.items()
    ]


def draw_grid(
    datasets: dict[str, SegmentationDataset], reports: dict[str, Any], path: Path, per_split: int = 6
) -> None:
    """Writes a PNG of images beside their labels, evenly spread over each split, above a legend of class names."""
    pictures = []
    for split, dataset in datasets.items():
        names = dataset.names
        whole = [i for i, name in enumerate(names) if name not in reports[split]["broken"]]
        step = max(1, len(whole) // per_split)
        pictures += [(f"{split}: {names[i]}", side_by_side(dataset, i)) for i in whole[::step][:per_split]]
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
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110)
    plt.close(figure)


def side_by_side(dataset: SegmentationDataset, index: int) -> Tensor:
    """Returns an image and its colourised labels, uint8 [H, 2 W, 3]."""
    image, labels = dataset[index]
    return torch.cat([image.permute(1, 2, 0), dataset.classes.colorize(labels)], dim=1)
