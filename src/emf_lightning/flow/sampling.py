"""From noise to data in a few steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emf_lightning.flow.path import Velocity, over


@torch.no_grad()
def sample_flow_map(u: Velocity, e: Tensor, steps: int) -> Tensor:
    """Data from noise by jumps z_r = z_t - (t - r) u(z_t, r, t) over a uniform grid (arXiv 2505.13447, eq. 12)."""
    return _march(e, steps, lambda z, r, t: u(z, r, t))


@torch.no_grad()
def sample_euler(u: Velocity, e: Tensor, steps: int) -> Tensor:
    """Data from noise by Euler steps along the velocity u(z, t, t): the sampler of a flow-matching model."""
    return _march(e, steps, lambda z, r, t: u(z, t, t))


@torch.no_grad()
def sample_renoised(u: Velocity, e: Tensor, steps: int, start: float = 1.0) -> Tensor:
    """Data from noise by jumps to the data, with fresh noise in between: the sampler of a generator.

    The noise of step k > 0 is a function of the row's ``e`` and k: a row is the same in whatever batch it is drawn.
    """
    return renoised(u, e, steps, lambda k: _fresh(e, k), start)


def renoised(u: Velocity, e: Tensor, steps: int, fresh: Callable[[int], Tensor], start: float = 1.0) -> Tensor:
    """Data from noise ``e``, ``[B, C, H, W]``; the graph is that of the last jump alone.

    At each t of the uniform grid from ``start`` down, z = (1 - t) x + t e' becomes x = z - t u(z, 0, t); e' is ``e``
    at first, beside x = 0, then fresh.

    Args:
        u: the generator's average velocity.
        e: unit normal.
        steps: jumps.
        fresh: k -> the noise of step k > 0, like ``e``.
        start: the first t, in (0, 1].

    Raises:
        ValueError: for no steps.
    """
    _check(steps)
    x = torch.zeros_like(e)
    for k in range(steps):
        t = torch.full((len(e),), start * (1 - k / steps), device=e.device, dtype=torch.float32)
        noise = e if k == 0 else fresh(k)
        z = (1 - over(t, e)) * x + over(t, e) * noise
        with torch.set_grad_enabled(torch.is_grad_enabled() and k == steps - 1):
            x = z - over(t, z) * u(z, torch.zeros_like(t), t).to(z.dtype)
        if k < steps - 1:
            torch.clear_autocast_cache()  # weights cast without a graph must not serve the pass that needs one
    return x


def _fresh(e: Tensor, k: int) -> Tensor:
    """Unit normal noise like ``e``, ``[B, ...]``, each row's a function of that row's bits and ``k``."""
    first = e.detach().flatten(1)[:, :2].float().cpu().view(torch.int32).tolist()
    rows = []
    for a, b in first:
        generator = torch.Generator().manual_seed(((a & 0x7FFFFFFF) << 32 | (b & 0xFFFFFFFF)) ^ k)
        rows.append(torch.randn(e.shape[1:], generator=generator))
    return torch.stack(rows).to(e)


def _march(e: Tensor, steps: int, average_velocity: Velocity) -> Tensor:
    _check(steps)
    grid = torch.linspace(1, 0, steps + 1, device=e.device).unsqueeze(1).expand(-1, len(e))
    z = e
    for t, r in zip(grid, grid[1:], strict=False):
        z = z - over(t - r, z) * average_velocity(z, r, t).to(z.dtype)
    return z


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"sampling needs at least one step, got {steps}")
