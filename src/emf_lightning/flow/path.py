"""The linear path between data and noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""u(z, r, t): ``[B, C, H, W]``, ``[B]``, ``[B]`` -> ``[B, C, H, W]``."""


def of_rows(u: Velocity, part: slice) -> Velocity:
    """``u`` for a part of the batch: a velocity that is bound to the rows' captions says so by a method ``rows``."""
    bound: Callable[[slice], Velocity] | None = getattr(u, "rows", None)
    return u if bound is None else bound(part)


@torch.no_grad()
def without_graph(u: Velocity, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """u(z, r, t) as a part of a target, like ``z`` and in its precision."""
    value = u(z, r, t).to(z.dtype)
    torch.clear_autocast_cache()  # weights cast without a graph must not serve the pass that needs one
    return value


def over(t: Tensor, z: Tensor) -> Tensor:
    """``t`` ``[B]`` with ones appended to its shape, so that it broadcasts over ``z`` ``[B, ...]``."""
    return t.reshape(-1, *([1] * (z.ndim - 1)))


def interpolate(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t e (arXiv 2505.13447, section 3)."""
    t = over(t, x)
    return (1 - t) * x + t * e
