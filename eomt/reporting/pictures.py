"""Pictures of predictions, with one legend."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from torch import Tensor

from eomt.data.labels import LabelSet

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

    Ignored pixels of the target are black; the legend names the classes that appear.
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
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 7), frameon=False)
    if title:
        figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
