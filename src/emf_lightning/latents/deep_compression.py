"""Deep-compression autoencoders, the latent space of SANA and BLIP3o-NEXT."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from emf_lightning.latents.published_autoencoder import PublishedAutoencoder


class DeepCompression(PublishedAutoencoder):
    """DC-AE (diffusers' ``AutoencoderDC``, arXiv 2410.10733), e.g. f32c32: 1024 px become 32 x 32 x 32 latents.

    Latents are scaled to about unit variance by the configuration's ``scaling_factor``.

    Args:
        pretrained: see ``PublishedAutoencoder``, also for ``subfolder`` and ``dtype``.
        tiling: decodes images beyond 512 px in overlapping tiles: less memory, slower, faint seams.

    Raises:
        ValueError: if the weights cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        subfolder: str | None = "vae",
        dtype: Literal["float32", "bfloat16"] = "float32",
        tiling: bool = False,
    ) -> None:
        from diffusers import AutoencoderDC

        super().__init__(AutoencoderDC, pretrained, subfolder, dtype)
        self.downsampling = self.model.spatial_compression_ratio
        self.scale = self.model.config.scaling_factor
        if tiling:
            self.model.enable_tiling()

    def _encode(self, images: Tensor) -> Tensor:
        code: Tensor = self.model.encode(images, return_dict=False)[0]
        return code
