"""Things that stand or move on a street: people, vehicles, lamps, signs, and their places."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from eomt.toys.canvas import (
    BICYCLE,
    BLACK,
    BUS,
    CAR,
    PERSON,
    POLE,
    RIDER,
    STATIC,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    TRUCK,
    WARM,
    Canvas,
    Color,
    gray,
    mix,
    pick,
    shade,
    strips,
)
from eomt.toys.surroundings import Street, draw_tree


@dataclass(frozen=True)
class Stranger:
    """Something on the road that belongs to no class: what paints it at (x, z), where across (-1..1), how far away."""

    draw: Callable[[Canvas, float, float], None]
    place: float
    distance: float


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
    metal, height, reach = gray(rng.uniform(70, 110)), 6.0, 1.6 * inwards
    canvas.rectangle(x, 0, z, 0.22, height, metal, POLE)
    canvas.polygon([(x, height - 0.2, z), (x + reach, height, z), (x + reach, height + 0.16, z), (x, height, z)],
                   metal, POLE)  # fmt: skip
    canvas.rectangle(x + reach, height - 0.2, z, 0.9, 0.28, (210, 208, 196), POLE, glow=(255, 200, 120))
    canvas.lamps.append((*canvas.camera.project((x + reach, 0, z)), z))


def draw_sign(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """A sign on its pole: triangle, circle or rectangle."""
    canvas.rectangle(x, 0, z, 0.14, 2.3, gray(130), POLE)
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
    canvas.rectangle(x, 0, z, 0.16, 2.6, gray(74), POLE)
    canvas.rectangle(x, 2.5, z, 0.62, 1.6, (34, 36, 38), TRAFFIC_LIGHT)
    on = rng.integers(3)
    for k, color in enumerate(((60, 220, 120), (250, 200, 50), (240, 50, 40))):
        shown = color if k == on else shade(color, 0.3)
        canvas.disc(x, 2.78 + 0.5 * k, z, 0.2, shown, TRAFFIC_LIGHT, color if k == on else BLACK)


def draw_bin(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """A bin: `static` in Cityscapes, so it is ignored."""
    canvas.rectangle(x, 0, z, 0.6, 1.0, mix((60, 66, 62), (110, 70, 40), rng.uniform()), STATIC)
    canvas.rectangle(x, 1.0, z, 0.7, 0.12, (40, 42, 42), STATIC)


def draw_person(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """Somebody who stands on the pavement."""
    size = rng.uniform(0.9, 1.08)
    top, trousers, skin = pick(rng, "cloth"), shade(pick(rng, "cloth"), 0.6), pick(rng, "skin")
    stride = rng.uniform(0.05, 0.16) * size
    canvas.on_ground(x, z - 0.1, 0.7, 0.35, (66, 66, 70))
    for leg in (-1, 1):
        canvas.rectangle(x + leg * stride, 0, z, 0.2 * size, 0.9 * size, trousers, PERSON)
    canvas.rectangle(x, 0.8 * size, z, 0.5 * size, 0.68 * size, top, PERSON)
    for arm in (-1, 1):
        canvas.rectangle(x + arm * 0.31 * size, 0.75 * size, z, 0.14 * size, 0.66 * size, shade(top, 0.82), PERSON)
    canvas.disc(x, 1.62 * size, z, 0.17 * size, skin, PERSON)
    canvas.rectangle(x, 1.68 * size, z, 0.3 * size, 0.13 * size, shade(skin, 0.35), PERSON)


def draw_cyclist(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    """Seen from behind: one wheel, the frame, and the rider on it."""
    canvas.on_ground(x, z - 0.2, 0.6, 1.4, (60, 60, 64))
    canvas.rectangle(x, 0, z, 0.2, 0.75, (28, 28, 30), BICYCLE)
    canvas.rectangle(x, 0.62, z, 0.34, 0.26, pick(rng, "car"), BICYCLE)
    canvas.rectangle(x, 1.0, z, 0.9, 0.1, (50, 50, 54), BICYCLE)
    top, skin = pick(rng, "cloth"), pick(rng, "skin")
    for leg in (-1, 1):
        canvas.rectangle(x + leg * 0.2, 0.25 + 0.12 * (leg > 0), z, 0.18, 0.75, shade(top, 0.5), RIDER)
    canvas.rectangle(x, 0.95, z, 0.56, 0.7, top, RIDER)
    canvas.disc(x, 1.82, z, 0.19, skin, RIDER)
    canvas.disc(x, 1.9, z, 0.18, pick(rng, "car"), RIDER)


def draw_car(canvas: Canvas, rng: Generator, x: float, z: float, towards: bool) -> None:
    """A lower body and a narrower cabin, with windows, wheels and lights."""
    paint = pick(rng, "car")
    glass, half, z1 = (44, 54, 66), 0.92, z + 4.2
    canvas.on_ground(x, z - 0.2, 2.1, 4.6, (46, 46, 50))
    inner = x - math.copysign(half, x)  # the flank that the camera sees
    flank, cabin = shade(paint, 0.78), inner - math.copysign(0.12, inner - x)
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
                   shade(paint, 1.05), CAR)  # fmt: skip
    canvas.polygon([(x - 0.7, 1.02, z), (x + 0.7, 1.02, z), (x + 0.54, 1.43, z + 0.5), (x - 0.54, 1.43, z + 0.5)],
                   glass, CAR)  # fmt: skip
    canvas.rectangle(x, 0.28, z, 2 * half, 0.72, paint, CAR)
    canvas.rectangle(x, 0.28, z, 2 * half, 0.18, shade(paint, 0.55), CAR)
    canvas.rectangle(x, 0.45, z, 0.5, 0.14, (224, 224, 216), CAR)
    _draw_vehicle_lights(canvas, x, 0.68, z, 0.72, towards, CAR)


def draw_truck(canvas: Canvas, rng: Generator, x: float, z: float, towards: bool) -> None:
    """A lorry, seen from the front or the back."""
    paint = pick(rng, "truck")
    _draw_big_box(canvas, x, z, width=2.4, bottom=0.7, top=3.3, length=7.0, paint=paint, label=TRUCK)
    if towards:  # the cab with its windscreen
        canvas.rectangle(x, 0.5, z, 2.3, 2.2, shade(paint, 0.7), TRUCK)
        canvas.rectangle(x, 1.7, z, 1.9, 0.8, (44, 54, 66), TRUCK)
    else:  # two doors
        canvas.rectangle(x, 0.8, z, 0.06, 2.4, shade(paint, 0.6), TRUCK)
        canvas.rectangle(x, 0.5, z, 2.4, 0.25, (60, 60, 62), TRUCK)
    _draw_vehicle_lights(canvas, x, 0.75, z, 0.95, towards, TRUCK)


def draw_bus(canvas: Canvas, rng: Generator, x: float, z: float, towards: bool) -> None:
    """A bus, seen from the front or the back."""
    paint, glass = pick(rng, "bus"), (48, 58, 72)
    _draw_big_box(canvas, x, z, width=2.5, bottom=0.35, top=3.0, length=10.0, paint=paint, label=BUS)
    flank = x - math.copysign(1.25, x)
    for z0, z1 in strips(z + 0.4, z + 9.6, 1.6):
        canvas.polygon([(flank, 1.5, z0), (flank, 1.5, z1 - 0.3), (flank, 2.5, z1 - 0.3), (flank, 2.5, z0)], glass, BUS,
                       shade(WARM, 0.35))  # fmt: skip
    canvas.rectangle(x, 1.5, z, 2.2, 1.05, glass, BUS, shade(WARM, 0.2))
    canvas.rectangle(x, 2.62, z, 1.4, 0.26, (250, 190, 60), BUS, (200, 140, 30))
    _draw_vehicle_lights(canvas, x, 0.8, z, 1.0, towards, BUS)


def _draw_big_box(
    canvas: Canvas, x: float, z: float, width: float, bottom: float, top: float, length: float, paint: Color, label: int
) -> None:
    canvas.on_ground(x, z - 0.2, width + 0.3, length + 0.4, (46, 46, 50))
    flank = x - math.copysign(width / 2, x)
    for z0, z1 in strips(z, z + length, 2.5):
        canvas.polygon([(flank, bottom, z0), (flank, bottom, z1), (flank, top, z1), (flank, top, z0)],
                       shade(paint, 0.74), label)  # fmt: skip
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
