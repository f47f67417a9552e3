"""The classes of a dataset: their names and the colours they are drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eomt.indices import MAX_CLASSES, OUTLIER, OUTLIER_COLOR

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LabelSet:
    """Class names and RGB colours; class k is train index k.

    Raises:
        ValueError: Names and colours differ in number, a name occurs twice, or there are not 1 to 254 classes.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise ValueError(
                f"A label set needs 1 to {MAX_CLASSES} classes, got {len(self.names)}; merge or drop some."
            )
        if len(self.names) != len(self.colors):
            raise ValueError(
                f"Every class needs one colour, got {len(self.names)} names and {len(self.colors)} colours; "
                "give as many colours as names."
            )
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"Class names must be unique, {twice[0]!r} occurs more than once; rename or merge it.")
        for name, color in zip(self.names, self.colors, strict=True):
            if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
                raise ValueError(f"The colour of {name!r} must be three values 0..255, got {color}; write [R, G, B].")

    @classmethod
    def of(cls, names: Sequence[str], colors: Sequence[Sequence[int]] | None) -> LabelSet:
        """Classes with these colours, or where a network was saved without colours, with hues around the circle."""
        hues = [hsv_to_rgb(k / len(names), 0.9, 0.9) for k in range(len(names))]
        colors = colors or [[round(255 * channel) for channel in hue] for hue in hues]
        return cls(tuple(names), tuple(map(tuple, colors)))

    def __len__(self) -> int:
        return len(self.names)

    def colorize(self, labels: Tensor) -> Tensor:
        """Draws train indices [H, W] uint8 as RGB [H, W, 3] uint8; outliers are cyan, other non-classes black."""
        import torch

        palette = torch.zeros(256, 3, dtype=torch.uint8)
        palette[OUTLIER] = torch.tensor(OUTLIER_COLOR)
        palette[: len(self)] = torch.tensor(self.colors, dtype=torch.uint8)
        return palette[labels.long().cpu()]
