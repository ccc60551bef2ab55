"""What Improved MeanFlow adds to a SANA: conditions beside the times, and a velocity beside u (arXiv 2512.02012)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConditionEmbedding(nn.Module):
    """Numbers in [0, 1] embedded, to be added to the time embedding; nothing at the start.

    The paper gives them tokens of their own; a sum with the time embedding leaves a pretrained network's tokens alone.

    Args:
        conditions: K, how many.
        width: D.
    """

    def __init__(self, conditions: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Linear(conditions, width)
        self.act = nn.SiLU()
        self.linear = nn.Linear(width, 7 * width)
        self.start()

    def start(self) -> None:
        """Sets the last layer to zero, so that a pretrained network stays as it is."""
        self.hidden.reset_parameters()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """What the conditions ``[B, K]`` add to the modulation, ``[B, 6 D]``, and to the embedding, ``[B, D]``."""
        both = self.linear(self.act(self.hidden(conditions)))
        return both[:, : 6 * self.width], both[:, 6 * self.width :]


class VelocityHead(nn.Linear):
    """SANA's output projection with a second one beside it, so that the network's output has channels of u, then of v.

    The names of the pretrained projection's parameters stay; the new ones are ``velocity.*``.

    Args:
        in_features: width of the network.
        out_features: patch positions x ``channels``, channels last, as SANA lays its patches out.
        channels: C of u, and of v.
    """

    def __init__(self, in_features: int, out_features: int, channels: int) -> None:
        super().__init__(in_features, out_features)
        self.channels = channels
        self.velocity = nn.Linear(in_features, out_features)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Makes v's projection a copy of u's: where r = t, a pretrained u is the velocity."""
        self.velocity.load_state_dict({"weight": self.weight, "bias": self.bias})

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, N, 2 x out_features]`` of tokens ``[B, N, in_features]``."""
        u, v = (y.unflatten(-1, (-1, self.channels)) for y in (super().forward(hidden), self.velocity(hidden)))
        return torch.cat([u, v], dim=-1).flatten(-2)
