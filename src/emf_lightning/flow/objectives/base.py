"""What the objectives of the MeanFlow family share: their terms, and the masked, weighted error that ends each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emf_lightning.flow.derivative.derivative import Derivative
from emf_lightning.flow.path import Velocity
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import Weighting


@dataclass(frozen=True)
class FlowMapTerms:
    """What a training step computes; N rows have r < t, the rest r = t.

    Attributes:
        loss: the weighted loss over the finite rows, a scalar with a graph.
        squared_error: ``[B]``, mean over dimensions of (u - u_tgt)^2, detached.
        finite: ``[B]``, False for rows whose error is not finite; they are left out of the loss.
        cosine: ``[B]``, of u and v over all dimensions, detached.
        derivative_norm: ``[N]``, root mean square over dimensions of du/dt; empty where the objective takes none.
        times: the rows' (r, t).
    """

    loss: Tensor
    squared_error: Tensor
    finite: Tensor
    cosine: Tensor
    derivative_norm: Tensor
    times: Times

    def detached(self) -> FlowMapTerms:
        """The same without the loss's graph, to be kept and looked at."""
        return replace(self, loss=self.loss.detach())


class Objective(ABC):
    """A rule from the average velocity to a regression target.

    Attributes:
        derivative: how du/dt is taken, where it is.
    """

    derivative: Derivative | None = None

    @abstractmethod
    def __call__(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """The error of u(z, r, t).

        Args:
            u: the average velocity of all B rows; ``of_rows`` is that of some.
            z: ``[B, C, H, W]``, the state at t.
            v: like ``z``, dz/dt: conditional, or guided, or a teacher's; without a graph.
            times: the rows' (r, t), r < t rows first.
            weighting: from squared errors to losses.
            progress: of training, in [0, 1].
        """


def bounded(target: Tensor, bound: float | None) -> Tensor:
    """``target`` cut to +-``bound``, elementwise: the exact u averages velocities and never leaves their range."""
    return target if bound is None else target.clamp(-bound, bound)


def regress(
    u: Tensor, target: Tensor, v: Tensor, times: Times, weighting: Weighting, dudt: Tensor | None = None
) -> FlowMapTerms:
    """The terms of u's weighted squared error against a target without a graph, all ``[B, C, H, W]``.

    Rows that are not finite are left out of the loss and marked, so that one cannot spoil the others.
    """
    error = (u.float() - target).flatten(1)
    squared_error = error.detach().square().mean(1)
    finite = squared_error.isfinite()
    losses = weighting(torch.where(finite[:, None], error, 0).square().sum(1), times)
    return FlowMapTerms(
        loss=losses.sum() / finite.sum().clamp(min=1),
        squared_error=squared_error,
        finite=finite,
        cosine=torch.cosine_similarity(u.detach().float().flatten(1), v.float().flatten(1)),
        derivative_norm=v.new_zeros(0) if dudt is None else dudt.float().square().flatten(1).mean(1).sqrt(),
        times=times,
    )
