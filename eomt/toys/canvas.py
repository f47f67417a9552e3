"""A pinhole camera, planes to paint on, and the colours of a street.

World coordinates are metres: x to the right, y up from the ground, z away from the camera. Labels are Cityscapes ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float, float]

STATIC, ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE = 4, 7, 8, 11, 12, 13, 17
TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN, SKY = 19, 20, 21, 22, 23
PERSON, RIDER, CAR, TRUCK, BUS, BICYCLE = 24, 25, 26, 27, 28, 33

BLACK: Color = (0, 0, 0)
WARM: Color = (255, 190, 100)
FAR = 120.0  # where the street ends
SKY_DEPTH = 400.0
OVERSAMPLING = 2  # drawn larger, then averaged: smooth edges

PAINTS: dict[str, tuple[Color, ...]] = {
    "facade": (
        (178, 120, 92), (196, 178, 148), (150, 148, 146), (206, 196, 176), (142, 92, 82), (120, 132, 142),
        (186, 152, 112), (214, 206, 190), (158, 132, 118),
    ),
    "car": (
        (186, 34, 34), (36, 62, 140), (228, 228, 226), (52, 52, 56), (150, 154, 160), (22, 92, 84), (206, 166, 40),
        (112, 28, 52),
    ),
    "truck": ((226, 220, 206), (58, 112, 172), (188, 76, 44), (232, 188, 60)),
    "bus": ((206, 52, 40), (238, 190, 48), (36, 122, 112)),
    "cloth": (
        (170, 44, 58), (40, 70, 130), (224, 200, 64), (46, 46, 52), (214, 214, 214), (40, 122, 88), (206, 110, 44),
        (122, 66, 140),
    ),
    "skin": ((226, 184, 152), (184, 132, 98), (122, 82, 58)),
    "leaf": ((58, 104, 46), (78, 122, 52), (96, 132, 58), (46, 88, 54), (116, 128, 52)),
    "sky": ((104, 160, 220), (142, 184, 226), (186, 202, 216), (164, 176, 196), (126, 170, 206)),
}  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """A pinhole camera looking along z; `horizon` and `center` are in pixels, like `focal`."""

    width: int
    height: int
    focal: float
    elevation: float
    horizon: float
    center: float

    def project(self, point: Point) -> tuple[float, float]:
        x, y, z = point
        return self.center + self.focal * x / z, self.horizon + self.focal * (self.elevation - y) / z


class Canvas:
    """Four planes of one size, painted together: colour, label id, depth in metres, and light of its own."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        size = (camera.width, camera.height)
        self.planes = [Image.new(mode, size) for mode in ("RGB", "L", "F", "RGB")]
        self.brushes = [ImageDraw.Draw(plane) for plane in self.planes]
        self.lamps: list[tuple[float, float, float]] = []  # pixel and depth of the ground below each street lamp

    def polygon(self, points: Sequence[Point], color: Color, label: int | None, glow: Color = BLACK) -> None:
        """Paints a polygon of world points; without a label it only colours what is already there."""
        pixels = [self.camera.project(point) for point in points]
        depth = sum(z for _, _, z in points) / len(points)
        inks = (color, label, depth, glow) if label is not None else (color,)
        for brush, ink in zip(self.brushes, inks, strict=False):
            brush.polygon(pixels, fill=ink)

    def rectangle(
        self, x: float, y: float, z: float, w: float, h: float, color: Color, label: int | None, glow: Color = BLACK
    ) -> None:
        """An upright rectangle that faces the camera, centred on x, standing at height y."""
        self.polygon(
            [(x - w / 2, y, z), (x + w / 2, y, z), (x + w / 2, y + h, z), (x - w / 2, y + h, z)], color, label, glow
        )

    def disc(
        self, x: float, y: float, z: float, r: float, color: Color, label: int | None, glow: Color = BLACK
    ) -> None:
        turns = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        self.polygon([(x + r * math.cos(t), y + r * math.sin(t), z) for t in turns], color, label, glow)

    def side_disc(self, x: float, y: float, z: float, r: float, color: Color, label: int) -> None:
        """A disc in the plane of constant x: a wheel seen from its side."""
        turns = np.linspace(0, 2 * math.pi, 12, endpoint=False)
        self.polygon([(x, y + r * math.sin(t), z + r * math.cos(t)) for t in turns], color, label)

    def on_ground(self, x: float, z: float, w: float, length: float, color: Color) -> None:
        """Colours a strip of the ground, for a shadow or a marking; its label stays."""
        self.polygon([(x - w / 2, 0, z), (x + w / 2, 0, z), (x + w / 2, 0, z + length), (x - w / 2, 0, z + length)],
                     color, None)  # fmt: skip


def pick(rng: Generator, paint: str) -> Color:
    return PAINTS[paint][rng.integers(len(PAINTS[paint]))]


def gray(value: float) -> Color:
    return (int(value), int(value), int(value))


def mix(a: Color, b: Color, share: float) -> Color:
    return tuple(int(p + share * (q - p)) for p, q in zip(a, b, strict=True))


def shade(color: Color, factor: float) -> Color:
    return tuple(min(255, int(channel * factor)) for channel in color)


def strips(near: float, far: float, length: float) -> list[tuple[float, float]]:
    """Cuts a stretch into pieces of about `length`, the farthest first."""
    edges = np.linspace(near, far, max(1, round((far - near) / length)) + 1)
    return [(float(a), float(b)) for a, b in pairwise(edges)][::-1]
