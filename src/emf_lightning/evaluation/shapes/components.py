"""Connected components of a batch of label images, and k-means parts of one component."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def connected_components(classes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Component numbers ``[N, H, W]``: 1, 2, ... where ``classes`` is not negative, 0 elsewhere.

    Two pixels are connected if they share an edge, an image and a class. Numbers are unique in the batch and ascend
    with its images. Each sweep writes the largest number of a run on the whole run, for rows, then for columns: compact
    objects take three or four sweeps.

    Args:
        classes: ``[N, H, W]``; pixels of negative class belong to no component.
    """
    n, height, width = classes.shape
    inside = classes >= 0
    seeds = np.where(inside, np.arange(1, classes.size + 1, dtype=np.int64).reshape(classes.shape), 0)
    # a run is a maximal stretch of one class in a row or a column; runs are numbered in reading order
    row_runs = _runs(classes.reshape(-1, width))
    column_runs = _runs(classes.transpose(0, 2, 1).reshape(-1, height))
    labels = seeds
    while True:
        before = labels
        labels = _run_maxima(labels.reshape(-1), row_runs).reshape(classes.shape)
        columns = _run_maxima(labels.transpose(0, 2, 1).reshape(-1), column_runs)
        labels = np.where(inside, columns.reshape(n, width, height).transpose(0, 2, 1), 0)
        if np.array_equal(labels, before):
            break
    used = np.zeros(classes.size + 1, np.int64)
    used[labels.reshape(-1)] = 1
    used[0] = 0
    return (np.cumsum(used) * used)[labels]


def compact_parts(points: NDArray[np.floating], parts: int) -> NDArray[np.int64]:
    """K-means assignment, 0 to ``parts`` - 1, of ``points`` ``[P, 2]``, starting from points far from one another."""
    distances = ((points - points.mean(0)) ** 2).sum(1)
    centres = points[[distances.argmax()]]
    for _ in range(1, parts):
        nearest = ((points[:, None] - centres) ** 2).sum(2).min(1)
        centres = np.concatenate([centres, points[[nearest.argmax()]]])
    for _ in range(8):
        part = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        members = np.bincount(part, minlength=parts)
        sums = np.stack([np.bincount(part, axis, parts) for axis in points.T], 1)
        centres = np.where(members[:, None] > 0, sums / np.maximum(members, 1)[:, None], centres)
    return part


def _runs(lines: NDArray[np.integer]) -> NDArray[np.int64]:
    """First index of every run of equal values within a line of ``lines`` ``[L, W]``."""
    starts = np.ones(lines.shape, bool)
    starts[:, 1:] = lines[:, 1:] != lines[:, :-1]
    return np.flatnonzero(starts)


def _run_maxima(values: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every value replaced by the largest one of its run."""
    return np.repeat(np.maximum.reduceat(values, starts), np.diff(starts, append=values.size))
