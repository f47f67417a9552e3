"""Draws street scenes with exact label maps: a pinhole camera over a straight road, painted from far to near."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.random import Generator

from eomt.toys.canvas import OVERSAMPLING, Camera, Canvas
from eomt.toys.surroundings import Street, draw_backdrop, draw_ground, draw_roadside, draw_sky
from eomt.toys.things import Stranger, draw_objects
from eomt.toys.weather import add_texture, night_and_fog

Domain = Literal["clear", "night_fog"]


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
