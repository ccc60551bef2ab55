"""The Improved MeanFlow objective (arXiv 2512.02012): a true regression, told what guidance to have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from emf_lightning.flow.derivative.derivative import Derivative, ForwardMode
from emf_lightning.flow.objectives.base import FlowMapTerms, bounded, regress
from emf_lightning.flow.path import Velocity, over
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import Weighting


@dataclass(frozen=True)
class Guidance:
    """The guidance that each of B rows is to have, as a condition of the network.

    Attributes:
        omega: ``[B]``, its scale, at least 1, which is none.
        start: ``[B]``, the t from which it acts, in [0, 1].
        end: ``[B]``, the t up to which it acts, in [0, 1].
    """

    CONDITIONS: ClassVar[int] = 3

    omega: Tensor
    start: Tensor
    end: Tensor

    @staticmethod
    def everywhere(omega: Tensor) -> Guidance:
        """Scale ``omega`` ``[B]`` at all times."""
        return Guidance(omega, torch.zeros_like(omega), torch.ones_like(omega))

    @staticmethod
    def none(t: Tensor) -> Guidance:
        """No guidance, for as many rows as ``t`` ``[B]`` has."""
        return Guidance.everywhere(torch.ones_like(t))

    @property
    def conditions(self) -> Tensor:
        """``[B, 3]``, fp32, in [0, 1]: 1 - 1 / omega, start, end."""
        return torch.stack([1 - 1 / self.omega, self.start, self.end], dim=1)

    def at(self, t: Tensor) -> Tensor:
        """w ``[B]``: omega where ``t`` ``[B]`` lies in the interval, 1 elsewhere."""
        return torch.where((self.start <= t) & (t <= self.end), self.omega, 1.0)


@dataclass(frozen=True)
class GuidanceLaw:
    """Which guidance a training step looks at: omega with density proportional to 1 / omega, and an interval.

    Rows with r = t have the whole interval: what they say of v is then true of any.

    Attributes:
        largest: omega lies in [1, largest].
        latest_start: the interval starts uniformly in [0, latest_start].
        earliest_end: it ends uniformly in [earliest_end, 1].
    """

    largest: float = 8.0
    latest_start: float = 0.5
    earliest_end: float = 0.5

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise ValueError(f"GuidanceLaw: largest must be at least 1, got {self.largest}")
        if not 0 <= self.latest_start <= self.earliest_end <= 1:
            raise ValueError(
                "GuidanceLaw: needs 0 <= latest_start <= earliest_end <= 1, "
                f"got latest_start={self.latest_start}, earliest_end={self.earliest_end}"
            )

    def __call__(self, times: Times) -> Guidance:
        """The rows' guidance."""
        omega, start, end = torch.rand(3, len(times.t), device=times.t.device)
        start, end = self.latest_start * start, 1 - (1 - self.earliest_end) * end
        start[times.n_interval :], end[times.n_interval :] = 0, 1
        return Guidance(self.largest**omega, start, end)


def guided_velocity(v: Tensor, v_c: Tensor, v_u: Tensor, w: Tensor) -> Tensor:
    """v_g = v + (1 - 1 / w) (v_c - v_u), like ``v``: where v_c has learned v_g, it is w E[v | c] + (1 - w) v_u.

    Args:
        v: ``[B, C, H, W]``, conditional.
        v_c: like ``v``, what the network predicts with caption and guidance w.
        v_u: like ``v``, what it predicts with neither.
        w: ``[B]``, the scale that acts at the rows' t.
    """
    return v + over(1 - 1 / w, v) * (v_c - v_u)


class ImprovedMeanFlowObjective:
    """V = u + (t - r) sg[du/dt] against v_g, with du/dt along a velocity that the network predicts, and v against v_g.

    MeanFlow's derivative along e - x makes its target depend on what u cannot see; along a function of z it is a
    regression, whose raw error falls as it is learned. V - v_g = u - u_tgt with u_tgt = v_g - (t - r) du/dt, which is
    how it is written here. Gradients flow through u and v alone. The two losses are added, each with its own weight.

    Args:
        derivative: how du/dt is taken.
        bound: u_tgt of the r < t rows is cut to +-bound, elementwise.
    """

    def __init__(self, derivative: Derivative | None = None, bound: float | None = None) -> None:
        if bound is not None and bound <= 0:
            raise ValueError(f"ImprovedMeanFlowObjective: bound must be positive, got {bound}")
        self.derivative = derivative or ForwardMode()
        self.bound = bound

    def __call__(
        self, heads: Velocity, z: Tensor, v_g: Tensor, v_c: Tensor, times: Times, weighting: Weighting
    ) -> FlowMapTerms:
        """Both errors: the terms are u's, the loss is the sum, and a row is finite where both are.

        Args:
            heads: (u, v) of all rows, beside each other, ``[B, 2 C, H, W]``.
            z: ``[B, C, H, W]``, the state at t.
            v_g: like ``z``, the guided velocity, without a graph.
            v_c: like ``z``, the tangent: the velocity that the network predicts, without a graph.
            times: the rows' (r, t), r < t rows first.
            weighting: from squared errors to losses, of u and of v.
        """
        n, r, t = times.n_interval, times.r, times.t
        both, derivatives = self.derivative(heads, z, r, t, v_c, n)
        (u, v), dudt = both.chunk(2, dim=1), derivatives[:, : z.shape[1]]
        u_tgt = bounded(v_g[:n] - over(t[:n] - r[:n], z) * dudt.to(v_g.dtype), self.bound)
        of_u = regress(u, torch.cat([u_tgt, v_g[n:]]), v_g, times, weighting, dudt)
        of_v = regress(v, v_g, v_g, times, weighting)
        return replace(of_u, loss=of_u.loss + of_v.loss, finite=of_u.finite & of_v.finite)
