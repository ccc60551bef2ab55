"""The non-saturating adversarial game (arXiv 1406.2661) with the R1 penalty (arXiv 1801.04406).

Logits are unbounded: a sigmoid before the softplus would squash them twice and leave hardly a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Judge = Callable[[Tensor], Tensor]
"""Logits ``[B]`` of ``[B, C, H, W]``: positive for data."""


@dataclass(frozen=True)
class JudgeTerms:
    """What a judge's step computes.

    Attributes:
        loss: softplus(D(drawn)) + softplus(-D(data)) + gamma / 2 |grad D(data)|^2, a scalar with a graph.
        accuracy: share of the 2 B rows that it tells rightly, detached; .5 is guessing.
        penalty: mean |grad D(data)|^2, detached; NaN where gamma is 0.
    """

    loss: Tensor
    accuracy: Tensor
    penalty: Tensor


def drawers_loss(logits: Tensor) -> Tensor:
    """The rows' losses ``[B]`` of who drew what got these ``logits`` ``[B]``."""
    return F.softplus(-logits)


def judges_loss(judge: Judge, data: Tensor, drawn: Tensor, gamma: float) -> JudgeTerms:
    """The judge's loss on ``data`` and ``drawn``, both ``[B, C, H, W]`` and without a graph.

    Args:
        judge: D.
        data: real rows.
        drawn: others.
        gamma: of R1; 0 takes no second derivative.
    """
    data = data.detach().requires_grad_(gamma > 0)
    real, fake = judge(data).float(), judge(drawn.detach()).float()
    loss = (F.softplus(fake) + F.softplus(-real)).mean()
    penalty = loss.new_tensor(float("nan"))
    if gamma > 0:
        (slope,) = torch.autograd.grad(real.sum(), data, create_graph=True)
        penalty = slope.float().square().flatten(1).sum(1).mean()
        loss = loss + gamma / 2 * penalty
    accuracy = torch.cat([real > 0, fake < 0]).float().mean()
    return JudgeTerms(loss, accuracy, penalty.detach())
