"""Drawing what annotations outline, by pycocotools: polygons and run lengths, as masks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Draw = Callable[[int, int], np.ndarray]  # gives a mask, bool [H, W], of a height and width


def coco_masks() -> Any:
    """The module that draws outlines; raises ImportError, which says how to install it."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "masks are drawn by pycocotools, which is not installed: pip install 'eomt-lora[import]'"
        ) from error
    return mask


def polygons(outlines: Sequence[Sequence[float]]) -> Draw:
    """Draws outlines (x, y, x, y, ...), pixels; raises ValueError for one with fewer than three points."""
    for outline in outlines:
        if len(outline) < 6 or len(outline) % 2 or not all(math.isfinite(value) for value in outline):
            raise ValueError(f"a polygon needs three points or more, x and y of each, got {list(outline)[:8]}")

    def draw(height: int, width: int) -> np.ndarray:
        limit = 2.0**20  # far outside of any picture; the library counts in 32 bits
        near = [[min(max(float(value), -limit), limit) for value in outline] for outline in outlines]
        masks = coco_masks()
        return masks.decode(masks.merge(masks.frPyObjects(near, height, width))).astype(bool)

    return draw


def run_lengths(counts: Sequence[int], size: Sequence[int]) -> Draw:
    """Draws runs of 0 and 1, column by column; raises ValueError where they do not fill (height, width) exactly."""
    if any(count < 0 for count in counts) or sum(counts) != size[0] * size[1]:
        raise ValueError(f"run lengths fill {sum(counts)} pixels, not the {size[0]}x{size[1]} of their size")

    def draw(height: int, width: int) -> np.ndarray:
        if (height, width) != tuple(size):
            raise ValueError(f"run lengths of {size[0]}x{size[1]} pixels in a picture of {height}x{width}")
        masks = coco_masks()
        return masks.decode(masks.frPyObjects({"size": list(size), "counts": list(counts)}, height, width)).astype(bool)

    return draw


def counts_in(text: str) -> list[int]:
    """Run lengths from COCO's compressed text; the library itself reads past its end where that is damaged."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64:
            raise ValueError(f"compressed run lengths hold {letter!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end too early")
    return counts


def rectangle(x: float, y: float, width: float, height: float, turned: float = 0.0) -> Draw:
    """Draws a rectangle that is turned, by degrees clockwise, around its first corner."""
    cos, sin = math.cos(math.radians(turned)), math.sin(math.radians(turned))
    corners = ((0, 0), (width, 0), (width, height), (0, height))
    return polygons([[value for u, v in corners for value in (x + u * cos - v * sin, y + u * sin + v * cos)]])


def brush(rle: Sequence[int], height: int, width: int) -> np.ndarray:
    """A brush's mask, bool [H, W], from Label Studio's run lengths: RGBA values in words of a few bits.

    Raises:
        ValueError: they do not fill the picture.
    """
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        if place > len(bits):
            raise ValueError("the run lengths of a brush end too early")
        return int(bits[place - count : place], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    if total != 4 * height * width:
        raise ValueError(
            f"the run lengths of a brush have {total} values, not the 4 of each of {height}x{width} pixels"
        )
    values, done = np.zeros(total, np.uint8), 0
    while done < total:
        repeated = read(1)
        count = read(sizes[read(2)]) + 1
        values[done : done + count] = read(word) if repeated else [read(word) for _ in range(min(count, total - done))]
        done += count
    return values.reshape(height, width, 4)[..., 3] > 0


def mask_in_box(counts: list[int], left: int, top: int, width: int, height: int) -> Draw:
    """Runs of 0 and 1, row by row, in a box of the picture."""
    if min(counts, default=0) < 0 or sum(counts) != width * height:
        raise ValueError(f"the run lengths of a mask fill {sum(counts)} pixels, not its {height}x{width}")

    def draw(rows: int, columns: int) -> np.ndarray:
        if left < 0 or top < 0 or left + width > columns or top + height > rows:
            raise ValueError(f"a mask of {height}x{width} pixels at {left}, {top} does not fit into {rows}x{columns}")
        mask = np.zeros((rows, columns), bool)
        inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        mask[top : top + height, left : left + width] = inside.reshape(height, width)
        return mask

    return draw
