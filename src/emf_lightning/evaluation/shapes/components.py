"""Connected components of label images, for a whole batch at once, and the cutting of one into compact parts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def connected_components(classes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Component numbers ``[N, H, W]``: 1, 2, ... where ``classes`` is not negative, 0 elsewhere.

    Two pixels are connected when they share an edge, an image and a class. Numbers are unique over the batch and
    ascend with it. Each sweep spreads the largest number along whole runs of rows, then of columns, so that compact
    objects take three or four sweeps.

    Args:
        classes: ``[N, H, W]``; pixels of different classes never connect, negative ones connect to nothing.
    """
    n, height, width = classes.shape
    inside = classes >= 0
    seeds = np.where(inside, np.arange(1, classes.size + 1, dtype=np.int64).reshape(classes.shape), 0)
    # A run is a stretch of one class along a row (or column); runs are numbered in reading order.
    row_runs = _runs(classes.reshape(-1, width))
    column_runs = _runs(classes.transpose(0, 2, 1).reshape(-1, height))
    labels = seeds
    while True:
        before = labels
        labels = _spread(labels.reshape(-1), row_runs).reshape(classes.shape)
        columns = _spread(labels.transpose(0, 2, 1).reshape(-1), column_runs)
        labels = np.where(inside, columns.reshape(n, width, height).transpose(0, 2, 1), 0)
        if np.array_equal(labels, before):
            break
    used = np.zeros(classes.size + 1, np.int64)
    used[labels.reshape(-1)] = 1
    used[0] = 0
    return (np.cumsum(used) * used)[labels]


def compact_parts(points: NDArray[np.floating], parts: int) -> NDArray[np.int64]:
    """The part, 0 to ``parts`` - 1, of each of ``points`` ``[P, 2]``: k-means from points far from one another."""
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
    """First index of every run of equal values; a run never passes the end of a line."""
    starts = np.ones(lines.shape, bool)
    starts[:, 1:] = lines[:, 1:] != lines[:, :-1]
    return np.flatnonzero(starts)


def _spread(values: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each run's largest value on the whole run."""
    return np.repeat(np.maximum.reduceat(values, starts), np.diff(starts, append=values.size))
