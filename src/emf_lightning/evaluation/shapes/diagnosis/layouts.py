"""Layouts: whether two images show the same objects at the same places, and how far noise is from another layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from emf_lightning.evaluation.geneval.verdict import Detection

Layout = Sequence[Detection]


def same_layout(a: Layout, b: Layout, reach: float) -> bool:
    """Whether the detections of two images agree.

    They agree if they are as many, and can be paired so that both of a pair have one label and one colour, and the
    centres of their boxes lie at most ``reach`` pixels apart, horizontally and vertically.
    """
    if len(a) != len(b):
        return False
    differ = np.array([[not _alike(one, other, reach) for other in b] for one in a]).reshape(len(a), len(b))
    return not differ[linear_sum_assignment(differ)].any()


def _alike(a: Detection, b: Detection, reach: float) -> bool:
    offset = _centre(a) - _centre(b)
    return a.label == b.label and a.colour == b.colour and bool((abs(offset) <= reach).all())


def _centre(detection: Detection) -> NDArray[np.float64]:
    return np.asarray(detection.box, float).reshape(2, 2).mean(0)


def perturbed(noise: Tensor, direction: Tensor, size: float) -> Tensor:
    """Noise as far as ``size`` towards a direction, sqrt(1 - size^2) noise + size direction: unit normal as well."""
    return (1 - size**2) ** 0.5 * noise + size * direction


def boundary_distances(
    before: Sequence[Layout],
    noise: Tensor,
    directions: Sequence[Tensor],
    sizes: Sequence[float],
    layouts_of: Callable[[Sequence[int], Tensor], Sequence[Layout]],
    reach: float,
) -> NDArray[np.int64]:
    """Distance of each noise to a boundary between two layouts, ``[N]``, as an index of ``sizes``.

    It is the first size at which a step in one of the directions changes the layout, and ``len(sizes)`` where none
    does. A boundary that lies in no such direction is missed: more directions find nearer ones.

    Args:
        before: layouts of the N images of ``noise`` itself.
        noise: ``[N, C, H, W]``, unit normal.
        directions: unit normal, each like ``noise``.
        sizes: of the steps, see ``perturbed``, in rising order, in (0, 1].
        layouts_of: layouts of the images with the given numbers, from the given noise.
        reach: see ``same_layout``.
    """
    found = np.full(len(noise), len(sizes))
    for number, size in enumerate(sizes):
        for direction in directions:
            rows = np.flatnonzero(found == len(sizes)).tolist()
            if rows:
                chosen = torch.tensor(rows)
                after = layouts_of(rows, perturbed(noise[chosen], direction[chosen], size))
                changed = [not same_layout(before[row], one, reach) for row, one in zip(rows, after, strict=True)]
                found[np.array(rows)[changed]] = number
    return found
