"""The variational autoencoders of latent diffusion: Stable Diffusion's and SD3's latent spaces."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from emf_lightning.latents.published_autoencoder import PublishedAutoencoder, own_precision


class KLAutoencoder(PublishedAutoencoder):
    """A KL-regularised autoencoder (diffusers' ``AutoencoderKL``, arXiv 2112.10752), as ``sd-vae-ft-mse`` is one.

    Latents are the posterior's mean, shifted and scaled to unit order of magnitude by its configuration's
    ``shift_factor`` and ``scaling_factor``. The mean rather than a sample: a picture then has one latent, and the
    spread that is left out is small beside the noise that training adds.

    Args:
        pretrained: see ``PublishedAutoencoder``, as ``subfolder``, ``dtype``.
        tiling: decode large images in overlapping tiles: less memory, slower, faint seams.
    """

    def __init__(
        self,
        pretrained: str,
        subfolder: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        tiling: bool = False,
    ) -> None:
        from diffusers import AutoencoderKL

        super().__init__(AutoencoderKL, pretrained, subfolder, dtype)
        config = self.model.config
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.scale: float = config.scaling_factor
        self.shift: float = config.shift_factor or 0.0
        if tiling:
            self.model.enable_tiling()

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean, shifted and scaled, fp32."""
        with own_precision(images):
            mean: Tensor = self.model.encode(images.to(self.model.dtype)).latent_dist.mode()
        return (mean.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images of the latents, fp32, cut to [-1, 1]."""
        code = (latents / self.scale + self.shift).to(self.model.dtype)
        with own_precision(latents):
            images: Tensor = self.model.decode(code, return_dict=False)[0]
        return images.float().clamp(-1, 1)
