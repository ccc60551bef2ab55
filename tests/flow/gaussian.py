"""Closed forms for data N(m, s^2) on the linear path, per coordinate, in float64: the oracle of the objectives."""

from __future__ import annotations

import torch
from torch import Tensor

M, S = 0.7, 0.4


def _over(t: Tensor, z: Tensor) -> Tensor:
    return t.reshape(-1, *([1] * (z.ndim - 1)))


def sigma(t: Tensor) -> Tensor:
    return torch.sqrt((1 - t) ** 2 * S**2 + t**2)


def flow_map(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    t, r = _over(t, z), _over(r, z)
    return (1 - r) * M + sigma(r) / sigma(t) * (z - (1 - t) * M)


def velocity(z: Tensor, t: Tensor) -> Tensor:
    t = _over(t, z)
    return -M + (t - (1 - t) * S**2) / sigma(t) ** 2 * (z - (1 - t) * M)


def average_velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """u of the exact flow; at r = t its limit, the velocity."""
    same = _over(r == t, z)
    length = torch.where(same, 1.0, _over(t - r, z))
    return torch.where(same, velocity(z, t), (z - flow_map(z, t, r)) / length)


def states(rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """z, r and t of ``rows`` rows, float64, r < t."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, 1, 2, 2, dtype=torch.float64, generator=generator)
    ends = torch.rand(2, rows, dtype=torch.float64, generator=generator) * 0.9 + 0.05
    return z, ends.amin(0), ends.amax(0)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
