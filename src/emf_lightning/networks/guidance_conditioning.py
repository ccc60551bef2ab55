"""Improved MeanFlow's (arXiv 2512.02012) additions to a network: guidance conditions, and a velocity v beside u."""

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
    """Embedding of K ``conditions`` in [0, 1], added to the time embedding of ``width`` D; zero at the start.

    The paper gives them tokens of their own; a sum with the time embedding leaves a pretrained network's tokens alone.
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


class VelocityHead(nn.Linear):
    """SANA's output projection with a second one beside it: the network's output has channels of u, then of v.

    The names of the pretrained projection's parameters stay; the new ones are ``velocity.*``. ``out_features`` are
    patch positions x ``channels`` (C of u, and of v), channels last, as SANA lays its patches out.
    """

    def __init__(self, in_features: int, out_features: int, channels: int) -> None:
        super().__init__(in_features, out_features)
        self.channels = channels
        self.velocity = nn.Linear(in_features, out_features)
        self.init_velocity()

    @torch.no_grad()
    def init_velocity(self) -> None:
        """Copies u's projection to v's: where r = t, a pretrained u is the velocity."""
        self.velocity.load_state_dict({"weight": self.weight, "bias": self.bias})

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, N, 2 x out_features]`` of tokens ``[B, N, in_features]``."""
        u, v = (y.unflatten(-1, (-1, self.channels)) for y in (super().forward(hidden), self.velocity(hidden)))
        return torch.cat([u, v], dim=-1).flatten(-2)
