"""Deep-compression autoencoders, the latent space of SANA and BLIP3o-NEXT."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emf_lightning.latents.published_autoencoder import PublishedAutoencoder


class DeepCompression(PublishedAutoencoder):
    """DC-AE (diffusers' ``AutoencoderDC``, arXiv 2410.10733), e.g. f32c32: 1024 px become 32 x 32 x 32 latents.

    Latents are scaled to about unit variance by the configuration's ``scaling_factor``.

    Args:
        pretrained: folder or hub name in diffusers' format; see ``PublishedAutoencoder`` for the other arguments.
    """

    def __init__(self, pretrained: str, subfolder: str | None = "vae", **options: Any) -> None:
        from diffusers import AutoencoderDC

        super().__init__(AutoencoderDC, pretrained, subfolder, **options)
        self.downsampling = self.model.spatial_compression_ratio
        self.scale = self.model.config.scaling_factor

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images, return_dict=False)[0]
