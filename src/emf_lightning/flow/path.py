"""The linear path between data and noise."""

from __future__ import annotations

from torch import Tensor


def expand_like(t: Tensor, z: Tensor) -> Tensor:
    """``t`` ``[B]`` with ones appended to its shape, so that it broadcasts over ``z`` ``[B, ...]``."""
    return t.reshape(-1, *([1] * (z.ndim - 1)))


def interpolate(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t e (arXiv 2505.13447, section 3).

    Args:
        x: ``[B, ...]``, data.
        e: like ``x``, noise.
        t: ``[B]``, times in [0, 1].
    """
    t = expand_like(t, x)
    return (1 - t) * x + t * e
