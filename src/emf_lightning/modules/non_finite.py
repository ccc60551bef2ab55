"""Detection of trainings whose errors have stopped being finite."""

from __future__ import annotations

import torch
from torch import Tensor

NON_FINITE_LIMIT = 0.5
"""Share of non-finite samples above which a batch is bad: the rest teaches nothing."""


class NonFiniteGuard:
    """Counts consecutive bad batches on the device, and reads the count at the logging interval or while it is not 0.

    Args:
        patience: consecutive batches with more than half of their samples not finite after which training stops.
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"nan_patience must be at least 1, got {patience}")
        self.patience = patience
        self._count = torch.zeros((), dtype=torch.long)
        self._suspicious = False

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
        self._count = torch.where(bad, self._count.to(finite.device) + 1, 0)
        if not self._suspicious and step % max(interval, 1):
            return
        count = int(self._count)
        self._suspicious = count > 0
        if count >= self.patience:
            raise ValueError(
                f"at step {step} the errors of more than half of the samples are not finite, {count} batches in a "
                "row: lower the learning rate or net.time_scale, or train in fp32; resume from the last "
                "checkpoint whose errors are finite"
            )
