"""Latents that are computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emf_lightning.data.cache.entry_cache import EntryCache
from emf_lightning.latents.base import Autoencoder
from emf_lightning.text.fingerprint import fingerprint, weights_digest


class LatentCache(EntryCache):
    """The latents of pictures that any process has encoded before, by autoencoder, picture and transform.

    A picture found here is not even decoded. For the arguments see ``EntryCache``; a channel counts as a token.
    """

    def open(self, autoencoder: Autoencoder, side: int, transform: str) -> None:
        """Binds the cache to latents of ``side`` positions, of pictures made square by ``transform``.

        Raises:
            ValueError: if the folder cannot be written to or holds something else.
        """
        self._side = side
        name = fingerprint(autoencoder=autoencoder_fingerprint(autoencoder), transform=transform)
        self._open(name, autoencoder.channels, side * side)

    def keep(self, pictures: Sequence[str], latents: Tensor) -> Tensor:
        """Writes the latents ``[B, C, H, W]``; returns them as they will come back, where they were."""
        flat = latents.flatten(2)
        self._keep(pictures, flat, torch.ones(flat.shape[:2], dtype=torch.bool))
        return self.entries.rounded(flat).view_as(latents)

    def unpack(self, entries: Sequence[bytes]) -> Tensor:
        """The latents ``[B, C, H, W]`` of fetched entries, in the dtype that they are stored in (float8: bfloat16)."""
        flat = self.entries.unpack(entries)[0]
        return flat.view(*flat.shape[:2], self._side, self._side)


def autoencoder_fingerprint(autoencoder: Autoencoder) -> str:
    """A digest of all that the latents depend on: class, settings that are plain values, configurations, weights."""
    settings, configurations = {}, {}
    for name, value in vars(autoencoder).items():
        if isinstance(value, (bool, int, float, str, torch.dtype)) and not name.startswith("_") and name != "training":
            settings[name] = str(value)
    for name, part in autoencoder.named_modules():
        config = getattr(part, "config", None)
        if isinstance(config, Mapping):  # diffusers' models; their private entries tell where they come from
            configurations[name] = {key: str(value) for key, value in config.items() if not key.startswith("_")}
    return fingerprint(
        autoencoder=type(autoencoder).__name__,
        settings=settings,
        configurations=configurations,
        weights=weights_digest(autoencoder),
    )
