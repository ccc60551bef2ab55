"""The non-saturating adversarial losses (arXiv 1406.2661) with the R1 penalty (arXiv 1801.04406).

Logits are unbounded: a sigmoid before the softplus would squash them twice and leave hardly a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf_lightning.flow.objectives.base import zero_non_finite


@dataclass(frozen=True)
class DiscriminatorTerms:
    """Loss and diagnostics of one batch of a discriminator D.

    Attributes:
        loss: softplus(D(fake)) + softplus(-D(real)) + gamma / 2 |grad D(real)|^2, a scalar with a graph.
        accuracy: share of the 2 B samples that D classifies correctly, detached; .5 is guessing.
        r1: mean |grad D(real)|^2, detached; NaN where gamma is 0.
    """

    loss: Tensor
    accuracy: Tensor
    r1: Tensor


def generator_loss(logits: Tensor) -> Tensor:
    """Per-sample generator loss, softplus(-logits), shape [B]."""
    return F.softplus(-logits)


def discriminator_loss(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, gamma: float
) -> DiscriminatorTerms:
    """Loss and diagnostics of a discriminator.

    Args:
        discriminator: D, from ``[B, C, H, W]`` to logits ``[B]``, positive for real samples.
        real: ``[B, C, H, W]``; samples that are not finite are left out.
        fake: like ``real``; its graph is cut.
        gamma: weight of R1; 0 takes no second derivative.
    """
    (real, real_counts), (fake, fake_counts) = zero_non_finite(real.detach()), zero_non_finite(fake.detach())
    real.requires_grad_(gamma > 0)
    # the fused kernels of attention have no second derivative
    with sdpa_kernel(SDPBackend.MATH) if gamma > 0 else nullcontext():
        real_logits = discriminator(real).float()
    fake_logits = discriminator(fake).float()
    loss = (F.softplus(fake_logits) * fake_counts + F.softplus(-real_logits) * real_counts).mean()
    r1 = loss.new_tensor(float("nan"))
    if gamma > 0:
        (gradient,) = torch.autograd.grad((real_logits * real_counts).sum(), real, create_graph=True)
        r1 = gradient.float().square().flatten(1).sum(1).mean()
        loss = loss + gamma / 2 * r1
    accuracy = torch.cat([real_logits > 0, fake_logits < 0]).float().mean()
    return DiscriminatorTerms(loss, accuracy, r1.detach())
