"""The MeanFlow objective (arXiv 2505.13447, eq. 9-10; for text-to-image arXiv 2604.18168, eq. 1-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.derivative import total_derivative
from emf_lightning.flow.path import Velocity, over
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import Weighting


@dataclass(frozen=True)
class MeanFlowTerms:
    """What a MeanFlow step computes; N rows have r < t, the rest r = t.

    Attributes:
        loss: the weighted loss over the finite rows, a scalar with a graph.
        squared_error: ``[B]``, mean over dimensions of (u - u_tgt)^2, detached.
        derivative_norm: ``[N]``, root mean square over dimensions of du/dt.
        finite: ``[B]``, False for rows whose error is not finite; they are left out of the loss.
    """

    loss: Tensor
    squared_error: Tensor
    derivative_norm: Tensor
    finite: Tensor


def meanflow(
    u_theta: Velocity,
    z: Tensor,
    v: Tensor,
    times: Times,
    weighting: Weighting,
    *,
    bound: float | None = None,
) -> MeanFlowTerms:
    """The error of u(z, r, t) against u_tgt = sg[v - (t - r) du/dt], which is v where r = t.

    The derivative is taken for the r < t rows only (the others' factor t - r is zero), without a graph, before the
    one forward pass that carries gradients.

    Args:
        u_theta: the average velocity of all B rows, with gradients.
        z: ``[B, C, H, W]``, the state at t.
        v: like ``z``, dz/dt: conditional, or guided, or a teacher's.
        times: the rows' (r, t), r < t rows first.
        weighting: from summed squared errors to losses.
        bound: the target of the r < t rows is cut to +-bound, elementwise. The exact u averages velocities, so it
            never leaves their range; du/dt of an untrained u does, and then feeds on itself.
    """
    n, r, t = times.n_interval, times.r, times.t
    u_tgt, dudt = v, v[:0]
    if n:
        _, dudt = total_derivative(u_theta, z[:n], r[:n], t[:n], v[:n])
        u_tgt = v[:n] - over(t[:n] - r[:n], z) * dudt.to(v.dtype)
        u_tgt = torch.cat([u_tgt if bound is None else u_tgt.clamp(-bound, bound), v[n:]])
    u = u_theta(z, r, t)
    D = (u.float() - u_tgt).square().flatten(1)
    finite = D.detach().isfinite().all(1)
    losses = weighting(torch.where(finite[:, None], D, 0).sum(1))
    return MeanFlowTerms(
        loss=losses.sum() / finite.sum().clamp(min=1),
        squared_error=D.detach().mean(1),
        derivative_norm=dudt.float().square().flatten(1).mean(1).sqrt(),
        finite=finite,
    )
