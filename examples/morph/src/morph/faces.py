"""Drawn faces with an identity, and morphs of two of them: data that need no download, the same for a seed.

A morph is made as the field makes it: both faces are warped to the mean of their landmarks, piecewise linearly over a
triangulation, and averaged. Neither blur nor noise nor a bent outline gives it away: a bona fide picture is warped by a
little, too, what it is warped to is as inexact in both, and the noise of the camera comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy.ndimage import map_coordinates
from scipy.spatial import Delaunay

BONA_FIDE, MORPH = 0, 1
OVERSAMPLING = 3  # drawn larger, then averaged: smooth edges
NOISE = 0.02  # deviation of the camera's, of pixels in [0, 1]
JITTER = 0.006  # deviation of the landmarks that a picture is warped to, in widths of the picture
SKINS = np.array([(238, 200, 170), (224, 172, 130), (198, 140, 100), (150, 100, 68), (104, 68, 46)])
HAIRS = np.array([(32, 24, 20), (84, 54, 34), (150, 104, 58), (206, 170, 100), (130, 124, 120), (140, 60, 34)])
IRISES = np.array([(70, 44, 24), (92, 110, 60), (70, 110, 160), (110, 120, 130)])
FRAME = np.array([(x, y) for x in (0, 0.5, 1) for y in (0, 0.5, 1) if (x, y) != (0.5, 0.5)])  # landmarks that stay


@dataclass(frozen=True)
class Face:
    """An identity: what a person's pictures have in common. Lengths are in widths of the picture."""

    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    width: float
    height: float
    eyes: tuple[float, float, float]  # half their distance, height above the centre, size
    brow: tuple[float, float]  # thickness, tilt
    nose: tuple[float, float]  # length, half its width
    mouth: tuple[float, float, float]  # below the centre, half its width, thickness
    fringe: float  # where the hair ends, above the centre
    spots: np.ndarray  # [N, 2], around the centre, in half widths and heights of the face


def draw_identity(rng: Generator) -> Face:
    """A person at random."""
    u = rng.uniform
    return Face(
        skin=_mixed(SKINS, rng),
        hair=_mixed(HAIRS, rng),
        iris=_mixed(IRISES, rng),
        width=u(0.25, 0.32),
        height=u(0.35, 0.41),
        eyes=(u(0.095, 0.135), u(0.03, 0.08), u(0.032, 0.048)),
        brow=(u(0.012, 0.03), u(-0.025, 0.025)),
        nose=(u(0.09, 0.14), u(0.025, 0.05)),
        mouth=(u(0.17, 0.22), u(0.06, 0.11), u(0.015, 0.035)),
        fringe=u(0.15, 0.27),
        spots=rng.uniform(-0.75, 0.75, (rng.integers(0, 14), 2)),
    )


def landmarks(face: Face, smile: float = 0.0) -> np.ndarray:
    """Points [N, 2] (x, y) of a face around (0, 0), in widths of the picture: outline, brows, eyes, nose, mouth."""
    turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    outline = np.stack((face.width * np.sin(turns), face.height * np.cos(turns)), 1)
    apart, up, size = face.eyes
    down, half, _ = face.mouth
    right = [(apart - size, -up), (apart + size, -up), (apart, -up - 0.06), (face.nose[1], face.nose[0])]
    right += [(half, down - smile), (face.width * 0.6, -face.fringe)]
    middle = [(0, face.nose[0]), (0, down), (0, -face.fringe)]
    both = np.concatenate((np.array(right), np.array(right) * (-1, 1)))
    return np.concatenate((outline, both, np.array(middle)))


