"""Base of autoencoders in diffusers' format: loading, precision and frozen weights."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emf_lightning.latents.base import Autoencoder
from emf_lightning.pretrained.files import config_of


class PublishedAutoencoder(Autoencoder):
    """Base of autoencoders with a class in diffusers.

    Computes in ``dtype`` without autocast, so that cached latents do not depend on the caller's precision. On the meta
    device the model has its size and no weights.

    Args:
        kind: class in diffusers.
        pretrained: folder or hub name in diffusers' format.
        subfolder: ``vae`` in a pipeline's repository; null for an autoencoder's own repository.
        dtype: of weights and computation.

    Raises:
        ValueError: if the weights cannot be loaded.
    """

    scale: float
    shift: float = 0.0

    def __init__(
        self, kind: Any, pretrained: str, subfolder: str | None, dtype: Literal["float32", "bfloat16"]
    ) -> None:
        super().__init__()
        name = type(self).__name__
        where = pretrained if subfolder is None else f"{pretrained} (subfolder {subfolder})"
        try:
            if torch.get_default_device().type == "meta":
                self.model = kind.from_config(config_of(pretrained, subfolder))
                nn.Module.to(self.model, dtype=getattr(torch, dtype))  # diffusers' own warns
            else:
                self.model, info = kind.from_pretrained(
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
                        f"{name}: the weights at {where} are not those of its config.json ({odd[0]} and "
                        f"{len(odd) - 1} more are missing or surplus): download both again"
                    )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{name}: no readable autoencoder at pretrained={where}: give a folder in diffusers' format "
                f"or a hub name that can be reached (`hf download {pretrained}` beforehand); check `subfolder`"
            ) from error
        self.channels = self.model.config.latent_channels
        self.requires_grad_(False)
        self.eval()

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Latents of the model before shift and scale."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents, shifted and scaled, fp32."""
        with without_autocast(images):
            return (self._encode(images.to(self.model.dtype)).float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images, fp32, clamped to [-1, 1]."""
        with without_autocast(latents):
            latents = (latents / self.scale + self.shift).to(self.model.dtype)
            images: Tensor = self.model.decode(latents, return_dict=False)[0]
        return images.float().clamp(-1, 1)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the autoencoder in diffusers' format."""
        self.model.save_pretrained(str(directory))


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Context that turns autocast off; the meta device has none."""
    return nullcontext() if tensor.device.type == "meta" else torch.autocast(tensor.device.type, enabled=False)
