"""The pixel space itself, for worlds that are small enough to need no autoencoder."""

from __future__ import annotations

from torch import Tensor

from emf_lightning.latents.base import Autoencoder


class Pixels(Autoencoder):
    """Images as their own latents, times ``scale``.

    Args:
        scale: factor on the [-1, 1] pixels; the noise has unit variance, so this sets the signal-to-noise ratio.
        offset: grey level in [-1, 1] that becomes 0; the background's, so that an empty image costs no signal.
    """

    channels = 3
    downsampling = 1

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"Pixels: scale must be positive, got {scale}")
        self.scale = scale
        self.offset = offset

    def encode(self, images: Tensor) -> Tensor:
        """``scale * (images - offset)``."""
        return self.scale * (images - self.offset)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of ``encode``, cut to [-1, 1]."""
        return (latents / self.scale + self.offset).clamp(-1, 1)
