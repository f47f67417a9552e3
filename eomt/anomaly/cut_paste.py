"""Cut-Paste: objects of no class, pasted on training scenes, so that a network learns to reject what it does not know.

Every draw comes from torch's random generator: `SegmentationDataset` seeds it for each item, so that a training view
and the picture that `scripts/make_cut_paste.py` writes for the same image and seed show the same objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from eomt.anomaly.cutouts import CutOuts
from eomt.data.labels import LabelSet
from eomt.indices import OUTLIER

HORIZON = 0.45  # of the image's height, unless a road is seen above it
LEAST_SIZE = 4  # pixels of an object
LEAST_PLACES = 50  # pixels to stand on; an image with fewer stays as it is
FEATHER = 0.7  # standard deviation of a soft edge, in pixels
BORDER = 3  # pixels around an object for its soft edge
STRONGEST = 2.0  # factor on an object's contrast

Scale = Literal["perspective", "uniform"]
Where = Literal["road", "anywhere"]
Edge = Literal["hard", "feathered"]


@dataclass(frozen=True)
class Paste:
    """One object on an image.

    Attributes:
        cutout: its number among the cut-outs.
        source: where that comes from.
        size: pixels of its longer side.
        row, column: where the middle of its lowest row stands.
        mirrored: left and right exchanged.
    """

    cutout: int
    source: str
    size: int
    row: int
    column: int
    mirrored: bool


@dataclass(frozen=True)
class CutPaste:
    """A transform of image uint8 [3, H, W] and labels uint8 [H, W], for training sets, before augmentation.

    It draws from the random generator's state and leaves that as it was: seed it for each image, as
    `SegmentationDataset` does.

    Args:
        cutouts: what is pasted.
        probability: of an image to get any object.
        objects: (fewest, most) on such an image.
        size: (smallest, largest) longer side of an object, as a share of the image's height: if `scale` is
            "perspective", of one that stands on the lowest row, shrinking towards the horizon (seen from a car, a metre
            is about 0.45); if it is "uniform", of any.
        scale: "perspective" or "uniform".
        where: "road" stands objects on pixels of the class `road`; "anywhere" on any pixel.
        road: name of that class, or its train index.
        edge: "hard", or "feathered" over some two pixels.
        match_color: move an object's mean colour and contrast half-way to those of the image's lower half.

    Raises:
        ValueError: impossible values.
    """

    cutouts: CutOuts
    probability: float = 0.5
    objects: Sequence[int] = (1, 3)
    size: Sequence[float] = (0.15, 0.5)
    scale: Scale = "perspective"
    where: Where = "road"
    road: str | int = "road"
    edge: Edge = "feathered"
    match_color: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"data.cut_paste.probability {self.probability}: must lie above 0, up to 1; data.cut_paste=null is none"
            )
        if len(self.objects) != 2 or not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"data.cut_paste.objects {list(self.objects)}: give [fewest, most], at least 1")
        if len(self.size) != 2 or not 0 < self.size[0] <= self.size[1] <= 1:
            raise ValueError(
                f"data.cut_paste.size {list(self.size)}: give [smallest, largest] as shares of the image's height"
            )
        for name, choices in (("scale", Scale), ("where", Where), ("edge", Edge)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"data.cut_paste.{name} {getattr(self, name)!r}: choose from {', '.join(get_args(choices))}"
                )

    def for_classes(self, classes: LabelSet) -> "CutPaste":
        """The same for a data set of these classes, whose road is known by its train index.

        Raises:
            ValueError: objects shall stand on a class that is not there.
        """
        if self.where == "anywhere" or self.road in range(len(classes)):
            return self
        if self.road not in classes.names:
            raise ValueError(
                f"data.cut_paste.road {self.road!r}: the data set has no such class, but {', '.join(classes.names)}; "
                "name another, or set data.cut_paste.where=anywhere"
            )
        return replace(self, road=classes.names.index(self.road))

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Image and labels with what `draw` places on them."""
        return self.apply(image, labels, self.draw(labels))

    def draw(self, labels: Tensor) -> list[Paste]:
        """Draws the objects to paste on a scene with these labels, the nearest last; none where no place is found.

        Crops and colours that are drawn afterwards are those of a run without pasting.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(randint(0, 2**32 - 1))
            return self.draw_pastes(labels)

    def draw_pastes(self, labels: Tensor) -> list[Paste]:
        """As `draw`, from the generator as it is."""
        if torch.rand(()).item() >= self.probability:
            return []
        ground = labels == self.road if self.where == "road" else torch.ones_like(labels, dtype=torch.bool)
        places = ground.sum(1)  # on each row
        unit = self.unit_sizes(places)
        smallest = self.size[0] * unit
        possible = (smallest >= LEAST_SIZE) & (smallest <= torch.arange(1, len(unit) + 1))
        so_far = (places * possible).cumsum(0)
        total, pastes = int(so_far[-1]), []
        for _ in range(randint(*self.objects) if total >= LEAST_PLACES else 0):
            row = int(torch.searchsorted(so_far, randint(1, total)))  # each place is as likely as any other
            columns = ground[row].nonzero().flatten()
            column = int(columns[randint(0, len(columns) - 1)])
            share = self.size[0] + (self.size[1] - self.size[0]) * torch.rand(()).item()
            cutout, mirrored = randint(0, len(self.cutouts) - 1), bool(randint(0, 1))
            size = round(share * unit[row].item())
            source = self.cutouts.name(cutout)
            pastes.append(Paste(cutout, source, size=size, row=row, column=column, mirrored=mirrored))
        return sorted(pastes, key=lambda paste: paste.row)

    def unit_sizes(self, places: Tensor) -> Tensor:
        """Pixels of an object of size 1 by the row on which it stands, float [H], of how many can stand there, [H]."""
        height = len(places)
        if self.scale == "uniform":
            return torch.full((height,), float(height))
        horizon = round(HORIZON * height)
        if self.where == "road":
            horizon = min([horizon, *places.nonzero().flatten().tolist()])
        return (torch.arange(height) - horizon).clamp(min=0) * (height / max(height - 1 - horizon, 1))

    def apply(self, image: Tensor, labels: Tensor, pastes: Sequence[Paste]) -> tuple[Tensor, Tensor]:
        """Image and labels with these objects; the given tensors stay as they are."""
        if not pastes:
            return image, labels
        pixels, labels = image.permute(1, 2, 0).numpy().copy(), labels.clone()
        for paste in pastes:
            self.paste(pixels, labels.numpy(), paste)
        return torch.from_numpy(pixels).permute(2, 0, 1), labels

    def paste(self, pixels: np.ndarray, labels: np.ndarray, paste: Paste) -> None:
        """Writes one object into pixels [H, W, 3] and labels [H, W]; what lies outside the image is cut off."""
        colors, alpha, inside = self.render(paste)
        top, left = paste.row + 1 + BORDER - len(inside), paste.column - inside.shape[1] // 2
        rows, part_rows = overlap(top, inside.shape[0], labels.shape[0])
        columns, part_columns = overlap(left, inside.shape[1], labels.shape[1])
        part = part_rows, part_columns
        colors, alpha, inside, behind = colors[part], alpha[part], inside[part], pixels[rows, columns]
        if self.match_color and inside.any():
            colors = half_way(colors, inside, pixels[len(pixels) // 2 :: 8, ::8])  # no sky
        pixels[rows, columns] = (alpha * colors + (1 - alpha) * behind).round().clip(0, 255)
        labels[rows, columns][inside] = OUTLIER

    def render(self, paste: Paste) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An object at its size, with a border: colours float [h, w, 3], opacity [h, w, 1], where it is bool [h, w]."""
        picture = Image.fromarray(self.cutouts[paste.cutout])
        scale = paste.size / max(picture.size)
        picture = picture.resize([max(1, round(scale * side)) for side in picture.size], Image.Resampling.BILINEAR)
        if paste.mirrored:
            picture = ImageOps.mirror(picture)
        picture = ImageOps.expand(picture, BORDER)
        sharp = np.asarray(picture, dtype=np.float32)
        inside = sharp[..., 3] >= 128
        if self.edge == "hard":
            return sharp[..., :3], inside[..., None].astype(np.float32), inside
        # Blurred with its opacity multiplied in: the soft edge takes on the object's colour, not the void's black.
        blurred = picture.convert("RGBa").filter(ImageFilter.GaussianBlur(FEATHER)).convert("RGBA")
        soft = np.asarray(blurred, dtype=np.float32)
        return np.where(inside[..., None], sharp, soft)[..., :3], soft[..., 3:] / 255, inside


def overlap(start: int, length: int, limit: int) -> tuple[slice, slice]:
    """Cuts start..start + length to 0..limit: returns it in the coordinates of limit, and counted from start."""
    first, last = max(start, 0), min(start + length, limit)
    return slice(first, last), slice(first - start, last - start)


def half_way(colors: np.ndarray, inside: np.ndarray, scene: np.ndarray) -> np.ndarray:
    """An object's colours [h, w, 3], their mean and contrast half-way to those of a scene [H, W, 3]."""
    mean, scene_mean = colors[inside].mean(0), scene.mean((0, 1))
    contrast, scene_contrast = (colors[inside] - mean).std(), (scene - scene_mean).std()
    factor = min(0.5 + 0.5 * scene_contrast / max(contrast, 1), STRONGEST)
    return (colors - mean) * factor + (mean + scene_mean) / 2


def randint(low: int, high: int) -> int:
    """Between low and high, both included."""
    return int(torch.randint(low, high + 1, ()))
