"""The flow-matching objective (arXiv 2210.02747)."""

from __future__ import annotations

from torch import Tensor

from emf_lightning.flow.objectives.base import FlowMapTerms, regress
from emf_lightning.flow.path import Velocity
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import Weighting


def flow_matching(u_theta: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting) -> FlowMapTerms:
    """The error of u(z, t, t) against v at the rows' t, all ``[B, C, H, W]``; gradients flow through u alone."""
    return regress(u_theta(z, times.t, times.t), v, v, times, weighting)
