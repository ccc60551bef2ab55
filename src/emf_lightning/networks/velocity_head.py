"""A velocity v beside u, as Improved MeanFlow (arXiv 2512.02012) predicts it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VelocityHead(nn.Linear):
    """SANA's output projection with a second one beside it: the network's output has channels of u, then of v.

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
        self.init_velocity()

    @torch.no_grad()
    def init_velocity(self) -> None:
        """Copies u's projection to v's: where r = t, a pretrained u is the velocity."""
        self.velocity.load_state_dict({"weight": self.weight, "bias": self.bias})

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, N, 2 x out_features]`` of tokens ``[B, N, in_features]``."""
        u, v = (y.unflatten(-1, (-1, self.channels)) for y in (super().forward(hidden), self.velocity(hidden)))
        return torch.cat([u, v], dim=-1).flatten(-2)
