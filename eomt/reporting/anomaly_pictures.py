"""Pictures of anomaly scores: every map of a score on one fixed scale of colours, whatever the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from eomt.anomaly.metrics import ANOMALY, IGNORED
from eomt.files import replacing

COLUMN = 3.4  # inches
PIXELS = 700  # of a drawn column: larger images are drawn with every n-th pixel
ANOMALOUS = "#ff7800"
OUTLINE = "#39ff9f"


class HeatMap(NamedTuple):
    """A column of heat maps: its title, and the scores at the dark and at the bright end of its colours."""

    title: str
    low: float
    high: float


class Row(NamedTuple):
    """An image uint8 [H, W, 3], its labels uint8 [H, W] (0, 1, 255), and a map float [H, W] for each column."""

    name: str
    image: np.ndarray
    labels: np.ndarray
    maps: Sequence[np.ndarray]


def anomaly_picture(rows: Sequence[Row], columns: Sequence[HeatMap], path: str | Path, title: str = "") -> None:
    """Writes a PNG with a row for each image: image, ground truth, and one heat map a score.

    A score's maps share the scale of its `HeatMap`, which the bar below them shows: pictures of two networks can be
    laid side by side. Scores beyond its ends have the colours of the ends. Lines outline the anomalous pixels.
    """
    heights = [COLUMN * row.labels.shape[0] / row.labels.shape[1] for row in rows]
    width = (2 + len(columns)) * COLUMN
    figure, axes = plt.subplots(
        len(rows) + 1,
        2 + len(columns),
        figsize=(width, sum(heights) + 1.1),
        height_ratios=[*heights, 0.12],
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], ("image", "ground truth", *(column.title for column in columns)), strict=True):
        axis.set_title(name)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, cells in zip(rows, axes, strict=False):
        step = max(1, row.labels.shape[1] // PIXELS)
        labels = row.labels[::step, ::step]
        cells[0].imshow(row.image[::step, ::step])
        cells[1].imshow(truth_picture(row.image[::step, ::step], labels))
        for cell, column, scores in zip(cells[2:], columns, row.maps, strict=True):
            cell.imshow(scores[::step, ::step], cmap="inferno", vmin=column.low, vmax=column.high)
            outline(cell, labels)
    for axis, column in zip(axes[-1, 2:], columns, strict=True):
        axis.set_axis_on()
        scale = plt.cm.ScalarMappable(plt.Normalize(column.low, column.high), "inferno")
        figure.colorbar(scale, cax=axis, orientation="horizontal", extend="both")
    kinds = [Patch(color=ANOMALOUS, label="anomalous"), Patch(color="black", label="ignored")]
    axes[-1, 1].legend(handles=kinds, loc="center", ncols=2, frameon=False)
    if title:
        figure.suptitle(title)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=100)
    plt.close(figure)


def truth_picture(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: the image in pale grey, anomalous pixels in colour, ignored ones black."""
    gray = image.mean(-1, keepdims=True).repeat(3, axis=-1)
    picture = (0.4 * gray + 0.4 * 255).astype(np.uint8)
    picture[labels == ANOMALY] = [round(255 * channel) for channel in matplotlib.colors.to_rgb(ANOMALOUS)]
    picture[labels == IGNORED] = 0
    return picture


def outline(axis: Axes, labels: np.ndarray) -> None:
    """Draws a line around the anomalous pixels."""
    anomalous = labels == ANOMALY
    if anomalous.any() and not anomalous.all():
        axis.contour(anomalous, levels=[0.5], colors=OUTLINE, linewidths=0.8)
