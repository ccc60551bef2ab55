"""The interface of all networks: a callable ``net(z, r, t, context, mask)`` that returns the average velocity u."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from emf_lightning.networks.prediction import Prediction

WEIGHTS = "model.safetensors"
"""File of the weights in the base class's format."""


class FlowMapNetwork(nn.Module, ABC):
    """A text-conditioned two-time network.

    A subclass sets ``prediction`` and implements ``backbone``. The command line fills ``latent_channels``,
    ``latent_size`` and ``context_width`` where the constructor takes them. All arguments must be plain values or
    objects that are built from plain values, since a run and an export build the network again from them.

    Attributes:
        prediction: rule from the backbone's output to u.
        is_parent: whether, before training, u(z, t, t) is the velocity of the pretrained weights; False where settings
            change it.
        takes_interval: whether u depends on r; objectives with r < t need it.
        takes_guidance: whether the network takes guidance ``conditions`` and predicts v beside u.
        takes_negative_times: whether u(z, -t, -t) is the velocity of a second flow, which starts as the first.
        gradient_checkpointing: whether the blocks are computed again in the backward pass.
        compiled: whether ``compile_blocks`` was called; a deep copy has to call it again.
        latent_channels: C of the latents that it was built for.
        latent_size: H = W of these.
        context_width: D of the text features.
        parent_weights: names in the state dict of the weights that stay its parent's, under adapters; checkpoints and
            copies leave them out.
    """

    prediction: Prediction
    is_parent: bool = True
    takes_interval: bool = True
    takes_guidance: bool = False
    takes_negative_times: bool = False
    gradient_checkpointing: bool = False
    compiled: bool = False
    parent_weights: frozenset[str] = frozenset()
    latent_channels: int
    latent_size: int
    context_width: int

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts in the order in which they run; sharding and compilation treat them one by one."""
        return ()

    def compile_blocks(self) -> None:
        """Lets torch compile each block at its first call: one compilation serves all blocks of a kind.

        Names of parameters stay. ``ForwardMode`` runs the blocks uncompiled, inside its own pass.
        """
        for block in self.blocks:
            block.compile()
        self.compiled = True

    @abstractmethod
    def backbone(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """The raw output of the network, like ``z``, or with twice its channels for u and v."""

    @property
    def parametrization(self) -> dict[str, str | float]:
        """The settings beside the shapes that give saved weights their meaning, as plain values by name."""
        return {"prediction": describe(self.prediction)}

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the weights into a folder that it makes, as ``model.safetensors``.

        A class whose constructor takes ``pretrained`` overrides this: the folder must hold all that
        ``pretrained=directory`` needs to build the same network, its size included. For a class without this argument,
        an exported folder holds the constructor's arguments beside the weights.
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_model(self, str(Path(directory) / WEIGHTS))

    def refit_time(self, time_scale: float) -> float:
        """Fits the time embedding anew for inputs ``time_scale`` t, and returns the relative error of the fit.
        Raises ``ValueError`` for a network without an embedding of a scaled t.
        """
        name = type(self).__name__
        raise ValueError(f"{name} has no time embedding to fit for time_scale={time_scale}; leave it out")

    def forward(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """u(z, r, t | context), ``[B, C, H, W]``; with a velocity head ``[B, 2 C, H, W]``, u before v.

        Args:
            z: ``[B, C, H, W]``, the state at t.
            r: ``[B]``, fp32, r <= t.
            t: ``[B]``, fp32, in [0, 1], 1 is noise; negative for the second flow of networks that know one.
            context: ``[B, L, D]``, token features.
            mask: ``[B, L]``, bool, True at tokens.
            conditions: ``[B, K]``, in [0, 1], for networks that take guidance.
        """
        output = self.backbone(self.prediction.state(z, t), r, t, context, mask, conditions)
        heads = [self.prediction(head, z, t) for head in output.chunk(output.shape[1] // z.shape[1], dim=1)]
        return heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)


def describe(part: object) -> str:
    """A settings object as text, ``Class(name=value, ...)``, for ``parametrization``."""
    settings = ", ".join(f"{k}={v}" for k, v in sorted(vars(part).items()))
    return f"{type(part).__name__}({settings})"
