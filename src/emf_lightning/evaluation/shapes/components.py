"""Connected components of a batch of label images, and k-means parts of one component."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.cluster import vq

SHARED_EDGES = ndimage.generate_binary_structure(3, 1) & (np.arange(3) == 1)[:, None, None]
"""Neighbourhood of a pixel: the four that share an edge with it, in the same image."""


def connected_components(classes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Component numbers ``[N, H, W]``: 1, 2, ... where ``classes`` is not negative, 0 elsewhere.

    Two pixels are connected if they share an edge, an image and a class. Numbers are unique in the batch and ascend
    with its images, and within an image with the last pixel of the component.
    """
    labels, count = np.zeros(classes.shape, np.int64), 0
    for value in range(classes.max(initial=-1) + 1):
        of_class, found = ndimage.label(classes == value, SHARED_EDGES)
        labels += np.where(of_class > 0, of_class + count, 0)
        count += found
    last_pixel = np.full(count + 1, -1)
    last_pixel[labels.ravel()] = np.arange(labels.size)
    last_pixel[0] = -1  # the background keeps its number
    return last_pixel.argsort().argsort()[labels]


def compact_parts(points: NDArray[np.floating], parts: int) -> NDArray[np.int64]:
    """K-means assignment, 0 to ``parts`` - 1, of ``points`` ``[P, 2]``, starting from points far from one another."""
    distances = ((points - points.mean(0)) ** 2).sum(1)
    centres = points[[distances.argmax()]]
    for _ in range(1, parts):
        nearest = ((points[:, None] - centres) ** 2).sum(2).min(1)
        centres = np.concatenate([centres, points[[nearest.argmax()]]])
    return vq.kmeans2(points.astype(float), centres.astype(float), iter=8, minit="matrix")[1]
