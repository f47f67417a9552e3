"""Pictures of predictions, with one legend."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from torch import Tensor

from eomt.data.labels import LabelSet
from eomt.files import replacing
from eomt.indices import IGNORE, OUTLIER, OUTLIER_COLOR

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch


def prediction_picture(
    rows: Sequence[tuple[Tensor, ...]],
    classes: LabelSet,
    path: str | Path,
    title: str = "",
    columns: Sequence[str] = ("image", "target", "prediction"),
) -> None:
    """Writes a PNG with a row for each (image uint8 [3, H, W], label map uint8 [H, W], ...), one entry a column.

    The legend names the classes that appear, and `ignored`, which is black.
    """
    height, width = rows[0][0].shape[-2:]
    cell = 12 / len(columns)
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(12, len(rows) * cell * height / width + 1.2),
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name)
    for (image, *maps), cells in zip(rows, axes, strict=True):
        pictures = (image.permute(1, 2, 0), *map(classes.colorize, maps))
        for axis, picture in zip(cells, pictures, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set_axis_off()
    seen = sorted({int(v) for _, *maps in rows for m in maps for v in m.unique() if v < len(classes)})
    patches = [Patch(color=[c / 255 for c in classes.colors[k]], label=classes.names[k]) for k in seen]
    for value, name, color in ((OUTLIER, "outlier", OUTLIER_COLOR), (IGNORE, "ignored", (0, 0, 0))):
        if any((m == value).any() for _, *maps in rows for m in maps):
            patches.append(Patch(color=[c / 255 for c in color], label=name))
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 7), frameon=False)
    if title:
        figure.suptitle(title)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=100)
    plt.close(figure)


def confusion_picture(confusion: Tensor, names: Sequence[str], path: str | Path, title: str = "") -> None:
    """Writes a PNG of confusion counts [K, K] (target, prediction): for each target class, where its pixels went.

    Behind each name stands the share of all labelled pixels that are of the class, or predicted as it.
    """
    share = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    rows, columns = (totals(names, confusion.sum(axis)) for axis in (1, 0))
    side = 2.5 + 0.5 * len(names)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    for row, column in share.round().nonzero().tolist():
        color = "white" if share[row, column] > 50 else "black"
        axis.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(names)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), rows)
    axis.set(xlabel="prediction", ylabel=f"target, {int(confusion.sum()):,} labelled pixels")
    figure.suptitle(textwrap.fill(title, 20 + 7 * len(names)))
    figure.colorbar(image, label="% of the target's pixels", shrink=0.8)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=100)
    plt.close(figure)


def totals(names: Sequence[str], counts: Tensor) -> list[str]:
    """Class names, each with its share of all pixels: `road 31.4 %`, or `train (absent)`."""
    everything = counts.sum().clamp(min=1)
    return [
        f"{name} {100 * count / everything:.1f} %" if count else f"{name} (absent)"
        for name, count in zip(names, counts, strict=True)
    ]
