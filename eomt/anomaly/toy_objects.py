"""Things that belong to no class of Cityscapes, drawn: some to meet on the toy anomalies' roads, others to train with.

The two kinds share no drawing, so that a network that was shown the second kind has not seen the first.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from eomt.data.labels import OUTLIER
from eomt.data.toy_scene import Canvas, Color, Stranger

Painter = Callable[[Canvas, float, float], None]

# --- to be met ----------------------------------------------------------------------------------------------------


def draw_strangers(rng: Generator, most: int = 3) -> list[Stranger]:
    """One to `most` unknown objects on the road, 6 to 26 metres away."""
    kinds = [STRANGERS[k] for k in rng.permutation(len(STRANGERS))[: rng.integers(1, most + 1)]]
    return [Stranger(kind(rng), rng.uniform(-0.75, 0.75), rng.uniform(6, 26)) for kind in kinds]


def cone(rng: Generator) -> Painter:
    """A traffic cone with two white bands."""
    height = rng.uniform(0.8, 1.2)
    color = (236, int(rng.uniform(70, 120)), 24)

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.rectangle(x, 0, z, 0.62 * height, 0.07, (40, 40, 42), OUTLIER)
        for low, high, paint in ((0, 0.3, color), (0.3, 0.48, WHITE), (0.48, 0.68, color), (0.68, 0.8, WHITE)):
            wide, narrow = (0.25 * height * (1 - part) for part in (low, high))
            bottom, top = (0.07 + part * height for part in (low, high))
            canvas.polygon(
                [(x - wide, bottom, z), (x + wide, bottom, z), (x + narrow, top, z), (x - narrow, top, z)],
                *(paint, OUTLIER),
            )

    return draw


def ball(rng: Generator) -> Painter:
    """A beach ball with stripes."""
    radius, colors = rng.uniform(0.35, 0.6), bright(rng, 3)

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.on_ground(x, z - 0.1, 1.6 * radius, 0.4, (60, 60, 64))
        for share, color in zip((1.0, 0.72, 0.38), colors, strict=True):
            canvas.disc(x, radius, z, share * radius, color, OUTLIER)

    return draw


def animal(rng: Generator) -> Painter:
    """Something with four legs, from its side."""
    size, fur = rng.uniform(0.6, 1.3), FURS[rng.integers(len(FURS))]
    ahead = int(rng.choice([-1, 1]))

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.on_ground(x, z - 0.1, 1.4 * size, 0.4, (60, 60, 64))
        for leg in (-0.48, -0.3, 0.3, 0.48):
            canvas.rectangle(x + leg * size, 0, z, 0.11 * size, 0.6 * size, shade(fur, 0.75), OUTLIER)
        canvas.rectangle(x, 0.5 * size, z, 1.2 * size, 0.46 * size, fur, OUTLIER)
        canvas.disc(x + ahead * 0.74 * size, 1.05 * size, z, 0.26 * size, shade(fur, 1.1), OUTLIER)
        canvas.rectangle(x - ahead * 0.68 * size, 0.72 * size, z, 0.3 * size, 0.08 * size, shade(fur, 0.8), OUTLIER)

    return draw


def tyres(rng: Generator) -> Painter:
    """A pile of tyres."""
    count, radius = int(rng.integers(2, 5)), rng.uniform(0.36, 0.5)

    def draw(canvas: Canvas, x: float, z: float) -> None:
        for k in range(count):
            canvas.rectangle(x, 0.24 * k, z, 2 * radius, 0.24, shade((34, 34, 38), 1 + 0.4 * (k % 2)), OUTLIER)
            canvas.rectangle(x, 0.24 * k + 0.08, z, 2 * radius, 0.05, (84, 84, 88), OUTLIER)

    return draw


def sofa(rng: Generator) -> Painter:
    """A sofa that somebody left behind."""
    width, (color,) = rng.uniform(1.4, 2.0), bright(rng, 1)

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.rectangle(x, 0.1, z, width, 0.9, shade(color, 0.7), OUTLIER)
        for side in (-1, 1):
            canvas.rectangle(x + side * 0.46 * width, 0, z, 0.16 * width, 0.65, shade(color, 0.85), OUTLIER)
        for part in (-0.2, 0.2):
            canvas.rectangle(x + part * width, 0.12, z, 0.36 * width, 0.3, color, OUTLIER)

    return draw


WHITE: Color = (238, 238, 232)
FURS: tuple[Color, ...] = ((122, 82, 46), (72, 60, 52), (206, 186, 150), (40, 38, 38), (176, 120, 66))
STRANGERS = (cone, ball, animal, tyres, sofa)

# --- to train with ------------------------------------------------------------------------------------------------

SIDE = 96  # pixels of a cut-out


def draw_cutout(rng: Generator) -> np.ndarray:
    """An object alone, uint8 [h, w, 4], RGBA: transparent around it."""
    image = Image.new("RGBA", (SIDE, SIDE))
    CUTOUTS[rng.integers(len(CUTOUTS))](ImageDraw.Draw(image), rng)
    pixels = np.asarray(image).copy()
    inside = pixels[..., 3] > 0
    grain = rng.normal(0, rng.uniform(2, 14), (SIDE, SIDE, 1))
    pixels[..., :3] = np.where(inside[..., None], (pixels[..., :3] + grain).clip(0, 255), 0)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def chair(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    color, dark = opaque(bright(rng, 1)[0]), opaque(bright(rng, 1)[0], 0.5)
    left, right = 20, int(rng.uniform(56, 78))
    for x in (left, right - 6):
        brush.rectangle([x, 50, x + 6, 94], fill=dark)
    brush.rectangle([left, 46, right, 56], fill=color)
    brush.rectangle([left, 6, left + 9, 50], fill=color)


def umbrella(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    colors = [opaque(color) for color in bright(rng, 2)]
    for k in range(6):
        brush.pieslice([6, 8, 90, 84], 180 + 30 * k, 210 + 30 * k, fill=colors[k % 2])
    brush.rectangle([46, 44, 50, 90], fill=(70, 60, 50, 255))


def star(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    points, inner, turn = int(rng.integers(4, 9)), rng.uniform(0.4, 0.75), rng.uniform(0, 6)
    radii = [44 * (inner if k % 2 else 1) for k in range(2 * points)]
    corners = [
        (48 + r * math.cos(turn + math.pi * k / points), 48 + r * math.sin(turn + math.pi * k / points))
        for k, r in enumerate(radii)
    ]
    brush.polygon(corners, fill=opaque(bright(rng, 1)[0]))


def blob(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    colors = [opaque(color) for color in bright(rng, 3)]
    for k in range(int(rng.integers(4, 9))):
        x, y, w, h = rng.uniform(26, 70), rng.uniform(26, 70), rng.uniform(10, 26), rng.uniform(10, 26)
        brush.ellipse([x - w, y - h, x + w, y + h], fill=colors[k % 3])


def crate(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    color = bright(rng, 1)[0]
    top, right = int(rng.uniform(20, 50)), int(rng.uniform(60, 92))
    brush.rectangle([8, top, right, 92], fill=opaque(color, 0.8))
    for y in range(top + 4, 90, 12):
        brush.rectangle([12, y, right - 4, y + 6], fill=opaque(color))


def bottle(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    color = opaque(bright(rng, 1)[0])
    brush.rectangle([36, 34, 62, 94], fill=color)
    brush.polygon([(36, 34), (62, 34), (54, 20), (44, 20)], fill=color)
    brush.rectangle([44, 6, 54, 22], fill=opaque(bright(rng, 1)[0]))
    brush.rectangle([36, 52, 62, 72], fill=(236, 234, 226, 255))


CUTOUTS = (chair, umbrella, star, blob, crate, bottle)


def bright(rng: Generator, count: int) -> list[Color]:
    """Colours of any hue."""
    return [tuple(int(v) for v in rng.uniform(30, 245, 3)) for _ in range(count)]


def shade(color: Color, factor: float) -> Color:
    return tuple(min(255, round(channel * factor)) for channel in color)


def opaque(color: Sequence[int], factor: float = 1.0) -> tuple[int, int, int, int]:
    return (*shade(color, factor), 255)
