"""Draws street scenes with exact label maps: a pinhole camera over a straight road, painted from far to near.

World coordinates are metres: x to the right, y up from the ground, z away from the camera. Labels are Cityscapes ids.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

Domain = Literal["clear", "night_fog"]
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


@dataclass(frozen=True)
class Street:
    """Half the road's width, and where sidewalks end and buildings begin, as distances from the middle at x = shift."""

    road: float
    sidewalk: float
    facade: float
    shift: float
    sun: int  # -1 or 1: the side whose facades lie in the shade


@dataclass(frozen=True)
class Stranger:
    """Something on the road that belongs to no class: what paints it at (x, z), where across (-1..1), how far away."""

    draw: Callable[[Canvas, float, float], None]
    place: float
    distance: float


def draw_scene(
    rng: Generator, size: tuple[int, int], domain: Domain, strangers: Sequence[Stranger] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image uint8 [H, W, 3] and Cityscapes label ids uint8 [H, W].

    `strangers` are drawn among the objects, and change nothing else in the scene.
    """
    height, width = (side * OVERSAMPLING for side in size)
    camera = Camera(
        width,
        height,
        focal=0.75 * width,
        elevation=rng.uniform(1.7, 2.3),
        horizon=height * rng.uniform(0.40, 0.50),
        center=width * rng.uniform(0.38, 0.62),
    )
    road = rng.uniform(3.4, 5.0)
    sidewalk = road + rng.uniform(1.8, 3.0)
    street = Street(road, sidewalk, sidewalk + rng.uniform(0.2, 2.2), rng.uniform(-1.6, 1.6), int(rng.choice([-1, 1])))
    canvas = Canvas(camera)
    draw_sky(canvas, rng)
    draw_ground(canvas, rng, street)
    draw_backdrop(canvas, rng)
    for side in (-1, 1):
        draw_roadside(canvas, rng, street, side)
    draw_objects(canvas, rng, street, strangers)
    image, labels, depth, glow = planes_at_size(canvas, size)
    image = add_texture(image, labels, rng)
    if domain == "night_fog":
        image = night_and_fog(image, depth, glow, canvas, rng)
    image += rng.normal(0, 3.0 if domain == "clear" else 5.0, image.shape)  # sensor noise
    return image.round().clip(0, 255).astype(np.uint8), labels


def planes_at_size(canvas: Canvas, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Colour float [H, W, 3], labels uint8 [H, W], depth float [H, W], glow float [H, W, 3]."""
    color, labels, depth, glow = canvas.planes
    s = OVERSAMPLING
    return (
        np.asarray(color.reduce(s), dtype=np.float64),
        np.asarray(labels)[::s, ::s].copy(),
        np.asarray(depth, dtype=np.float64)[::s, ::s],
        np.asarray(glow.reduce(s), dtype=np.float64),
    )


# --- surroundings -------------------------------------------------------------------------------------------------


def draw_sky(canvas: Canvas, rng: Generator) -> None:
    """A gradient with a few clouds."""
    camera = canvas.camera
    top = _pick(rng, "sky")
    bottom = _mix(top, (236, 236, 230), rng.uniform(0.4, 0.8))
    color, labels, depth, _ = canvas.brushes
    for row in range(int(camera.horizon) + 2):
        color.line([(0, row), (camera.width, row)], fill=_mix(top, bottom, row / camera.horizon))
    for _ in range(rng.integers(0, 5)):
        _draw_cloud(canvas, rng, _mix(bottom, (255, 255, 255), 0.5))
    labels.rectangle([0, 0, camera.width, camera.height], fill=SKY)
    depth.rectangle([0, 0, camera.width, camera.height], fill=SKY_DEPTH)


def _draw_cloud(canvas: Canvas, rng: Generator, color: Color) -> None:
    u, v = rng.uniform(0, canvas.camera.width), rng.uniform(0, 0.7 * canvas.camera.horizon)
    for _ in range(5):
        du, dv = rng.normal(0, 26), rng.normal(0, 3)
        w, h = rng.uniform(12, 36), rng.uniform(3, 8)
        canvas.brushes[0].ellipse([u + du - w, v + dv - h, u + du + w, v + dv + h], fill=color)


def draw_ground(canvas: Canvas, rng: Generator, street: Street) -> None:
    """Terrain, two sidewalks, the road and its markings, with the depth of a plane."""
    camera = canvas.camera
    grass = _mix((112, 140, 66), (160, 140, 92), rng.uniform(0, 0.8))
    asphalt = _gray(rng.uniform(84, 116))
    paving = _mix((170, 160, 152), (196, 176, 164), rng.uniform())
    near, far = 1.5, 4 * FAR
    for left, right, color, label in (
        (-300, 300, grass, TERRAIN),
        (street.shift - street.sidewalk, street.shift + street.sidewalk, paving, SIDEWALK),
        (street.shift - street.road - 0.18, street.shift + street.road + 0.18, _shade(paving, 0.72), SIDEWALK),  # curb
        (street.shift - street.road, street.shift + street.road, asphalt, ROAD),
    ):
        canvas.polygon([(left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)], color, label)
    _draw_paving_joints(canvas, street, _shade(paving, 0.88))
    _draw_markings(canvas, rng, street)
    rows = np.arange(camera.height) + 0.5
    plane = camera.focal * camera.elevation / np.maximum(rows - camera.horizon, 1e-3)
    column = Image.fromarray(np.minimum(plane, SKY_DEPTH).astype(np.float32)[:, None])
    below = int(camera.horizon) + 1
    ground = column.resize((camera.width, camera.height), Image.Resampling.NEAREST)
    canvas.planes[2].paste(ground.crop((0, below, camera.width, camera.height)), (0, below))


def _draw_paving_joints(canvas: Canvas, street: Street, color: Color) -> None:
    for z in np.arange(4.0, 30.0, 1.5):
        for side in (-1, 1):
            inner, outer = street.shift + side * (street.road + 0.2), street.shift + side * street.sidewalk
            canvas.polygon([(inner, 0, z), (outer, 0, z), (outer, 0, z + 0.12), (inner, 0, z + 0.12)], color, None)


def _draw_markings(canvas: Canvas, rng: Generator, street: Street) -> None:
    white = _gray(rng.uniform(196, 232))
    for z in np.arange(rng.uniform(2, 5), 70, 6.0):
        canvas.on_ground(street.shift, z, 0.16, 3.0, white)
    for side in (-1, 1):
        canvas.on_ground(street.shift + side * (street.road - 0.35), 1.5, 0.12, 150.0, white)
    if rng.random() < 0.3:  # a crosswalk
        z = rng.uniform(8, 22)
        for x in np.arange(-street.road + 0.5, street.road - 0.3, 0.9):
            canvas.on_ground(street.shift + x, z, 0.45, 2.6, white)


def draw_backdrop(canvas: Canvas, rng: Generator) -> None:
    """Houses and trees where the street ends."""
    x = -130.0
    while x < 130:
        w, h = rng.uniform(6, 22), rng.uniform(4, 15)
        if rng.random() < 0.55:
            canvas.rectangle(x + w / 2, 0, FAR + 20, w, h, _mix(_pick(rng, "facade"), (170, 180, 190), 0.4), BUILDING)
        else:
            leaf = _mix(_pick(rng, "leaf"), (150, 170, 170), 0.3)
            for _ in range(3):
                canvas.disc(x + rng.uniform(0, w), h * 0.35, FAR + 15, rng.uniform(3, 7), leaf, VEGETATION)
        x += w * 0.9


def draw_roadside(canvas: Canvas, rng: Generator, street: Street, side: int) -> None:
    """Houses, parks, walls and fences along one side, from far to near."""
    ends = [rng.uniform(3.0, 7.0)]
    while ends[-1] < FAR:
        ends.append(ends[-1] + rng.uniform(8, 18))
    x = street.shift + side * street.facade
    for near, far in zip(ends[-2::-1], ends[:0:-1], strict=True):
        kind = rng.choice(["building", "park", "wall", "fence"], p=[0.50, 0.16, 0.16, 0.18])
        if kind == "building":
            draw_building(canvas, rng, x, near, far, side, shaded=side == street.sun)
            continue
        for z in np.sort(rng.uniform(near, far, 3))[::-1]:
            draw_tree(canvas, rng, x + side * rng.uniform(2.0, 6.0), z, bushy=bool(rng.random() < 0.4))
        if kind == "wall":
            draw_wall(canvas, rng, x, near, far)
        elif kind == "fence":
            draw_fence(canvas, rng, x, near, far)


def draw_building(canvas: Canvas, rng: Generator, x: float, near: float, far: float, side: int, shaded: bool) -> None:
    """A box with window columns on the facade along the street and on the end that faces the camera."""
    color = _shade(_pick(rng, "facade"), rng.uniform(0.85, 1.1))
    facade, end = _shade(color, 0.72 if shaded else 1.0), _shade(color, 0.86)
    storeys = int(rng.integers(2, 7))
    height = 3.0 * storeys + 0.8
    glass = _mix((60, 74, 92), (150, 176, 200), rng.uniform(0, 0.8))
    columns = max(2, round((far - near) / 2.6))
    edges = np.linspace(near, far, columns + 1)
    lit = rng.random((columns, storeys)) < 0.3
    for column in range(columns)[::-1]:  # one strip a column, so that each has its own depth
        z0, z1 = edges[column], edges[column + 1]
        canvas.polygon([(x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0)], facade, BUILDING)
        a, b = z0 + 0.25 * (z1 - z0), z1 - 0.25 * (z1 - z0)
        for storey in range(storeys):
            y0, y1 = 3.0 * storey + 1.0, 3.0 * storey + 2.4
            if storey == 0:
                y0 = 0.1 if lit[column, 0] else 0.8  # a door or a shop window
            glow = WARM if lit[column, storey] else BLACK
            canvas.polygon([(x, y0, a), (x, y0, b), (x, y1, b), (x, y1, a)], glass, BUILDING, _shade(glow, 0.75))
        canvas.polygon([(x, height - 0.5, z0), (x, height - 0.5, z1), (x, height, z1), (x, height, z0)],
                       _shade(facade, 0.75), BUILDING)  # fmt: skip
    depth = 14.0
    canvas.rectangle(x + side * depth / 2, 0, near, depth, height, end, BUILDING)
    canvas.rectangle(x + side * depth / 2, height - 0.5, near, depth, 0.5, _shade(end, 0.75), BUILDING)
    for offset in np.arange(1.5, depth, 3.2):
        for storey in range(storeys):
            glow = WARM if rng.random() < 0.2 else BLACK
            canvas.rectangle(x + side * offset, 3.0 * storey + 1.0, near, 1.2, 1.4, glass, BUILDING, _shade(glow, 0.75))


def draw_wall(canvas: Canvas, rng: Generator, x: float, near: float, far: float) -> None:
    """A wall along the street, in strips."""
    color, height = _mix((150, 146, 140), (172, 128, 104), rng.uniform()), rng.uniform(1.4, 2.6)
    for z0, z1 in _strips(near, far, 3.0):
        canvas.polygon([(x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0)], color, WALL)
        canvas.polygon([(x, height - 0.2, z0), (x, height - 0.2, z1), (x, height, z1), (x, height, z0)],
                       _shade(color, 1.2), WALL)  # fmt: skip
    canvas.rectangle(x, 0, near, 0.4, height, _shade(color, 0.8), WALL)


def draw_fence(canvas: Canvas, rng: Generator, x: float, near: float, far: float) -> None:
    """Pickets and rails; as in Cityscapes, the gaps belong to the fence."""
    wood, height = _mix((126, 92, 62), (188, 182, 170), rng.uniform()), rng.uniform(1.2, 1.8)
    gap = _shade(wood, 0.55)
    for z0, z1 in _strips(near, far, 0.7):
        canvas.polygon([(x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0)], gap, FENCE)
        mid = z0 + 0.5 * (z1 - z0)
        canvas.polygon([(x, 0, z0), (x, 0, mid), (x, height, mid), (x, height, z0)], wood, FENCE)
    canvas.polygon([(x, height - 0.3, near), (x, height - 0.3, far), (x, height - 0.1, far), (x, height - 0.1, near)],
                   _shade(wood, 1.1), None)  # fmt: skip


def draw_tree(canvas: Canvas, rng: Generator, x: float, z: float, bushy: bool = False) -> None:
    """A trunk and a crown of blobs."""
    leaf = _pick(rng, "leaf")
    trunk = 0.3 if bushy else rng.uniform(1.8, 3.0)
    crown = rng.uniform(0.7, 1.2) if bushy else rng.uniform(1.3, 2.3)
    if not bushy:
        canvas.rectangle(x, 0, z, 0.36, trunk + crown, (88, 66, 48), VEGETATION)
    for k in range(9):
        dx, dy = rng.normal(0, 0.5 * crown), abs(rng.normal(0, 0.6 * crown))
        light = 0.78 + 0.05 * k + 0.08 * dy / crown  # later tufts are nearer the light
        canvas.disc(x + dx, trunk + 0.4 * crown + dy, z, crown * rng.uniform(0.4, 0.7), _shade(leaf, light), VEGETATION)


# --- objects ------------------------------------------------------------------------------------------------------


def draw_objects(canvas: Canvas, rng: Generator, street: Street, strangers: Sequence[Stranger] = ()) -> None:
    """Everything that stands or moves, from far to near, without two things in one place (but for strangers)."""
    middle, curb = street.road / 2, (street.road + street.sidewalk) / 2
    planned = []
    for side in (-1, 1):
        kerb, lane = street.shift + side * (street.road + 0.4), street.shift + side * middle
        parked = street.shift + side * (street.road - 1.0)
        towards = side < 0  # traffic keeps to the right
        planned += [(z, draw_lamp, (kerb, -side)) for z in np.arange(rng.uniform(8, 20), 70, rng.uniform(16, 24))]
        planned += [(z, draw_tree, (street.shift + side * (street.sidewalk - 0.3),)) for z in _spots(rng, 2, 9, 50)]
        planned += [(z, draw_sign, (kerb,)) for z in _spots(rng, 2, 7, 32)]
        planned += [(z, draw_traffic_light, (kerb,)) for z in _spots(rng, 1, 8, 28)]
        planned += [(z, draw_person, (street.shift + side * (curb + rng.uniform(-0.5, 0.5)),))
                    for z in _spots(rng, 4, 6.5, 28)]  # fmt: skip
        planned += [(z, draw_bin, (street.shift + side * (street.sidewalk - 0.4),)) for z in _spots(rng, 1, 8, 25)]
        vehicles = [draw_car, draw_car, draw_car, draw_truck, draw_bus]
        for z in _apart(_spots(rng, 3, 8, 45), 9.0):
            planned.append((z, vehicles[rng.integers(len(vehicles))], (lane, towards)))
        if street.road > 4.0 and rng.random() < 0.6:
            planned += [(z, draw_car, (parked, towards)) for z in _apart(_spots(rng, 4, 9, 40), 6.0)]
        else:
            planned += [(z, draw_cyclist, (parked,)) for z in _spots(rng, 1, 7, 22)]
    if rng.random() < 0.35:
        planned.append((rng.uniform(7, 16), draw_person, (street.shift + rng.uniform(-1, 1) * street.road,)))
    for stranger in strangers:
        x = street.shift + stranger.place * street.road
        planned.append((stranger.distance, lambda canvas, _, x, z, draw=stranger.draw: draw(canvas, x, z), (x,)))
    for z, draw, where in sorted(planned, key=lambda entry: -entry[0]):
        x, *rest = where
        draw(canvas, rng, x, float(z), *rest)


def draw_lamp(canvas: Canvas, rng: Generator, x: float, z: float, inwards: int) -> None:
    """A street lamp that leans over the road."""
    metal, height, reach = _gray(rng.uniform(70, 110)), 6.0, 1.6 * inwards
    canvas.rectangle(x, 0, z, 0.22, height, metal, POLE)
    canvas.polygon([(x, height - 0.2, z), (x + reach, height, z), (x + reach, height + 0.16, z), (x, height, z)],
                   metal, POLE)  # fmt: skip
    canvas.rectangle(x + reach, height - 0.2, z, 0.9, 0.28, (210, 208, 196), POLE, glow=(255, 200, 120))
    canvas.lamps.append((*canvas.camera.project((x + reach, 0, z)), z))


def draw_sign(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """A sign on its pole: triangle, circle or rectangle."""
    canvas.rectangle(x, 0, z, 0.14, 2.3, _gray(130), POLE)
    kind = rng.integers(3)
    if kind == 0:  # a round prohibition
        canvas.disc(x, 2.6, z, 0.5, (204, 30, 36), TRAFFIC_SIGN)
        canvas.disc(x, 2.6, z, 0.33, (240, 240, 236), TRAFFIC_SIGN)
    elif kind == 1:  # a blue panel
        canvas.rectangle(x, 2.1, z, 0.95, 0.95, (26, 84, 178), TRAFFIC_SIGN)
        canvas.rectangle(x, 2.45, z, 0.55, 0.3, (236, 240, 244), TRAFFIC_SIGN)
    else:  # a yellow warning
        canvas.polygon([(x - 0.6, 2.1, z), (x + 0.6, 2.1, z), (x, 3.2, z)], (204, 30, 36), TRAFFIC_SIGN)
        canvas.polygon([(x - 0.36, 2.24, z), (x + 0.36, 2.24, z), (x, 2.9, z)], (246, 214, 64), TRAFFIC_SIGN)


def draw_traffic_light(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """A traffic light on its pole, one lamp lit."""
    canvas.rectangle(x, 0, z, 0.16, 2.6, _gray(74), POLE)
    canvas.rectangle(x, 2.5, z, 0.62, 1.6, (34, 36, 38), TRAFFIC_LIGHT)
    on = rng.integers(3)
    for k, color in enumerate(((60, 220, 120), (250, 200, 50), (240, 50, 40))):
        shown = color if k == on else _shade(color, 0.3)
        canvas.disc(x, 2.78 + 0.5 * k, z, 0.2, shown, TRAFFIC_LIGHT, color if k == on else BLACK)


def draw_bin(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """A bin: `static` in Cityscapes, so it is ignored."""
    canvas.rectangle(x, 0, z, 0.6, 1.0, _mix((60, 66, 62), (110, 70, 40), rng.uniform()), STATIC)
    canvas.rectangle(x, 1.0, z, 0.7, 0.12, (40, 42, 42), STATIC)


def draw_person(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """Somebody who stands on the pavement."""
    size = rng.uniform(0.9, 1.08)
    top, trousers, skin = _pick(rng, "cloth"), _shade(_pick(rng, "cloth"), 0.6), _pick(rng, "skin")
    stride = rng.uniform(0.05, 0.16) * size
    canvas.on_ground(x, z - 0.1, 0.7, 0.35, (66, 66, 70))
    for leg in (-1, 1):
        canvas.rectangle(x + leg * stride, 0, z, 0.2 * size, 0.9 * size, trousers, PERSON)
    canvas.rectangle(x, 0.8 * size, z, 0.5 * size, 0.68 * size, top, PERSON)
    for arm in (-1, 1):
        canvas.rectangle(x + arm * 0.31 * size, 0.75 * size, z, 0.14 * size, 0.66 * size, _shade(top, 0.82), PERSON)
    canvas.disc(x, 1.62 * size, z, 0.17 * size, skin, PERSON)
    canvas.rectangle(x, 1.68 * size, z, 0.3 * size, 0.13 * size, _shade(skin, 0.35), PERSON)


def draw_cyclist(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """Seen from behind: one wheel, the frame, and the rider on it."""
    canvas.on_ground(x, z - 0.2, 0.6, 1.4, (60, 60, 64))
    canvas.rectangle(x, 0, z, 0.2, 0.75, (28, 28, 30), BICYCLE)
    canvas.rectangle(x, 0.62, z, 0.34, 0.26, _pick(rng, "car"), BICYCLE)
    canvas.rectangle(x, 1.0, z, 0.9, 0.1, (50, 50, 54), BICYCLE)
    top, skin = _pick(rng, "cloth"), _pick(rng, "skin")
    for leg in (-1, 1):
        canvas.rectangle(x + leg * 0.2, 0.25 + 0.12 * (leg > 0), z, 0.18, 0.75, _shade(top, 0.5), RIDER)
    canvas.rectangle(x, 0.95, z, 0.56, 0.7, top, RIDER)
    canvas.disc(x, 1.82, z, 0.19, skin, RIDER)
    canvas.disc(x, 1.9, z, 0.18, _pick(rng, "car"), RIDER)


def draw_car(canvas: Canvas, rng: Generator, x: float, z: float, towards: bool) -> None:
    """A lower body and a narrower cabin, with windows, wheels and lights."""
    paint = _pick(rng, "car")
    glass, half, z1 = (44, 54, 66), 0.92, z + 4.2
    canvas.on_ground(x, z - 0.2, 2.1, 4.6, (46, 46, 50))
    inner = x - math.copysign(half, x)  # the flank that the camera sees
    flank, cabin = _shade(paint, 0.78), inner - math.copysign(0.12, inner - x)
    canvas.polygon([(inner, 0.25, z), (inner, 0.25, z1), (inner, 0.9, z1), (inner, 0.98, z)], flank, CAR)
    canvas.polygon([(cabin, 0.95, z + 0.2), (cabin, 0.9, z1 - 1.0), (cabin, 1.45, z1 - 1.7), (cabin, 1.45, z + 0.7)],
                   glass, CAR)  # fmt: skip
    for wheel in (z1 - 0.8, z + 0.8):
        canvas.side_disc(inner, 0.34, wheel, 0.34, (24, 24, 26), CAR)
        canvas.side_disc(inner, 0.34, wheel, 0.17, (128, 128, 132), CAR)
    for wheel in (-1, 1):
        canvas.rectangle(x + wheel * 0.68, 0, z, 0.3, 0.4, (24, 24, 26), CAR)
    y = 0.98
    canvas.polygon([(x - 0.84, y, z), (x + 0.84, y, z), (x + 0.62, 1.5, z + 0.5), (x - 0.62, 1.5, z + 0.5)],
                   _shade(paint, 1.05), CAR)  # fmt: skip
    canvas.polygon([(x - 0.7, 1.02, z), (x + 0.7, 1.02, z), (x + 0.54, 1.43, z + 0.5), (x - 0.54, 1.43, z + 0.5)],
                   glass, CAR)  # fmt: skip
    canvas.rectangle(x, 0.28, z, 2 * half, 0.72, paint, CAR)
    canvas.rectangle(x, 0.28, z, 2 * half, 0.18, _shade(paint, 0.55), CAR)
    canvas.rectangle(x, 0.45, z, 0.5, 0.14, (224, 224, 216), CAR)
    _draw_vehicle_lights(canvas, x, 0.68, z, 0.72, towards, CAR)


def draw_truck(canvas: Canvas, rng: Generator, x: float, z: float, towards: bool) -> None:
    """A lorry, seen from the front or the back."""
    paint = _pick(rng, "truck")
    _draw_big_box(canvas, x, z, width=2.4, bottom=0.7, top=3.3, length=7.0, paint=paint, label=TRUCK)
    if towards:  # the cab with its windscreen
        canvas.rectangle(x, 0.5, z, 2.3, 2.2, _shade(paint, 0.7), TRUCK)
        canvas.rectangle(x, 1.7, z, 1.9, 0.8, (44, 54, 66), TRUCK)
    else:  # two doors
        canvas.rectangle(x, 0.8, z, 0.06, 2.4, _shade(paint, 0.6), TRUCK)
        canvas.rectangle(x, 0.5, z, 2.4, 0.25, (60, 60, 62), TRUCK)
    _draw_vehicle_lights(canvas, x, 0.75, z, 0.95, towards, TRUCK)


def draw_bus(canvas: Canvas, rng: Generator, x: float, z: float, towards: bool) -> None:
    """A bus, seen from the front or the back."""
    paint, glass = _pick(rng, "bus"), (48, 58, 72)
    _draw_big_box(canvas, x, z, width=2.5, bottom=0.35, top=3.0, length=10.0, paint=paint, label=BUS)
    flank = x - math.copysign(1.25, x)
    for z0, z1 in _strips(z + 0.4, z + 9.6, 1.6):
        canvas.polygon([(flank, 1.5, z0), (flank, 1.5, z1 - 0.3), (flank, 2.5, z1 - 0.3), (flank, 2.5, z0)], glass, BUS,
                       _shade(WARM, 0.35))  # fmt: skip
    canvas.rectangle(x, 1.5, z, 2.2, 1.05, glass, BUS, _shade(WARM, 0.2))
    canvas.rectangle(x, 2.62, z, 1.4, 0.26, (250, 190, 60), BUS, (200, 140, 30))
    _draw_vehicle_lights(canvas, x, 0.8, z, 1.0, towards, BUS)


def _draw_big_box(
    canvas: Canvas, x: float, z: float, width: float, bottom: float, top: float, length: float, paint: Color, label: int
) -> None:
    canvas.on_ground(x, z - 0.2, width + 0.3, length + 0.4, (46, 46, 50))
    flank = x - math.copysign(width / 2, x)
    for z0, z1 in _strips(z, z + length, 2.5):
        canvas.polygon([(flank, bottom, z0), (flank, bottom, z1), (flank, top, z1), (flank, top, z0)],
                       _shade(paint, 0.74), label)  # fmt: skip
    for wheel in (z + length - 1.4, z + 1.4):
        canvas.side_disc(flank, 0.48, wheel, 0.48, (24, 24, 26), label)
        canvas.side_disc(flank, 0.48, wheel, 0.22, (120, 120, 124), label)
    for wheel in (-1, 1):
        canvas.rectangle(x + wheel * 0.38 * width, 0, z, 0.36, bottom + 0.1, (24, 24, 26), label)
    canvas.rectangle(x, bottom, z, width, top - bottom, paint, label)


def _draw_vehicle_lights(
    canvas: Canvas, x: float, y: float, z: float, spread: float, towards: bool, label: int
) -> None:
    color, glow = ((244, 240, 214), (255, 246, 220)) if towards else ((176, 20, 24), (220, 24, 24))
    for side in (-1, 1):
        canvas.rectangle(x + side * spread, y, z, 0.3, 0.18, color, label, glow)


# --- light and weather --------------------------------------------------------------------------------------------

ROUGHNESS = {VEGETATION: 22.0, TERRAIN: 14.0, BUILDING: 8.0, WALL: 9.0, ROAD: 6.0, SIDEWALK: 7.0, SKY: 1.5}


def add_texture(image: np.ndarray, labels: np.ndarray, rng: Generator) -> np.ndarray:
    """Adds brightness noise of two scales, as strong as each surface is rough, and a little light from one side."""
    height, width = labels.shape
    strength = np.full(256, 4.0)
    for label, value in ROUGHNESS.items():
        strength[label] = value
    noise = 0.6 * _smooth_noise(rng, height, width, 3) + 0.7 * _smooth_noise(rng, height, width, 16)
    light = 1 + rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, width)[None, :, None]
    tint = rng.uniform(0.94, 1.06, 3)
    return (image + (strength[labels] * noise)[..., None]) * light * tint


def night_and_fog(image: np.ndarray, depth: np.ndarray, glow: np.ndarray, canvas: Canvas, rng: Generator) -> np.ndarray:
    """Moonlight, the car's own headlights, street lamps, fog that thickens with depth, and bloom around lights."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width] + 0.5
    moon = np.array([0.17, 0.21, 0.33]) * rng.uniform(0.8, 1.3)
    lamp = np.array([1.0, 0.66, 0.34])
    camera = canvas.camera
    beam = np.exp(-(((u * OVERSAMPLING - camera.center) / (0.42 * camera.width)) ** 2) - depth / 13.0)
    light = moon + 0.75 * beam[..., None] * np.array([1.0, 0.95, 0.8])
    for lamp_u, lamp_v, z in canvas.lamps:
        reach = 3.2 * camera.focal / z / OVERSAMPLING
        apart = ((u - lamp_u / OVERSAMPLING) / reach) ** 2 + ((v - lamp_v / OVERSAMPLING) / (0.6 * reach)) ** 2
        light = light + 0.5 * np.exp(-apart)[..., None] * lamp
    fog = np.array([54, 61, 80]) * (1 - (warmth := rng.uniform(0, 0.6))) + np.array([96, 75, 56]) * warmth
    clarity = np.exp(-depth / rng.uniform(16, 34))[..., None]
    fogged = image * light * clarity + fog * (1 - clarity)
    shine = glow * np.sqrt(clarity)
    return fogged + 0.9 * shine + 0.8 * _blur(shine, height / 51) + 1.0 * _blur(shine, height / 14)


def _blur(image: np.ndarray, radius: float) -> np.ndarray:
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)


def _smooth_noise(rng: Generator, height: int, width: int, grain: int) -> np.ndarray:
    """Normal noise [height, width] with blobs of about `grain` pixels."""
    coarse = rng.normal(0, 1, (height // grain + 2, width // grain + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)


# --- small helpers ------------------------------------------------------------------------------------------------


def _pick(rng: Generator, paint: str) -> Color:
    return PAINTS[paint][rng.integers(len(PAINTS[paint]))]


def _gray(value: float) -> Color:
    return (int(value), int(value), int(value))


def _mix(a: Color, b: Color, share: float) -> Color:
    return tuple(int(p + share * (q - p)) for p, q in zip(a, b, strict=True))


def _shade(color: Color, factor: float) -> Color:
    return tuple(min(255, int(channel * factor)) for channel in color)


def _strips(near: float, far: float, length: float) -> list[tuple[float, float]]:
    """Cuts a stretch into pieces of about `length`, the farthest first."""
    edges = np.linspace(near, far, max(1, round((far - near) / length)) + 1)
    return [(float(a), float(b)) for a, b in pairwise(edges)][::-1]


def _spots(rng: Generator, most: int, near: float, far: float) -> list[float]:
    """Up to `most` depths, denser near the camera."""
    count = int(rng.integers(0, most + 1))
    return [float(z) for z in near * (far / near) ** rng.uniform(0, 1, count)]


def _apart(depths: list[float], gap: float) -> list[float]:
    """Drops depths that come within `gap` of a nearer one."""
    kept: list[float] = []
    for z in sorted(depths):
        if not kept or z - kept[-1] >= gap:
            kept.append(z)
    return kept
