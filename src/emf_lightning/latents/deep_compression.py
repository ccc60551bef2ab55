"""Deep-compression autoencoders: SANA's and BLIP3o-NEXT's latent space."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from emf_lightning.latents.base import Autoencoder
from emf_lightning.published import config_of


class DeepCompression(Autoencoder):
    """A DC-AE (diffusers' ``AutoencoderDC``, arXiv 2410.10733), e.g. f32c32: 1024 px become 32 x 32 x 32 latents.

    Latents are scaled to unit order of magnitude by the ``scaling_factor`` of its configuration. It computes in
    ``dtype`` outside any autocast: what is cached must not depend on who asked first. On the meta device it has its
    size and no weights.

    Args:
        pretrained: folder or hub name in diffusers' format.
        subfolder: ``vae`` in a whole pipeline's repository; null where the autoencoder lies on its own.
        dtype: of the weights and the arithmetic.
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

        super().__init__()
        where = pretrained if subfolder is None else f"{pretrained} (subfolder {subfolder})"
        try:
            if torch.get_default_device().type == "meta":
                self.model = AutoencoderDC.from_config(config_of(pretrained, subfolder))
                nn.Module.to(self.model, dtype=getattr(torch, dtype))  # diffusers' own warns
            else:
                self.model, info = AutoencoderDC.from_pretrained(
                    pretrained,
                    subfolder=subfolder,
                    torch_dtype=getattr(torch, dtype),
                    output_loading_info=True,
                    low_cpu_mem_usage=False,
                    use_safetensors=True,
                )
                odd = [*info["missing_keys"], *info["unexpected_keys"]]
                if odd:
                    raise ValueError(
                        f"DeepCompression: the weights at {where} are not those of its config.json ({odd[0]} and "
                        f"{len(odd) - 1} more are missing or surplus): download both again"
                    )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"DeepCompression: no readable autoencoder at pretrained={where}: give a folder in diffusers' format "
                f"or a hub name that can be reached (`hf download {pretrained}` beforehand); check `subfolder`"
            ) from error
        self.channels = self.model.config.latent_channels
        self.downsampling = self.model.spatial_compression_ratio
        self.scale = self.model.config.scaling_factor
        if tiling:
            self.model.enable_tiling()
        self.requires_grad_(False)
        self.eval()

    def encode(self, images: Tensor) -> Tensor:
        """The scaled code, fp32."""
        with _own_precision(images):
            code: Tensor = self.model.encode(images.to(self.model.dtype), return_dict=False)[0]
        return code.float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images of the latents, fp32, cut to [-1, 1]."""
        with _own_precision(latents):
            images: Tensor = self.model.decode((latents / self.scale).to(self.model.dtype), return_dict=False)[0]
        return images.float().clamp(-1, 1)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the autoencoder in diffusers' format."""
        self.model.save_pretrained(str(directory))


def _own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast, which the meta device knows none of."""
    return nullcontext() if tensor.device.type == "meta" else torch.autocast(tensor.device.type, enabled=False)
