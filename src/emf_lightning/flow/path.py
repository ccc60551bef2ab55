"""The linear path between data and noise."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""u(z, r, t): ``[B, C, H, W]``, ``[B]``, ``[B]`` -> ``[B, C, H, W]``."""


def over(t: Tensor, z: Tensor) -> Tensor:
    """``t`` ``[B]`` with ones appended to its shape, so that it broadcasts over ``z`` ``[B, ...]``."""
    return t.reshape(-1, *([1] * (z.ndim - 1)))


def interpolate(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t e (arXiv 2505.13447, section 3)."""
    t = over(t, x)
    return (1 - t) * x + t * e
