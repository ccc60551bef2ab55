"""Embedding of guidance conditions, which Improved MeanFlow (arXiv 2512.02012) feeds to the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GUIDANCE_CONDITIONS = 3
"""Numbers that describe guidance, each in [0, 1]: 1 - 1 / scale, and start and end of the interval in which it acts."""


def no_guidance(t: Tensor) -> Tensor:
    """The conditions of no guidance, scale 1 at all times, ``[B, 3]``, for times ``t`` ``[B]``."""
    zero = torch.zeros_like(t)
    return torch.stack([zero, zero, torch.ones_like(t)], dim=1)


class ConditionEmbedding(nn.Module):
    """Embedding of numbers in [0, 1], added to the time embedding; zero at the start.

    The paper gives them tokens of their own; a sum with the time embedding leaves a pretrained network's tokens alone.

    Args:
        conditions: K, the number of conditions.
        width: D.
    """

    def __init__(self, conditions: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Linear(conditions, width)
        self.act = nn.SiLU()
        self.linear = nn.Linear(width, 7 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the last layer to zero, so that a pretrained network's output does not change."""
        self.hidden.reset_parameters()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Shifts of the modulation, ``[B, 6 D]``, and of the embedding, ``[B, D]``, from ``conditions`` ``[B, K]``."""
        both = self.linear(self.act(self.hidden(conditions)))
        return both[:, : 6 * self.width], both[:, 6 * self.width :]
