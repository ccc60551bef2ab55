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
