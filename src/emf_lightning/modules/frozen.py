"""A network that a module reads and never owns."""

from __future__ import annotations

import copy
from typing import Any

import torch

from emf_lightning.networks.base import FlowMapNetwork


class FrozenNetwork:
    """A copy of a network as it is now: no parameter of the holder's, in no checkpoint and no average.

    Args:
        net: what to copy.
    """

    def __init__(self, net: FlowMapNetwork) -> None:
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        if net.compiled:
            self.net.compile_blocks()  # copies are not

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenNetwork:
        return self  # weight averaging copies the whole module; this part of it never changes

    def on(self, device: torch.device) -> FlowMapNetwork:
        """The network, moved to ``device`` where it is not there yet."""
        if next(self.net.parameters()).device != device:
            self.net.to(device)
        return self.net


class MovingTarget(FrozenNetwork):
    """A network that follows another by a moving average, and is part of a checkpoint by ``state``.

    Args:
        net: what to copy, and then to follow.
        decay: share that is kept at each step, in [0, 1).
    """

    def __init__(self, net: FlowMapNetwork, decay: float) -> None:
        super().__init__(net)
        if not 0 <= decay < 1:
            raise ValueError(f"MovingTarget: decay must lie in [0, 1), got {decay}")
        self.decay = decay

    @torch.no_grad()
    def follow(self, net: FlowMapNetwork) -> None:
        """Moves by one step towards ``net``."""
        own = self.on(next(net.parameters()).device)
        for kept, value in zip(own.parameters(), net.parameters(), strict=True):
            kept.lerp_(value, 1 - self.decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Its weights by name."""
        return self.net.state_dict()

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes weights that ``state`` gave."""
        self.net.load_state_dict(state)
