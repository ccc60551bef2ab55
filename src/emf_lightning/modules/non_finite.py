"""Detection of trainings whose errors have stopped being finite."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

NON_FINITE_LIMIT = 0.5
"""Share of non-finite samples above which a batch is bad: the rest teaches nothing."""


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients of the optimiser's weights that have one."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [weight.grad for weight in weights if weight.grad is not None]


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar, also of sharded ones."""
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class NonFiniteGuard:
    """Counts consecutive bad batches on the device, and reads the count at the logging interval or while it is not 0.

    Args:
        patience: consecutive batches with more than half of their samples, or the gradient, not finite after which
            training stops.
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"nan_patience must be at least 1, got {patience}")
        self.patience = patience
        self._count = torch.zeros((), dtype=torch.long)
        self._bad_gradient: Tensor | None = None
        self._suspicious = False

    def zero_gradient(self, optimizer: Optimizer) -> None:
        """Makes the gradient of a step zero where its norm is not finite: one such step would spoil all weights.

        Samples without a finite error have no part in it; this is for an overflow within the network. It does not wait
        for the device. The batch counts as a bad one.
        """
        gradients = gradients_of(optimizer)
        bad = ~norm_of(gradients).isfinite()
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).masked_fill_(bad, 0)
        self._bad_gradient = bad if self._bad_gradient is None else bad | self._bad_gradient

    def check(self, finite: Tensor, step: int, interval: int) -> None:
        """Adds a batch.

        Args:
            finite: ``[B]``, False for samples whose error is not finite.
            step: optimiser steps taken.
            interval: steps between two looks at the count, which wait for the device.

        Raises:
            ValueError: after ``patience`` bad batches in a row.
        """
        bad = (~finite).float().mean() > NON_FINITE_LIMIT
        if self._bad_gradient is not None:
            bad, self._bad_gradient = bad | self._bad_gradient.to(bad.device), None
        self._count = torch.where(bad, self._count.to(finite.device) + 1, 0)
        if not self._suspicious and step % max(interval, 1):
            return
        count = int(self._count)
        self._suspicious = count > 0
        if count >= self.patience:
            raise ValueError(
                f"at step {step} the errors of more than half of the samples, or their gradient, are not finite, "
                f"{count} batches in a row: lower the learning rate or net.time_scale, or train in fp32; resume from "
                "the last checkpoint whose errors are finite"
            )
