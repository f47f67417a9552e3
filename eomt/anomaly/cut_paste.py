"""Cut-Paste: objects of no class, pasted on training scenes, so that a network learns to reject what it does not know.

Every draw comes from torch's random generator: `SegmentationDataset` seeds it for each item, so a training view and
the picture that `scripts/make_cut_paste.py` writes for the same image and seed are the same.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from eomt.anomaly.cutouts import CutOuts
from eomt.data.labels import OUTLIER

HORIZON = 0.45  # of the image's height, where no road shows it
LEAST_ROAD = 50  # pixels on which an object is placed


@dataclass(frozen=True)
class Paste:
    """One object on an image: what, how large, where its lowest row's middle stands, mirrored or not."""

    cutout: int
    name: str
    height: int
    foot: tuple[int, int]  # row, column
    mirrored: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class CutPaste:
    """A transform of image uint8 [3, H, W] and labels uint8 [H, W], for training sets, before augmentation.

    Args:
        cutouts: what is pasted.
        probability: of an image to get any object.
        objects: (fewest, most) on such an image.
        size: (smallest, largest) height of an object, as a share of the image's height: of one that stands on the
            lowest row if `scale` is "perspective", which shrinks towards the horizon; of any if it is "uniform".
        scale: "perspective" or "uniform".
        where: "road" stands objects on pixels of class `road`; "anywhere" on any pixel.
        edge: "hard", or "feathered" by a pixel or two.
        match_color: move an object's mean colour and contrast half-way to those of what it covers.
        road: the train index of the road.

    Raises:
        ValueError: impossible values.
    """

    def __init__(
        self,
        cutouts: CutOuts,
        probability: float = 0.5,
        objects: Sequence[int] = (1, 3),
        size: Sequence[float] = (0.15, 0.5),
        scale: Literal["perspective", "uniform"] = "perspective",
        where: Literal["road", "anywhere"] = "road",
        edge: Literal["hard", "feathered"] = "feathered",
        match_color: bool = False,
        road: int = 0,
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"cut_paste.probability {probability}: must lie between 0 and 1")
        if len(objects) != 2 or not 1 <= objects[0] <= objects[1]:
            raise ValueError(f"cut_paste.objects {list(objects)}: must be [fewest, most], at least 1")
        if len(size) != 2 or not 0 < size[0] <= size[1] <= 1:
            raise ValueError(f"cut_paste.size {list(size)}: must be [smallest, largest] share of the image's height")
        for name, value, known in (
            ("scale", scale, ("perspective", "uniform")),
            ("where", where, ("road", "anywhere")),
            ("edge", edge, ("hard", "feathered")),
        ):
            if value not in known:
                raise ValueError(f"cut_paste.{name} {value!r}: choose from {', '.join(known)}")
        self.cutouts, self.probability, self.objects, self.size = cutouts, probability, tuple(objects), tuple(size)
        self.scale, self.where, self.edge, self.match_color, self.road = scale, where, edge, match_color, road

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Image and labels with what `draw` places on them."""
        return self.apply(image, labels, self.draw(labels))

    def draw(self, labels: Tensor) -> list[Paste]:
        """What to paste, and where; nothing where there is no place for it."""
        pastes: list[Paste] = []
        if torch.rand(()).item() >= self.probability:
            return pastes
        height = labels.shape[0]
        road = labels == self.road
        rows = road.any(1).nonzero()
        horizon = rows[0].item() if len(rows) else round(HORIZON * height)
        places = (road if self.where == "road" else torch.ones_like(road)).flatten().nonzero().flatten()
        for _ in range(randint(*self.objects) if len(places) >= LEAST_ROAD else 0):
            row, column = divmod(places[randint(0, len(places) - 1)].item(), labels.shape[1])
            share = self.size[0] + (self.size[1] - self.size[0]) * torch.rand(()).item()
            if self.scale == "perspective":
                share *= max(row - horizon, 0) / max(height - 1 - horizon, 1)
            index, mirrored = randint(0, len(self.cutouts) - 1), bool(randint(0, 1))
            if round(share * height) >= 2:  # else it is too far away to be seen
                name = self.cutouts.name(index)
                pastes.append(Paste(index, name, round(share * height), (row, column), mirrored))
        return sorted(pastes, key=lambda paste: paste.foot[0])  # the nearest last, on top

    def apply(self, image: Tensor, labels: Tensor, pastes: Sequence[Paste]) -> tuple[Tensor, Tensor]:
        """Image and labels with these objects; the given ones stay as they are."""
        if not pastes:
            return image, labels
        pixels, labels = image.permute(1, 2, 0).numpy().copy(), labels.clone()
        for paste in pastes:
            self.paste(pixels, labels.numpy(), paste)
        return torch.from_numpy(pixels).permute(2, 0, 1), labels

    def paste(self, pixels: np.ndarray, labels: np.ndarray, paste: Paste) -> None:
        """Writes one object into pixels [H, W, 3] and labels [H, W]; what lies outside the image is cut off."""
        cutout = Image.fromarray(self.cutouts[paste.cutout])
        width = max(1, round(cutout.width * paste.height / cutout.height))
        cutout = cutout.convert("RGBa").resize((width, paste.height), Image.Resampling.BOX).convert("RGBA")
        if paste.mirrored:
            cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        alpha = cutout.getchannel("A")
        inside = np.asarray(alpha) >= 128
        if self.edge == "feathered":
            alpha = np.asarray(alpha.filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)[..., None] / 255
        else:
            alpha = inside[..., None].astype(np.float32)

        top, left = paste.foot[0] - paste.height + 1, paste.foot[1] - width // 2
        rows = slice(max(top, 0), min(top + paste.height, len(pixels)))
        columns = slice(max(left, 0), min(left + width, pixels.shape[1]))
        part = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        colors = np.asarray(cutout, dtype=np.float32)[..., :3][part]
        alpha, inside, behind = alpha[part], inside[part], pixels[rows, columns].astype(np.float32)
        if self.match_color and inside.any():
            colors = towards(colors, inside, behind)
        pixels[rows, columns] = (alpha * colors + (1 - alpha) * behind).round().clip(0, 255)
        labels[rows, columns][inside] = OUTLIER


def towards(colors: np.ndarray, inside: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """An object's colours [h, w, 3], their mean and spread half-way to those of what it covers."""
    mean, spread = colors[inside].mean(0), colors[inside].std() + 1
    other_mean, other_spread = behind[inside].mean(0), behind[inside].std() + 1
    scale = 0.5 + 0.5 * other_spread / spread
    return (colors - mean) * scale + (mean + other_mean) / 2


def randint(low: int, high: int) -> int:
    """Between low and high, both included."""
    return int(torch.randint(low, high + 1, ()))


class Chain:
    """Transforms one after the other."""

    def __init__(self, *transforms: Any) -> None:
        self.transforms = transforms

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for transform in self.transforms:
            image, labels = transform(image, labels)
        return image, labels
