"""Pixel space as the latent space, for images small enough to need no autoencoder."""

from __future__ import annotations

from torch import Tensor

from emf_lightning.latents.base import Autoencoder


class Pixels(Autoencoder):
    """Latents are the images themselves, shifted and scaled.

    Args:
        scale: factor on pixels in [-1, 1]; sets the signal-to-noise ratio, as the noise has unit variance.
        shift: grey level in [-1, 1] that becomes 0, e.g. that of the background, so that empty images are zeros.
    """

    channels = 3
    downsampling = 1

    def __init__(self, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"Pixels: scale must be positive, got {scale}")
        self.scale = scale
        self.shift = shift

    def encode(self, images: Tensor) -> Tensor:
        """``scale * (images - shift)``."""
        return self.scale * (images - self.shift)

    def decode(self, latents: Tensor) -> Tensor:
        """``latents / scale + shift``, clamped to [-1, 1]."""
        return (latents / self.scale + self.shift).clamp(-1, 1)
