"""Optimisers and learning-rate schedules, in optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Optimization:
    """Optimiser and schedule of one network.

    Attributes:
        optimizer: called with the trainable parameters.
        scheduler: called with the optimiser, stepped once an optimiser step; None keeps the rate constant.

    Example:
        >>> optimization = Optimization(lambda p: torch.optim.AdamW(p, lr=1e-4))
        >>> optimization.build(torch.nn.Linear(2, 2).parameters())[0].defaults["lr"]
        0.0001
    """

    optimizer: OptimizerCallable = torch.optim.AdamW
    scheduler: LRSchedulerCallable | None = None

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> tuple[Optimizer, Any]:
        """The optimiser of those ``parameters`` that train, and its scheduler or None."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        try:
            optimizer = self.optimizer(trained)
        except ValueError as error:  # torch's own names no setting
            raise ValueError(f"optimization.optimizer: {error}") from error
        return optimizer, None if self.scheduler is None else self.scheduler(optimizer)


def lightning_optimizers(optimizer: Optimizer, scheduler: Any) -> Any:
    """The return value of ``configure_optimizers`` for one optimiser whose scheduler steps with it."""
    if scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class WarmupCosine(LambdaLR):
    """A linear warm-up from 0, then half a cosine down to ``final`` of the base rate.

    Args:
        optimizer: its parameter groups keep their own base rates.
        total: planned optimiser steps; ``${trainer.max_steps}`` in YAML.
        warmup: optimiser steps of the warm-up.
        final: share of the base rate at the end.

    Raises:
        ValueError: for a warm-up that is not shorter than the training.
    """

    def __init__(self, optimizer: Optimizer, total: int, warmup: int = 100, final: float = 0.02) -> None:
        if not 0 <= warmup < total:
            raise ValueError(
                f"WarmupCosine: warmup must lie in [0, total), got warmup={warmup}, total={total}; "
                "set `total` to the planned optimiser steps (${trainer.max_steps}, which must be positive)"
            )

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            progress = min((step - warmup) / (total - warmup), 1.0)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
