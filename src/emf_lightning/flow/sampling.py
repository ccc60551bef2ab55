"""From noise to data in a few steps."""

from __future__ import annotations

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


def _march(e: Tensor, steps: int, average_velocity: Velocity) -> Tensor:
    if steps < 1:
        raise ValueError(f"sampling needs at least one step, got {steps}")
    grid = torch.linspace(1, 0, steps + 1, device=e.device).unsqueeze(1).expand(-1, len(e))
    z = e
    for t, r in zip(grid, grid[1:], strict=False):
        z = z - over(t - r, z) * average_velocity(z, r, t).to(z.dtype)
    return z
