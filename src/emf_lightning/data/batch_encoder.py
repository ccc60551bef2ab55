"""Encodes raw batches with the frozen text encoder and autoencoder, through their caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.cache.lookup import Lookup
from emf_lightning.data.reading.raw_batch import RawBatch
from emf_lightning.latents.base import Autoencoder
from emf_lightning.text.base import NULL_CAPTION, TextEncoder, TextFeatures

Frozen = TypeVar("Frozen", TextEncoder, Autoencoder)


@dataclass(eq=False, repr=False)
class BatchEncoder:
    """The frozen parts and their caches, see ``CaptionImageData``, with all results on ``device``.

    A part is moved there at its first use, since cached data may never need it.
    """

    text: TextEncoder
    autoencoder: Autoencoder
    cache: FeatureCache | None
    latent_cache: LatentCache | None
    resolution: int
    images: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _null: TextFeatures | None = field(default=None, init=False)

    @property
    def latent_size(self) -> int:
        """H = W of the latents."""
        return self.resolution // self.autoencoder.downsampling

    def open_caches(self, transform: str) -> None:
        """Binds the caches to the frozen parts and to images after ``transform``."""
        if self.cache is not None:
            self.cache.open(self.text)
        if self.latent_cache is not None:
            self.latent_cache.open(self.autoencoder, self.latent_size, transform)

    @torch.no_grad()
    def encode(self, batch: RawBatch) -> CaptionImageBatch:
        """Latents, text features and null features of a batch."""
        return CaptionImageBatch(self.latents(batch), self.features(batch), self.null_features(), batch.captions)

    def latents(self, batch: RawBatch) -> Tensor:
        """Latents ``[B, C, H, W]``, fp32, of a batch on ``device``."""
        if not self.images:
            shape = (len(batch), self.autoencoder.channels, self.latent_size, self.latent_size)
            return torch.zeros(shape, device=self.device)

        def encode(indices: list[int]) -> Tensor:
            latents = self._placed(self.autoencoder).encode(_pixels(batch.images, indices)).float()
            return self._checked("encode", latents, self.autoencoder.channels, self.latent_size)

        return batch.latents.complete(encode, self.latent_cache, self.device)

    def features(self, batch: RawBatch) -> TextFeatures:
        """Training features of a batch's captions, or of its captions and images if the encoder reads both."""
        captions = batch.features.missing(batch.captions)

        def encode(indices: list[int]) -> TextFeatures:
            chosen = [captions[index] for index in indices]
            if self.text.image_size is None:
                return self._placed(self.text)(chosen)
            pairs = self._placed(self.text).encode_pairs(chosen, _pixels(batch.encoder_images, indices))
            return pairs.to(dtype=torch.float32)

        return batch.features.complete(encode, self.cache, self.device)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> TextFeatures:
        """Features of captions alone."""
        unique = list(dict.fromkeys(captions))
        keys = unique if self.cache is None else [self.cache.key(caption) for caption in unique]

        def encode(indices: list[int]) -> TextFeatures:
            return self._placed(self.text)([unique[index] for index in indices])

        lookup: Lookup[TextFeatures] = Lookup(keys)
        features = lookup.complete(encode, self.cache, self.device)
        place = {caption: index for index, caption in enumerate(unique)}
        return features[torch.tensor([place[caption] for caption in captions], device=self.device)]

    def null_features(self) -> TextFeatures:
        """Features ``[1, L, D]`` of the null caption, computed once a device."""
        if self._null is None or self._null.context.device != self.device:
            with torch.inference_mode(False):  # training reuses features that validation computed
                self._null = self.text_features([NULL_CAPTION])
        return self._null

    def forget_null(self) -> None:
        """Discards the stored null features: the encoder has changed."""
        self._null = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """8-bit images ``[B, H, W, 3]`` of ``latents``."""
        images = self._placed(self.autoencoder).decode(latents.float())
        self._checked("decode", images, 3, latents.shape[-1] * self.autoencoder.downsampling)
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _checked(self, method: str, given: Tensor, channels: int, side: int) -> Tensor:
        """The autoencoder's output, or a ValueError where its attributes promise another shape."""
        if given.shape[1:] != (channels, side, side):
            autoencoder = self.autoencoder
            raise ValueError(
                f"{type(autoencoder).__name__}.{method} gives {list(given.shape[1:])}, but its channels = "
                f"{autoencoder.channels} and downsampling = {autoencoder.downsampling} say {[channels, side, side]}; "
                "correct these attributes"
            )
        return given

    def _placed(self, part: Frozen) -> Frozen:
        """The part on the device; others, such as a pipeline, may have moved it."""
        held = next(chain(part.parameters(), part.buffers()), None)
        if held is not None and not _same(held.device, self.device):
            part.to(self.device)
        return part


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; without an index it is any of the kind."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def _pixels(images: Tensor, indices: list[int]) -> Tensor:
    """The 8-bit images at ascending, unique indices as fp32 in [-1, 1]; not selected if these are all."""
    chosen = images if len(indices) == len(images) else images[indices]
    return chosen.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
