"""What autoencoders in diffusers' format share: loading, precision, and frozen weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emf_lightning.latents.base import Autoencoder
from emf_lightning.pretrained.loading import PretrainedWeights, load_pretrained


class PublishedAutoencoder(Autoencoder):
    """Base of the autoencoders that diffusers has a class for.

    It computes in ``dtype`` outside any autocast: what is cached must not depend on who asked first. On the meta device
    it has its size and no weights.

    Args:
        kind: diffusers' class.
        pretrained: folder or hub name in diffusers' format.
        subfolder: ``vae`` in a whole pipeline's repository; null where the autoencoder lies on its own.
        dtype: of the weights and the arithmetic.

    Raises:
        ValueError: where there are no such weights.
    """

    def __init__(
        self, kind: Any, pretrained: str, subfolder: str | None, dtype: Literal["float32", "bfloat16"]
    ) -> None:
        super().__init__()
        source = PretrainedWeights(pretrained, subfolder)
        self.model = load_pretrained(type(self).__name__, kind, source, frozen=True, dtype=dtype)
        self.channels = self.model.config.latent_channels
        self.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the autoencoder in diffusers' format."""
        self.model.save_pretrained(str(directory))


def own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast, which the meta device knows none of."""
    return nullcontext() if tensor.device.type == "meta" else torch.autocast(tensor.device.type, enabled=False)
