"""Deep-compression autoencoders: SANA's and BLIP3o-NEXT's latent space."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from emf_lightning.latents.published_autoencoder import PublishedAutoencoder, own_precision


class DeepCompression(PublishedAutoencoder):
    """A DC-AE (diffusers' ``AutoencoderDC``, arXiv 2410.10733), e.g. f32c32: 1024 px become 32 x 32 x 32 latents.

    Latents are scaled to unit order of magnitude by the ``scaling_factor`` of its configuration.

    Args:
        pretrained: see ``PublishedAutoencoder``, as ``subfolder``, ``dtype``.
        tiling: decode images beyond 512 px in overlapping tiles: less memory, slower, faint seams.

    Raises:
        ValueError: where there are no such weights.
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

    def encode(self, images: Tensor) -> Tensor:
        """The scaled code, fp32."""
        with own_precision(images):
            code: Tensor = self.model.encode(images.to(self.model.dtype), return_dict=False)[0]
        return code.float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images of the latents, fp32, cut to [-1, 1]."""
        with own_precision(latents):
            images: Tensor = self.model.decode((latents / self.scale).to(self.model.dtype), return_dict=False)[0]
        return images.float().clamp(-1, 1)
