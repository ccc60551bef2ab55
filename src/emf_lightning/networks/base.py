"""What every network is here: a callable ``net(z, r, t, context, mask)`` that returns the average velocity u."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from emf_lightning.networks.prediction import Prediction


class FlowMapNetwork(nn.Module, ABC):
    """A text-conditioned two-time network.

    Attributes:
        prediction: what the backbone's output stands for, turned into u.
    """

    prediction: Prediction

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