def draw_picture(face: Face, rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of a person in some pose and light, without noise: [size, size, 3] in [0, 1], and its landmarks."""
    smile, light = rng.uniform(0, 0.02), rng.uniform(0.85, 1.1)
    center, scale = 0.5 + rng.uniform(-0.03, 0.03, 2), rng.uniform(0.93, 1.05)
    angle = rng.uniform(-0.06, 0.06)
    turn = scale * np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    background = rng.uniform(90, 230) + rng.uniform(-12, 12, 3)
    pixels = size * OVERSAMPLING
    picture = Image.new("RGB", (pixels, pixels), _ink(background))
    _paint(ImageDraw.Draw(picture), face, smile, lambda points: (np.asarray(points) @ turn + center) * pixels)
    image = np.asarray(picture.resize((size, size), Image.Resampling.BOX), float) / 255
    across = np.linspace(-1, 1, size)[None, :, None] * rng.uniform(-0.12, 0.12)
    image = np.clip(image * (light + across), 0, 1)
    return image, np.concatenate((landmarks(face, smile) @ turn + center, FRAME))


def bona_fide(face: Face, rng: Generator, size: int) -> np.ndarray:
    """A camera's picture of a person: uint8 [size, size, 3]."""
    image, points = draw_picture(face, rng, size)
    return _camera(warp(image, points, _inexact(points, rng)), rng)


def morph(first: Face, second: Face, rng: Generator, size: int) -> np.ndarray:
    """The average of two persons' pictures, aligned at their landmarks: uint8 [size, size, 3]."""
    (a, points_a), (b, points_b) = draw_picture(first, rng, size), draw_picture(second, rng, size)
    mean = _inexact((points_a + points_b) / 2, rng)
    return _camera((warp(a, points_a, mean) + warp(b, points_b, mean)) / 2, rng)


def warp(image: np.ndarray, points: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Moves the landmarks `points` of an image [H, H, 3] to `wanted`, both [N, 2], linearly in each triangle."""
    size = len(image)
    corners, origins = (points[Delaunay(wanted).simplices] for points in (wanted * size - 0.5, points * size - 0.5))
    inside = Image.new("I", (size, size))  # which triangle each pixel lies in
    brush = ImageDraw.Draw(inside)
    for number, corner in enumerate(corners):
        brush.polygon([tuple(point) for point in corner], fill=number)
    (first, second, third), (a, b, c) = (part[np.asarray(inside)].transpose(2, 3, 0, 1) for part in (corners, origins))
    y, x = np.mgrid[:size, :size]
    (e, f), (g, h), (x, y) = second - first, third - first, np.stack((x, y)) - first
    determinant = e * h - f * g
    source = a + (x * h - y * g) / determinant * (b - a) + (y * e - x * f) / determinant * (c - a)  # [2, H, H]
    return np.stack([map_coordinates(image[..., k], source[::-1], order=1, mode="nearest") for k in range(3)], -1)


def draw_split(
    identities: int, pictures: int, size: int, rng: Generator
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    """Pictures of persons and as many morphs of two of them.

    Returns:
        uint8 [2 * identities * pictures, size, size, 3], labels, and the persons in each, numbered from 0.
    """
    faces = [draw_identity(rng) for _ in range(identities)]
    images, labels, persons = [], [], []
    for number, face in enumerate(faces):
        for _ in range(pictures):
            other = int((number + rng.integers(1, identities)) % identities)
            images += [bona_fide(face, rng, size), morph(face, faces[other], rng, size)]
            labels += [BONA_FIDE, MORPH]
            persons += [(number,), (number, other)]
    return np.stack(images), np.array(labels), persons


def _inexact(points: np.ndarray, rng: Generator) -> np.ndarray:
    found = len(points) - len(FRAME)
    return np.concatenate((points[:found] + rng.normal(0, JITTER, (found, 2)), points[found:]))


def _camera(image: np.ndarray, rng: Generator) -> np.ndarray:
    return (255 * np.clip(image + rng.normal(0, NOISE, image.shape), 0, 1)).round().astype(np.uint8)


def _mixed(colors: np.ndarray, rng: Generator) -> np.ndarray:
    a, b = rng.integers(len(colors), size=2)
    return colors[a] + rng.uniform() * (colors[b] - colors[a])


def _ink(color: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(color, 0, 255))


def _ellipse(x: float, y: float, width: float, height: float) -> np.ndarray:
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack((x + width * np.cos(turns), y + height * np.sin(turns)), 1)


def _paint(brush: ImageDraw.ImageDraw, face: Face, smile: float, place: Callable) -> None:
    """Paints a face; `place` gives pixels for points around its centre."""

    def fill(points: np.ndarray, color: np.ndarray) -> None:
        brush.polygon([tuple(point) for point in place(points)], fill=_ink(color))

    apart, up, size = face.eyes
    down, half, thick = face.mouth
    fill(_ellipse(0, -0.03, face.width + 0.035, face.height + 0.035), face.hair)
    fill(_ellipse(0, 0.02, face.width, face.height), face.skin)
    fringe = _ellipse(0, -0.03, face.width + 0.02, face.height + 0.02)
    fill(np.minimum(fringe, (1, -face.fringe)), face.hair)
    for x, y in face.spots * (face.width, face.height):
        fill(_ellipse(x, y, 0.009, 0.009), face.skin * 0.6)
    for side in (-1, 1):
        fill(_ellipse(side * apart, -up, size, size * 0.6), np.full(3, 245))
        fill(_ellipse(side * apart, -up, size * 0.5, size * 0.55), face.iris)
        fill(_ellipse(side * apart, -up, size * 0.2, size * 0.25), np.full(3, 15))
        thickness, tilt = face.brow
        ends = np.array([(-size, tilt), (size, -tilt), (size, -tilt - thickness), (-size, tilt - thickness)])
        fill(ends * (side, 1) + (side * apart, -up - 0.045), face.hair * 0.8)
    length, wide = face.nose
    fill(np.array([(0, -up), (wide, length), (0, length + 0.015), (-wide, length)]), face.skin * 0.88)
    corners = [(-half, down - smile), (0, down - thick / 2), (half, down - smile), (0, down + thick)]
    fill(np.array(corners), face.skin * (0.8, 0.5, 0.5))
