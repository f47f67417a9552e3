"""The surroundings of a street: sky, ground and its markings, and the houses, walls, fences and trees beside it."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image

from eomt.toys.canvas import (
    BLACK,
    BUILDING,
    FAR,
    FENCE,
    ROAD,
    SIDEWALK,
    SKY,
    SKY_DEPTH,
    TERRAIN,
    VEGETATION,
    WALL,
    WARM,
    Canvas,
    Color,
    gray,
    mix,
    pick,
    shade,
    strips,
)


@dataclass(frozen=True)
class Street:
    """Half the road's width, and where sidewalks end and buildings begin, as distances from the middle at x = shift."""

    road: float
    sidewalk: float
    facade: float
    shift: float
    sun: int  # -1 or 1: the side whose facades lie in the shade


def draw_sky(canvas: Canvas, rng: Generator) -> None:
    """A gradient with a few clouds."""
    camera = canvas.camera
    top = pick(rng, "sky")
    bottom = mix(top, (236, 236, 230), rng.uniform(0.4, 0.8))
    color, labels, depth, _ = canvas.brushes
    for row in range(int(camera.horizon) + 2):
        color.line([(0, row), (camera.width, row)], fill=mix(top, bottom, row / camera.horizon))
    for _ in range(rng.integers(0, 5)):
        _draw_cloud(canvas, rng, mix(bottom, (255, 255, 255), 0.5))
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
    grass = mix((112, 140, 66), (160, 140, 92), rng.uniform(0, 0.8))
    asphalt = gray(rng.uniform(84, 116))
    paving = mix((170, 160, 152), (196, 176, 164), rng.uniform())
    near, far = 1.5, 4 * FAR
    for left, right, color, label in (
        (-300, 300, grass, TERRAIN),
        (street.shift - street.sidewalk, street.shift + street.sidewalk, paving, SIDEWALK),
        (street.shift - street.road - 0.18, street.shift + street.road + 0.18, shade(paving, 0.72), SIDEWALK),  # curb
        (street.shift - street.road, street.shift + street.road, asphalt, ROAD),
    ):
        canvas.polygon([(left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)], color, label)
    _draw_paving_joints(canvas, street, shade(paving, 0.88))
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
    white = gray(rng.uniform(196, 232))
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
            canvas.rectangle(x + w / 2, 0, FAR + 20, w, h, mix(pick(rng, "facade"), (170, 180, 190), 0.4), BUILDING)
        else:
            leaf = mix(pick(rng, "leaf"), (150, 170, 170), 0.3)
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
    color = shade(pick(rng, "facade"), rng.uniform(0.85, 1.1))
    facade, end = shade(color, 0.72 if shaded else 1.0), shade(color, 0.86)
    storeys = int(rng.integers(2, 7))
    height = 3.0 * storeys + 0.8
    glass = mix((60, 74, 92), (150, 176, 200), rng.uniform(0, 0.8))
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
            canvas.polygon([(x, y0, a), (x, y0, b), (x, y1, b), (x, y1, a)], glass, BUILDING, shade(glow, 0.75))
        canvas.polygon([(x, height - 0.5, z0), (x, height - 0.5, z1), (x, height, z1), (x, height, z0)],
                       shade(facade, 0.75), BUILDING)  # fmt: skip
    depth = 14.0
    canvas.rectangle(x + side * depth / 2, 0, near, depth, height, end, BUILDING)
    canvas.rectangle(x + side * depth / 2, height - 0.5, near, depth, 0.5, shade(end, 0.75), BUILDING)
    for offset in np.arange(1.5, depth, 3.2):
        for storey in range(storeys):
            glow = WARM if rng.random() < 0.2 else BLACK
            canvas.rectangle(x + side * offset, 3.0 * storey + 1.0, near, 1.2, 1.4, glass, BUILDING, shade(glow, 0.75))


def draw_wall(canvas: Canvas, rng: Generator, x: float, near: float, far: float) -> None:
    """A wall along the street, in strips."""
    color, height = mix((150, 146, 140), (172, 128, 104), rng.uniform()), rng.uniform(1.4, 2.6)
    for z0, z1 in strips(near, far, 3.0):
        canvas.polygon([(x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0)], color, WALL)
        canvas.polygon([(x, height - 0.2, z0), (x, height - 0.2, z1), (x, height, z1), (x, height, z0)],
                       shade(color, 1.2), WALL)  # fmt: skip
    canvas.rectangle(x, 0, near, 0.4, height, shade(color, 0.8), WALL)


def draw_fence(canvas: Canvas, rng: Generator, x: float, near: float, far: float) -> None:
    """Pickets and rails; as in Cityscapes, the gaps belong to the fence."""
    wood, height = mix((126, 92, 62), (188, 182, 170), rng.uniform()), rng.uniform(1.2, 1.8)
    gap = shade(wood, 0.55)
    for z0, z1 in strips(near, far, 0.7):
        canvas.polygon([(x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0)], gap, FENCE)
        mid = z0 + 0.5 * (z1 - z0)
        canvas.polygon([(x, 0, z0), (x, 0, mid), (x, height, mid), (x, height, z0)], wood, FENCE)
    canvas.polygon([(x, height - 0.3, near), (x, height - 0.3, far), (x, height - 0.1, far), (x, height - 0.1, near)],
                   shade(wood, 1.1), None)  # fmt: skip


def draw_tree(canvas: Canvas, rng: Generator, x: float, z: float, bushy: bool = False) -> None:
    """A trunk and a crown of blobs."""
    leaf = pick(rng, "leaf")
    trunk = 0.3 if bushy else rng.uniform(1.8, 3.0)
    crown = rng.uniform(0.7, 1.2) if bushy else rng.uniform(1.3, 2.3)
    if not bushy:
        canvas.rectangle(x, 0, z, 0.36, trunk + crown, (88, 66, 48), VEGETATION)
    for k in range(9):
        dx, dy = rng.normal(0, 0.5 * crown), abs(rng.normal(0, 0.6 * crown))
        light = 0.78 + 0.05 * k + 0.08 * dy / crown  # later tufts are nearer the light
        canvas.disc(x + dx, trunk + 0.4 * crown + dy, z, crown * rng.uniform(0.4, 0.7), shade(leaf, light), VEGETATION)
