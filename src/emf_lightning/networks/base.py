"""What every network is here: a callable ``net(z, r, t, context, mask)`` that returns the average velocity u."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from emf_lightning.networks.prediction import Prediction


class FlowMapNetwork(nn.Module, ABC):
    """A text-conditioned two-time network.

    Attributes:
        prediction: what the backbone's output stands for, turned into u.
        compiled: whether ``compile_blocks`` was called; a deep copy has to call it again.
    """

    prediction: Prediction
    compiled: bool = False

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
    def backbone(self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The raw output of the network, like ``z``."""

    def forward(self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """u(z, r, t | context), ``[B, C, H, W]``.

        Args:
            z: ``[B, C, H, W]``, the state at t.
            r: ``[B]``, fp32, r <= t.
            t: ``[B]``, fp32, in [0, 1], 1 is noise.
            context: ``[B, L, D]``, token features.
            mask: ``[B, L]``, bool, True where there is a token.
        """
        return self.prediction(self.backbone(z, r, t, context, mask), z, t)
