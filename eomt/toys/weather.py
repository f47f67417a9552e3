"""The light on a drawn scene: texture by day, headlights, lamps and fog by night."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from eomt.toys.canvas import BUILDING, OVERSAMPLING, ROAD, SIDEWALK, SKY, TERRAIN, VEGETATION, WALL, Canvas

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
