"""Batch of samples as a loader worker yields it: decoded, looked up in the caches, not yet encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.cache.lookup import Lookup
from emf_lightning.text.base import TextFeatures


class Position(NamedTuple):
    """Position in a lane: a block of samples, and how many of its samples were emitted.

    The block starts at byte ``offset`` of the lane's ``shard``, with the sample of running number ``number`` in it.
    """

    shard: int = 0
    offset: int = 0
    number: int = 0
    block: int = 0
    emitted: int = 0


class Sample(NamedTuple):
    """A usable sample; keys are None without a cache, entries if not found, pixels if cached or not needed."""

    caption: str
    feature_key: str | None
    latent_key: str | None
    image: NDArray[np.uint8] | None
    encoder_image: NDArray[np.uint8] | None
    features: bytes | None
    latents: bytes | None


class RawBatch:
    """B samples, not yet encoded. Not a dataclass: Lightning's precision plugins and movers take dataclasses apart.

    Attributes:
        captions: the B captions.
        features: lookup of the B text features.
        latents: lookup of the B latents.
        images: images for the autoencoder, ``[missing latents, 3, H, H]``, uint8, in batch order.
        encoder_images: images for the text encoder, ``[missing features, 3, S, S]``, uint8, in batch order.
        lane: the lane of the rank that it comes from.
        position: of the lane after this batch.
        skipped: reason -> samples left out since the lane's previous batch.
        examples: reason -> location of the first of them.
        ticket: number of this batch among those that the loader has yielded, from 1.
    """

    lane: int
    position: Position
    skipped: dict[str, int]
    examples: dict[str, str]
    ticket = 0

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: int,
        encoder_image_size: int,
        feature_cache: FeatureCache | None,
        latent_cache: LatentCache | None,
    ) -> None:
        self.captions = tuple(sample.caption for sample in samples)
        keys, entries = [sample.feature_key for sample in samples], [sample.features for sample in samples]
        self.features: Lookup[TextFeatures] = Lookup(keys, entries, feature_cache)
        keys, entries = [sample.latent_key for sample in samples], [sample.latents for sample in samples]
        self.latents: Lookup[Tensor] = Lookup(keys, entries, latent_cache)
        self.images = _stack([sample.image for sample in samples], image_size)
        self.encoder_images = _stack([sample.encoder_image for sample in samples], encoder_image_size)

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RawBatch:
        """This batch, its tensors on ``device``."""
        return self._apply(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> RawBatch:
        """This batch, its tensors in page-locked memory."""
        return self._apply(lambda tensor: tensor.pin_memory())

    def _apply(self, function: Callable[[Any], Any]) -> RawBatch:
        self.images, self.encoder_images = function(self.images), function(self.encoder_images)
        for lookup in (self.features, self.latents):
            lookup.hits = None if lookup.hits is None else function(lookup.hits)
        return self


def _stack(images: Sequence[NDArray[np.uint8] | None], size: int) -> Tensor:
    """``[n, 3, size, size]`` of the n images that are not None."""
    present = [image for image in images if image is not None]
    stacked = torch.from_numpy(np.stack(present)) if present else torch.empty(0, size, size, 3, dtype=torch.uint8)
    return stacked.permute(0, 3, 1, 2).contiguous()
