"""Base of autoencoders in diffusers' format: loading, precision and frozen weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emf_lightning.latents.base import Autoencoder
from emf_lightning.pretrained.loading import PretrainedWeights, load_pretrained


class PublishedAutoencoder(Autoencoder):
    """Base of autoencoders with a class in diffusers.

    Computes in ``dtype`` without autocast, so that cached latents do not depend on the caller's precision. On the meta
    device the model has its size and no weights.

    Args:
        kind: class in diffusers.
        pretrained: folder or hub name in diffusers' format.
        subfolder: ``vae`` in a pipeline's repository; null for an autoencoder's own repository.
        dtype: of weights and computation.
        tiling: decodes large images (DC-AE: beyond 512 px) in overlapping tiles: less memory, slower, faint seams.

    Raises:
        ValueError: if the weights cannot be loaded.
    """

    scale: float
    shift: float = 0.0

    def __init__(
        self,
        kind: Any,
        pretrained: str,
        subfolder: str | None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        tiling: bool = False,
    ) -> None:
        super().__init__()
        source = PretrainedWeights(pretrained, subfolder)
        self.model = load_pretrained(type(self).__name__, kind, source, frozen=True, dtype=dtype)
        self.channels = self.model.config.latent_channels
        if tiling:
            self.model.enable_tiling()
        self.eval()

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Latents of the model before shift and scale."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents, shifted and scaled, fp32."""
        with without_autocast(images), self._untiled():
            return (self._encode(images.to(self.model.dtype)).float() - self.shift) * self.scale

    @contextmanager
    def _untiled(self) -> Iterator[None]:
        """A context without tiles, which would change the latents, and with them the meaning of a cache's entries."""
        tiling, self.model.use_tiling = getattr(self.model, "use_tiling", False), False
        try:
            yield
        finally:
            self.model.use_tiling = tiling

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
