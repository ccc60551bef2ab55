"""Template matching: alpha masks of every shape at many sizes, subpixel positions and blurs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from emf_lightning.data.shapes.rendering import coverage, object_alpha
from emf_lightning.data.shapes.world import World

RADII = 24
"""Number of template sizes, from .8 of the world's smallest radius to 1.2 of its largest."""
RELATIVE_BLURS = (0.0, 0.11, 0.2)
"""Standard deviations of Gaussian blurs in units of the world's mean radius."""


def binomial(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """``images`` ``[..., H, W]`` after a 3 x 3 binomial filter, edges repeated; it scales white noise by .375."""
    for axis in (-2, -1):
        images = ndimage.convolve1d(images, (0.25, 0.5, 0.25), axis, mode="nearest")
    return images


def gaussian(images: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """``images`` ``[..., H, W]`` after a Gaussian filter, zeros beyond the edge."""
    return ndimage.gaussian_filter(images, sigma, axes=(-2, -1), mode="constant", truncate=8.0)


@dataclass(frozen=True)
class TemplateMatch:
    """The best template of each of K regions; arrays over K.

    Attributes:
        shape, radius: indices of both.
        correlation: normalised correlation with the template.
        margin: ``correlation`` minus the best one of any other shape.
        contrast: scale of the region's alpha relative to the template's.
        deviation: largest difference from the fitted template at any pixel, in units of ``contrast``.
    """

    shape: NDArray[np.int64]
    radius: NDArray[np.int64]
    correlation: NDArray[np.float32]
    margin: NDArray[np.float32]
    contrast: NDArray[np.float32]
    deviation: NDArray[np.float32]


class ShapeTemplates:
    """A bank of alpha masks, centred on their centroids.

    Attributes:
        window: side of a template in pixels, odd.
        offsets: subpixel positions of the centroid relative to the centre of the middle pixel, the same on both axes.
        alpha: ``[S, R, O, O, B, window**2]``, smoothed by ``binomial``; axes: shape, radius, x, y, blur.
        area: ``[S, R, B]``, effective area: (sum of alpha)**2 / sum of alpha**2, which does not depend on contrast.
    """

    def __init__(self, world: World) -> None:
        smallest, largest = (fraction * world.cell for fraction in world.radius)
        mean = (smallest + largest) / 2
        self.radii = np.geomspace(0.8 * smallest, 1.2 * largest, RADII)
        reach = int(np.ceil(1.21 * self.radii[-1] + 2))
        self.window = 2 * reach + 1
        positions = 2 * int(np.ceil(2 * 4.4 / mean)) + 1  # fine enough that half a step is .025 of the radius
        self.offsets = ((np.arange(positions) + 0.5) / positions - 0.5).astype(np.float32)
        blurs = [relative * mean for relative in RELATIVE_BLURS]
        places = list(product(self.radii, self.offsets, self.offsets))
        stacks = []
        for shape in world.shapes:
            dx, dy = _centroid(shape)
            placed = [(r, reach + 0.5 + ox - r * dx, reach + 0.5 + oy - r * dy) for r, ox, oy in places]
            alphas = np.stack([object_alpha(shape, (x, y), r, self.window) for r, x, y in placed])
            stacks.append(np.stack([binomial(gaussian(alphas, sigma)) for sigma in blurs], axis=1))
        self.alpha = np.stack(stacks).reshape(len(world.shapes), RADII, positions, positions, len(blurs), -1)
        self.area = (self.alpha.sum(-1) ** 2 / (self.alpha**2).sum(-1)).mean((2, 3))

    def match(self, alphas: NDArray, known: NDArray[np.bool_], offset: NDArray, area: NDArray) -> TemplateMatch:
        """The best template for each region among those of its subpixel position and effective area.

        Args:
            alphas: ``[K, window, window]``, fp32, with the pixel of the centroid in the middle.
            known: ``[K, window, window]``; False where the region's alpha is unknown, next to other regions.
            offset: ``[K, 2]``, x and y of the centroid relative to that pixel's centre, in [-.5, .5].
            area: effective areas in pixels.
        """
        k, shapes, blurs = len(alphas), self.area.shape[0], self.area.shape[2]
        ix, iy = (abs(o[:, None] - self.offsets).argmin(1) for o in offset.T)
        radius = abs(area[:, None, None, None] - self.area).argmin(2)  # [K, S, B]
        axes = np.ix_(np.arange(k), np.arange(shapes), np.arange(blurs))
        candidates = self.alpha[axes[1], radius, ix[axes[0]], iy[axes[0]], axes[2]]  # [K, S, B, P]
        candidates = candidates.reshape(k, shapes * blurs, self.window**2)

        # moments over the known pixels
        weight = known.reshape(k, self.window**2).astype(np.float32)
        seen = alphas.reshape(weight.shape)
        pixels = weight.sum(1) + 1e-6
        mean = (weight * seen).sum(1) / pixels
        centred = weight * (seen - mean[:, None])
        spread = np.sqrt((centred**2).sum(1)) + 1e-6
        covariance = np.matmul(candidates, centred[..., None])[..., 0]
        means = np.matmul(candidates, weight[..., None])[..., 0] / pixels[:, None]
        variance = np.matmul(candidates**2, weight[..., None])[..., 0] - pixels[:, None] * means**2
        correlation = (covariance / np.sqrt(np.maximum(variance, 1e-6)) / spread[:, None]).reshape(k, shapes, blurs)

        row = np.arange(k)
        by_shape = correlation.max(2)
        shape = by_shape.argmax(1)
        blur = correlation[row, shape].argmax(1)
        best = by_shape[row, shape]
        by_shape[row, shape] = -1
        choice = shape * blurs + blur
        contrast = covariance[row, choice] / np.maximum(variance[row, choice], 1e-6)
        fitted = contrast[:, None] * (candidates[row, choice] - means[row, choice, None])
        deviation = abs(centred - weight * fitted).max(1, initial=0) / (abs(contrast) + 1e-6)
        return TemplateMatch(
            shape, radius[row, shape, blur], best, best - by_shape.max(1), contrast, deviation.astype(np.float32)
        )


def _centroid(shape: str) -> tuple[float, float]:
    """The centroid of the unit shape."""
    axis = np.linspace(-1.25, 1.25, 501)
    x, y = np.meshgrid(axis, axis)
    mask = coverage(shape, x, y)
    return float(x[mask].mean()), float(y[mask].mean())


@cache
def templates_of(world: World) -> ShapeTemplates:
    """The templates of ``world``, computed once a process."""
    return ShapeTemplates(world)
