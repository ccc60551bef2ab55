"""Learning-rate schedules in optimiser steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """A linear warm-up from 0, then half a cosine down to ``final`` of the base rate.

    Args:
        optimizer: whose groups keep their own base rates.
        total: planned optimiser steps; ``${trainer.max_steps}`` in YAML.
        warmup: optimiser steps of the warm-up.
        final: share of the base rate that is left at the end.
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
