"""The flow-matching objective (arXiv 2210.02747)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from emf_lightning.flow.path import Velocity
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import Weighting


@dataclass(frozen=True)
class FlowMatchingTerms:
    """What a flow-matching step computes.

    Attributes:
        loss: the weighted loss, a scalar with a graph.
        squared_error: ``[B]``, mean over dimensions of (u - v)^2, detached.
    """

    loss: Tensor
    squared_error: Tensor


def flow_matching(u_theta: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting) -> FlowMatchingTerms:
    """The error of u(z, t, t) against v at the rows' t, all ``[B, C, H, W]``; gradients flow through u alone."""
    t = times.t
    u = u_theta(z, t, t)
    D = (u.float() - v).square().flatten(1)
    return FlowMatchingTerms(loss=weighting(D.sum(1)).mean(), squared_error=D.detach().mean(1))
