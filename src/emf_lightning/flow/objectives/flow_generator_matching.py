"""Flow generator matching (FGM, arXiv 2410.19310): the flow of a generator's samples becomes a teacher's, without data.

With x the generator's sample, e fresh noise, z = (1 - t) x + t e and c = e - x, u is the teacher's velocity at z, v
that of the flow whose data are such samples. v depends on the generator in a way that nobody can differentiate; but
where v is exact, the losses below have the gradient of E|v - u|^2 all the same. For that the gradient must flow through
z into u and v, and through c; their parameters stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.path import Velocity, interpolate


class MatchingLoss(ABC):
    """A loss whose gradient moves a generator's flow towards the teacher's; its value may be negative."""

    @abstractmethod
    def __call__(self, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        """The rows' losses ``[B]``, means over dimensions.

        Args:
            u: ``[B, C, H, W]``, the teacher's velocity.
            v: like ``u``, that of the generator's flow.
            c: like ``u``, e - x.
        """


class ExactMatching(MatchingLoss):
    """|u - c|^2 - |v - c|^2: the teacher's flow-matching loss on the generator's samples, less that of their own flow.

    Equal to the paper's L1 + L2 = |u - v|^2 + 2 <u - v, v - c>, whose gradient is that of E|v - u|^2 exactly.
    """

    def __call__(self, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        """The difference."""
        return ((u - c).square() - (v - c).square()).flatten(1).mean(1)


class AlphaMatching(MatchingLoss):
    """(1 - a) |u - v|^2 + <u - v, v - c>: half the exact loss at a = 1/2.

    In practice FGM leaves L1 = |u - v|^2 out, which is a = 1; neither term alone has the exact gradient. SiD
    (arXiv 2404.04057), whose loss this is in velocities, takes up to 1.2.

    Args:
        alpha: a.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def __call__(self, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        """The weighted sum."""
        return ((1 - self.alpha) * (u - v).square() + (u - v) * (v - c)).flatten(1).mean(1)


@dataclass(frozen=True)
class TimeWeight:
    """w(t) = t^noise (1 - t)^data; (2, 0) weighs errors in x rather than in velocities, (2, 1) is SiD-DiT's."""

    noise: float = 0.0
    data: float = 0.0

    def __call__(self, t: Tensor) -> Tensor:
        """The weights of ``t`` ``[B]``."""
        return t**self.noise * (1 - t) ** self.data


@dataclass(frozen=True)
class MatchingTerms:
    """What a generator's step computes for B rows.

    Attributes:
        loss: the weighted loss over the finite rows, a scalar with a graph; signed, it says nothing about quality.
        gap: ``[B]``, mean over dimensions of (u - v)^2, detached: what goes to 0.
        cosine: ``[B]``, of u and v over all dimensions, detached.
        finite: ``[B]``, False for rows whose loss is not finite; they are left out.
    """

    loss: Tensor
    gap: Tensor
    cosine: Tensor
    finite: Tensor


def generator_matching(
    teacher: Velocity, own: Velocity, x: Tensor, e: Tensor, t: Tensor, loss: MatchingLoss, weight: TimeWeight
) -> MatchingTerms:
    """The loss of a generator's samples.

    Args:
        teacher: u, whose parameters require no gradient.
        own: v, of the flow of the generator's samples; likewise.
        x: ``[B, C, H, W]``, samples with the generator's graph.
        e: like ``x``, noise that is not what the samples were drawn from.
        t: ``[B]``, fp32, in (0, 1).
        loss: of velocities.
        weight: of times.
    """
    z, c = interpolate(x, e, t), e - x
    u, v = teacher(z, t, t).float(), own(z, t, t).float()
    losses = loss(u, v, c.float()) * weight(t)
    finite = losses.detach().isfinite()
    with torch.no_grad():
        gap = (u - v).square().flatten(1).mean(1)
        cosine = torch.cosine_similarity(u.flatten(1), v.flatten(1))
    total = torch.where(finite, losses, 0).sum() / finite.sum().clamp(min=1)
    return MatchingTerms(total, gap, cosine, finite)
