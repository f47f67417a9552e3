"""Things that belong to no class of Cityscapes, drawn: some to meet on the toy anomalies' roads, others to train with.

The two kinds share no drawing, so that a network that was shown the second kind has not seen the first.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from eomt.indices import OUTLIER
from eomt.toys.canvas import Canvas, Color
from eomt.toys.things import Stranger

Painter = Callable[[Canvas, float, float], None]

# --- to be met ----------------------------------------------------------------------------------------------------


def draw_stranger(rng: Generator) -> Stranger:
    """An unknown object on the road, 6 to 26 metres away."""
    kind = STRANGERS[rng.integers(len(STRANGERS))]
    return Stranger(kind(rng), rng.uniform(-0.75, 0.75), rng.uniform(6, 26))


def cone(rng: Generator) -> Painter:
    """A traffic cone with two white bands."""
    height = rng.uniform(0.8, 1.2)
    color = (236, int(rng.uniform(70, 120)), 24)

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.on_ground(x, z - 0.1, 0.8 * height, 0.3, SHADOW)
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
    """A beach ball with coloured segments and a highlight."""
    radius, colors, turn = rng.uniform(0.35, 0.6), (*bright(rng, 2), WHITE), rng.uniform(0, 6)

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.on_ground(x, z - 0.1, 1.6 * radius, 0.4, SHADOW)
        for k in range(6):
            rim = [turn + math.pi / 3 * (k + part) for part in (0, 0.25, 0.5, 0.75, 1)]
            corners = [(x + radius * math.cos(t), radius + radius * math.sin(t), z) for t in rim]
            canvas.polygon([(x, radius, z), *corners], colors[k % 3], OUTLIER)
        canvas.disc(x - 0.35 * radius, 1.4 * radius, z, 0.16 * radius, (252, 252, 248), OUTLIER)

    return draw


def animal(rng: Generator) -> Painter:
    """A deer, a dog or the like, from its side."""
    size, fur = rng.uniform(0.7, 1.3), FURS[rng.integers(len(FURS))]
    ahead = int(rng.choice([-1, 1]))
    far_legs, legs = ((-0.3, 0.48), 0.6), ((-0.46, 0.34), 0.8)  # where, how light
    tail = [(-0.5, 0.88), (-0.56, 0.94), (-0.74, 0.6), (-0.68, 0.58)]
    body = [(-0.54, 0.56), (-0.2, 0.5), (0.3, 0.48), (0.54, 0.6), (0.56, 0.9), (0.1, 0.9), (-0.4, 0.96), (-0.56, 0.88)]
    neck = [(0.3, 0.88), (0.54, 0.64), (0.82, 1.14), (0.62, 1.28)]
    head = [(0.56, 1.16), (0.66, 1.34), (0.84, 1.32), (1.08, 1.14), (1.06, 1.04), (0.8, 1.04)]
    ear = [(0.62, 1.28), (0.74, 1.32), (0.6, 1.54)]

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.on_ground(x, z - 0.1, 1.2 * size, 0.4, SHADOW)
        for places, light in (far_legs, legs):
            for place in places:
                canvas.rectangle(x + ahead * place * size, 0, z, 0.1 * size, 0.6 * size, shade(fur, light), OUTLIER)
        for part, light in ((tail, 0.8), (body, 1.0), (neck, 0.95), (ear, 0.7), (head, 1.12)):
            canvas.polygon([(x + ahead * u * size, v * size, z) for u, v in part], shade(fur, light), OUTLIER)

    return draw


def tyres(rng: Generator) -> Painter:
    """A pile of tyres, not quite straight."""
    count, radius = int(rng.integers(2, 5)), rng.uniform(0.36, 0.5)
    offsets = rng.uniform(-0.12, 0.12, count)

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.on_ground(x, z - 0.1, 2.3 * radius, 0.4, SHADOW)
        for k, offset in enumerate(offsets):
            middle, low, wide = x + offset, 0.26 * k, radius
            rounded = ((0.86, 0), (1, 0.06), (1, 0.2), (0.86, 0.26))
            right = [(middle + u * wide, low + v, z) for u, v in rounded]
            left = [(middle - u * wide, low + v, z) for u, v in reversed(rounded)]
            canvas.polygon([*right, *left], (22, 22, 24), OUTLIER)
            for height in (0.07, 0.15):
                canvas.rectangle(middle, low + height, z, 1.84 * wide, 0.035, (92, 92, 98), OUTLIER)

    return draw


def sofa(rng: Generator) -> Painter:
    """A sofa that somebody left behind."""
    width, (color,) = rng.uniform(1.4, 2.0), bright(rng, 1)

    def draw(canvas: Canvas, x: float, z: float) -> None:
        canvas.on_ground(x, z - 0.1, 1.1 * width, 0.5, SHADOW)
        canvas.rectangle(x, 0.1, z, width, 0.9, shade(color, 0.7), OUTLIER)
        for side in (-1, 1):
            canvas.rectangle(x + side * 0.46 * width, 0, z, 0.16 * width, 0.65, shade(color, 0.85), OUTLIER)
        for part in (-0.2, 0.2):
            canvas.rectangle(x + part * width, 0.12, z, 0.36 * width, 0.3, color, OUTLIER)

    return draw


WHITE: Color = (238, 238, 232)
SHADOW: Color = (60, 60, 64)
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
    """A chair from its side."""
    color, dark = opaque(bright(rng, 1)[0]), opaque(bright(rng, 1)[0], 0.5)
    left, right = 20, int(rng.uniform(56, 78))
    for x in (left, right - 6):
        brush.rectangle([x, 50, x + 6, 94], fill=dark)
    brush.rectangle([left, 46, right, 56], fill=color)
    brush.rectangle([left, 6, left + 9, 50], fill=color)


def umbrella(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    """An open umbrella, upright."""
    colors = [opaque(color) for color in bright(rng, 2)]
    for k in range(6):
        brush.pieslice([6, 8, 90, 84], 180 + 30 * k, 210 + 30 * k, fill=colors[k % 2])
    brush.rectangle([46, 44, 50, 90], fill=(70, 60, 50, 255))


def star(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    """A star with four to eight points."""
    points, inner, turn = int(rng.integers(4, 9)), rng.uniform(0.4, 0.75), rng.uniform(0, 6)
    radii = [44 * (inner if k % 2 else 1) for k in range(2 * points)]
    corners = [
        (48 + r * math.cos(turn + math.pi * k / points), 48 + r * math.sin(turn + math.pi * k / points))
        for k, r in enumerate(radii)
    ]
    brush.polygon(corners, fill=opaque(bright(rng, 1)[0]))


def blob(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    """Ellipses that overlap."""
    colors = [opaque(color) for color in bright(rng, 3)]
    for k in range(int(rng.integers(4, 9))):
        x, y, w, h = rng.uniform(26, 70), rng.uniform(26, 70), rng.uniform(10, 26), rng.uniform(10, 26)
        brush.ellipse([x - w, y - h, x + w, y + h], fill=colors[k % 3])


def crate(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    """A box of slats."""
    color = bright(rng, 1)[0]
    top, right = int(rng.uniform(20, 50)), int(rng.uniform(60, 92))
    brush.rectangle([8, top, right, 92], fill=opaque(color, 0.8))
    for y in range(top + 4, 90, 12):
        brush.rectangle([12, y, right - 4, y + 6], fill=opaque(color))


def bottle(brush: ImageDraw.ImageDraw, rng: Generator) -> None:
    """A bottle with a label."""
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
