"""Rendering of scenes: flat anti-aliased shapes on a grey background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import BACKGROUND, PALETTE

SUPERSAMPLING = 4


def coverage(shape: str, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Mask, like ``x``, of the points that a shape out of ``world.SHAPES`` covers.

    Coordinates are in units of the object's radius, x to the right and y downwards (as image rows run). Every shape
    lies within 1.21 radii of its origin in both axes.

    Raises:
        ValueError: for a name that is not a shape.
    """
    match shape:
        case "circle":
            return x * x + y * y <= 1.0
        case "square":
            return (abs(x) <= 0.89) & (abs(y) <= 0.89)
        case "triangle":
            return (y <= 0.85) & (y >= 2.0 * abs(x) / 1.15 * 0.96 - 1.07)
        case "diamond":
            return abs(x) + abs(y) <= 1.2
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.36) & (np.maximum(abs(x), abs(y)) <= 1.1)
        case "star":
            angle = np.arctan2(x, -y)
            sector = np.pi / 5
            folded = abs((angle + sector) % (2 * sector) - sector)
            inner, outer = 0.46, 1.18
            tip_x, tip_y = inner * np.sin(sector), inner * np.cos(sector)
            rho = np.hypot(x, y)
            px, py = rho * np.sin(folded), rho * np.cos(folded)
            return (outer - tip_y) * px + tip_x * (py - outer) <= 0
        case "ring":
            rho = x * x + y * y
            return (rho <= 1.15) & (rho >= 0.35)
        case "heart":
            b = -(y - 0.05) / 0.95
            return (x * x + b * b - 0.72) ** 3 - 1.3 * x * x * b**3 <= 0
    raise ValueError(f"unknown shape {shape!r}; known are circle, square, triangle, diamond, cross, star, ring, heart")


def object_alpha(shape: str, centre: tuple[float, float], radius: float, canvas: int) -> NDArray[np.float32]:
    """Coverage of each pixel by the object, ``[canvas, canvas]`` in [0, 1]; ``centre`` is (x, y) in pixels."""
    k = SUPERSAMPLING
    fine = (np.arange(canvas * k) + 0.5) / k
    x, y = np.meshgrid((fine - centre[0]) / radius, (fine - centre[1]) / radius)
    return coverage(shape, x, y).reshape(canvas, k, canvas, k).mean(axis=(1, 3), dtype=np.float32)


def render(objects: list[tuple[str, str, tuple[float, float], float]], canvas: int) -> NDArray[np.uint8]:
    """The image ``[canvas, canvas, 3]``, 8-bit RGB, of objects given as (colour, shape, centre, radius in pixels)."""
    image = np.empty((canvas, canvas, 3), np.float32)
    image[:] = BACKGROUND
    for colour, shape, centre, radius in objects:
        extent = int(np.ceil(1.25 * radius)) + 1
        left, top = max(int(centre[0]) - extent, 0), max(int(centre[1]) - extent, 0)
        side = min(2 * extent + 1, canvas - left, canvas - top)
        patch = image[top : top + side, left : left + side]
        alpha = object_alpha(shape, (centre[0] - left, centre[1] - top), radius, side)[..., None]
        patch += alpha * (np.asarray(PALETTE[colour], np.float32) - patch)
    return np.rint(image).astype(np.uint8)
