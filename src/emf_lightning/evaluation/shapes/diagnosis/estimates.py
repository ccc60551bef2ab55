"""Means over images with standard errors, and variances of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emf_lightning.evaluation.bootstrap import bootstrap_means


@dataclass(frozen=True)
class Mean:
    """A mean or a ratio of means, its standard error by bootstrap over prompts, and the number of images.

    NaN where there are no images, and as error of the images of one prompt.
    """

    value: float
    error: float
    images: int

    def __str__(self) -> str:
        if np.isnan(self.value):
            return ""
        return f"{self.value:.3f}" + ("" if np.isnan(self.error) else f" ± {self.error:.3f}")

    @classmethod
    def of(cls, values: ArrayLike, prompts: Sequence[str], weights: ArrayLike | None = None) -> Mean:
        """The sum of ``values`` ``[N]`` over the sum of ``weights``, 1 by default, of N images with these prompts."""
        values = np.asarray(values, float)
        if not len(values):
            return cls(np.nan, np.nan, 0)
        _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
        weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
        totals, counts = np.bincount(prompt, values), np.bincount(prompt, weights)
        if not counts.sum():
            return cls(np.nan, np.nan, len(values))
        with np.errstate(invalid="ignore", divide="ignore"):
            means = bootstrap_means(totals, counts, np.random.default_rng(0))
        error = float(np.nanstd(means[np.isfinite(means)])) if len(totals) > 1 else np.nan
        return cls(float(totals.sum() / counts.sum()), error, len(values))


def deviations(images: NDArray[np.uint8], prompts: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Squared deviations of each image ``[N]``, means over pixels and colours in [0, 1].

    Returns:
        Those from the mean image of all, and those from the mean image of the same prompt. Over N, or over N less the
        number of prompts, their sums are the variance of a pixel, and that within a prompt.
    """
    pixels = images.reshape(len(images), -1).astype(np.float64) / 255
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    means = np.stack([pixels[prompt == number].mean(0) for number in range(prompt.max() + 1)])
    return ((pixels - pixels.mean(0)) ** 2).mean(1), ((pixels - means[prompt]) ** 2).mean(1)


def distances(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square differences of images ``[N, H, W, 3]``, pair by pair, with pixels in [0, 1]."""
    difference = (a.astype(np.float64) - b) / 255
    return np.sqrt((difference.reshape(len(a), -1) ** 2).mean(1))
