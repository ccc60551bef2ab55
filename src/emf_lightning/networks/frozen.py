"""Frozen copies of a network, outside its module's parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from emf_lightning.networks.adapter import parent_parameters
from emf_lightning.networks.base import FlowMapNetwork


def copied(net: FlowMapNetwork) -> FlowMapNetwork:
    """A copy of a network; under adapters both have the parent's weights in common, which never change."""
    twin = copy.deepcopy(net, dict(parent_parameters(net)))
    if net.compiled:
        twin.compile_blocks()  # a copy is not compiled
    return twin


class FrozenNetwork:
    """A frozen copy of a network as it is now; no checkpoint, optimiser or average of its owner holds it.

    Args:
        net: the network to copy.
    """

    def __init__(self, net: FlowMapNetwork) -> None:
        self.net = copied(net).requires_grad_(False).eval()

    def __call__(self, z: Tensor, *inputs: Any, **conditions: Any) -> Tensor:
        """The network's output, computed on the device of ``z``."""
        output: Tensor = self.on(z.device)(z, *inputs, **conditions)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenNetwork:
        return self  # weight averaging copies the whole module; this part of it never changes

    def on(self, device: torch.device) -> FlowMapNetwork:
        """The network, moved to ``device`` where it is not there yet."""
        if any(each.device != device for each in self.net.parameters()):  # the parent's weights moved with the owner's
            with torch.inference_mode(False), torch.no_grad():  # the first pass may be a validation's, the next trains
                self.net.to(device)
        return self.net


class EMATarget(FrozenNetwork):
    """An exponential moving average of a network; ``state`` puts it into a checkpoint.

    Args:
        net: the network to copy, and then to average.
        decay: share that is kept at each step, in [0, 1).
    """

    def __init__(self, net: FlowMapNetwork, decay: float) -> None:
        super().__init__(net)
        if not 0 <= decay < 1:
            raise ValueError(f"EMATarget: decay must lie in [0, 1), got {decay}")
        self.decay = decay

    @torch.no_grad()
    def update(self, net: FlowMapNetwork) -> None:
        """Moves one step towards ``net``."""
        target = self.on(next(net.parameters()).device)
        for average, value in zip(target.parameters(), net.parameters(), strict=True):
            average.lerp_(value, 1 - self.decay)

    def state(self) -> dict[str, torch.Tensor]:
        """The weights by name, without those of a parent under adapters."""
        return {name: each for name, each in self.net.state_dict().items() if name not in self.net.parent_weights}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes the weights that ``state`` returned."""
        own = self.net.state_dict()
        self.net.load_state_dict({name: own[name] for name in self.net.parent_weights} | state)
