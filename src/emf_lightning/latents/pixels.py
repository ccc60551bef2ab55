"""Pixel space as the latent space, for images small enough to need no autoencoder."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from emf_lightning.latents.base import Autoencoder


class Pixels(Autoencoder):
    """Latents are the images themselves, shifted and scaled, and without loss rearranged into patches.

    Args:
        scale: factor on pixels in [-1, 1]; sets the signal-to-noise ratio, as the noise has unit variance.
        shift: grey level in [-1, 1] that becomes 0, e.g. that of the background, so that empty images are zeros.
        patch_size: p; p x p pixels become one position of 3 p^2 channels, for networks without patches of their own.

    Raises:
        ValueError: for a scale that is not positive, or a patch_size below 1.

    Example:
        >>> Pixels(patch_size=2).encode(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 12, 4, 4])
    """

    channels = 3
    downsampling = 1

    def __init__(self, scale: float = 1.0, shift: float = 0.0, patch_size: int = 1) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"Pixels: scale must be positive, got {scale}")
        if patch_size < 1:
            raise ValueError(f"Pixels: patch_size must be at least 1, got {patch_size}")
        self.scale = float(scale)
        self.shift = float(shift)
        if patch_size > 1:  # without patches nothing is set, so that the keys of existing latent caches stay valid
            self.channels, self.downsampling = 3 * patch_size**2, patch_size

    def encode(self, images: Tensor) -> Tensor:
        """``scale * (images - shift)``, in patches."""
        return F.pixel_unshuffle(self.scale * (images - self.shift), self.downsampling)

    def decode(self, latents: Tensor) -> Tensor:
        """``latents / scale + shift``, clamped to [-1, 1], without patches."""
        return F.pixel_shuffle((latents / self.scale + self.shift).clamp(-1, 1), self.downsampling)
