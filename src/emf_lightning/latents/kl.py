"""KL-regularised autoencoders, the latent spaces of Stable Diffusion 1.x to 3."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emf_lightning.latents.published_autoencoder import PublishedAutoencoder


class KLAutoencoder(PublishedAutoencoder):
    """KL-regularised autoencoder (diffusers' ``AutoencoderKL``, arXiv 2112.10752), e.g. ``sd-vae-ft-mse``.

    Latents are the posterior's mean, shifted and scaled to about unit variance by the configuration's ``shift_factor``
    and ``scaling_factor``. With the mean instead of a sample, an image has one latent; the posterior's variance is
    small compared with the noise that training adds.

    Args:
        pretrained: folder or hub name in diffusers' format; see ``PublishedAutoencoder`` for the other arguments.
    """

    def __init__(self, pretrained: str, subfolder: str | None = None, **options: Any) -> None:
        from diffusers import AutoencoderKL

        super().__init__(AutoencoderKL, pretrained, subfolder, **options)
        config = self.model.config
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.scale = config.scaling_factor
        self.shift = config.shift_factor or 0.0

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latent_dist.mode()
