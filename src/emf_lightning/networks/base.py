"""What every network is here: a callable ``net(z, r, t, context, mask)`` that returns the average velocity u."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from emf_lightning.networks.prediction import Prediction


class FlowMapNetwork(nn.Module, ABC):
    """A text-conditioned two-time network.

    Attributes:
        prediction: what the backbone's output stands for, turned into u.
        compiled: whether ``compile_blocks`` was called; a deep copy has to call it again.
        latent_channels: C of the latents that it was built for.
        latent_size: H = W of these.
        context_width: D of the text features.
        recomputed: whether the blocks keep no activations for the backward pass (gradient checkpointing).
    """

    prediction: Prediction
    latent_channels: int
    latent_size: int
    context_width: int
    compiled: bool = False
    recomputed: bool = False

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts in the order in which they run: what is sharded, and compiled, one by one."""
        return ()

    def compile_blocks(self) -> None:
        """Lets torch compile each block at its first call: one compilation serves all blocks of a kind.

        Names of parameters stay. ``ForwardMode`` runs the blocks as they are written, inside its own pass.
        """
        for block in self.blocks:
            block.compile()
        self.compiled = True

    @abstractmethod
    def backbone(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """The raw output of the network, like ``z``, or twice its channels where it gives a velocity beside u."""

    @property
    def meaning(self) -> dict[str, str | float]:
        """What a reader of saved weights must know beside their shapes."""
        return {"prediction": written(self.prediction)}

    @abstractmethod
    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the weights, and what is needed to build the network again, into a folder that it makes."""

    def refit_time(self, time_scale: float) -> float:
        """The relative error of reading t at ``time_scale`` from now on; for networks that embed a scaled t.

        Raises:
            ValueError: for a network that does not.
        """
        raise ValueError(
            f"{type(self).__name__} has no time embedding to fit for time_scale={time_scale}; leave it out"
        )

    def forward(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """u(z, r, t | context), ``[B, C, H, W]``; with a velocity head ``[B, 2 C, H, W]``, u before v.

        Args:
            z: ``[B, C, H, W]``, the state at t.
            r: ``[B]``, fp32, r <= t.
            t: ``[B]``, fp32, in [0, 1], 1 is noise.
            context: ``[B, L, D]``, token features.
            mask: ``[B, L]``, bool, True where there is a token.
            conditions: ``[B, K]``, in [0, 1], what else a network is told that was built for it.
        """
        output = self.backbone(z, r, t, context, mask, conditions)
        heads = [self.prediction(head, z, t) for head in output.chunk(output.shape[1] // z.shape[1], dim=1)]
        return heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)


def written(part: object) -> str:
    """A setting's object as its class and its own settings, for ``meaning``."""
    settings = ", ".join(f"{k}={v}" for k, v in sorted(vars(part).items()))
    return f"{type(part).__name__}({settings})"
