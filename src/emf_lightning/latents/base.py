"""Base class of frozen autoencoders."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Autoencoder(nn.Module, ABC):
    """A frozen autoencoder: always in eval mode, never trained, never in a checkpoint.

    Attributes:
        channels: C of the latents.
        downsampling: pixels per latent position along each side, d.
    """

    channels: int
    downsampling: int

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents ``[B, C, H/d, W/d]`` of about unit variance from images ``[B, 3, H, W]`` in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] from latents ``[B, C, H/d, W/d]``."""

    def forward(self, latents: Tensor) -> Tensor:
        """The same as ``decode``."""
        return self.decode(latents)

    def train(self, mode: bool = True) -> Autoencoder:
        """Stays in eval mode, although Lightning puts every submodule into train mode."""
        super().train(False)
        return self
