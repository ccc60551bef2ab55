"""Batch of samples as a loader worker yields it: decoded, looked up in the caches, not yet encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.cache.lookup import Lookup


class Position(NamedTuple):
    """Position in a lane: the start of a block of samples, and how many samples of its permutation were emitted."""

    shard: int = 0
    """Number of the lane's shards that are finished."""
    offset: int = 0
    """Byte offset of the block's first sample in its shard."""
    number: int = 0
    """Running number of that sample in the shard."""
    block: int = 0
    emitted: int = 0


class Sample(NamedTuple):
    """A usable sample: its cache entries, and pixels for whatever is not cached.

    Attributes:
        caption: its caption.
        feature_key: key of its text features; None where no cache needs one and features depend on the image.
        latent_key: key of its latents; None without a latent cache.
        image: ``[H, H, 3]`` for the autoencoder, or None.
        encoder_image: ``[S, S, 3]`` for the text encoder, or None.
        features: cache entry of its text features, or None.
        latents: cache entry of its latents, or None.
    """

    caption: str
    feature_key: str | None
    latent_key: str | None
    image: NDArray[np.uint8] | None
    encoder_image: NDArray[np.uint8] | None
    features: bytes | None
    latents: bytes | None


class RawBatch:
    """B samples, not yet encoded. Not a dataclass: Lightning's precision plugins and movers take dataclasses apart.

    Args:
        samples: the B samples.
        image_size: H.
        encoder_image_size: S; None if text features depend on captions alone.
        feature_cache: where the samples' features come from, if there is one.
        latent_cache: where the samples' latents come from, if there is one.

    Attributes:
        captions: the B captions.
        features: lookup of the B text features.
        latents: lookup of the B latents.
        images: ``[missing latents, 3, H, H]``, uint8, in batch order.
        encoder_images: ``[missing features, 3, S, S]``, uint8, in batch order; None if S is None.
        lane: the lane of the rank that it comes from.
        position: of the lane after this batch.
        skipped: reason -> samples left out since the lane's previous batch.
        examples: reason -> location of the first of them.
        ticket: number of this batch among those that the loader has yielded, from 1.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: int,
        encoder_image_size: int | None = None,
        feature_cache: FeatureCache | None = None,
        latent_cache: LatentCache | None = None,
        *,
        lane: int,
        position: Position,
        skipped: dict[str, int],
        examples: dict[str, str],
    ) -> None:
        self.captions = tuple(sample.caption for sample in samples)
        keys = _keys([sample.feature_key for sample in samples])
        self.features = Lookup(keys, [sample.features for sample in samples], feature_cache)
        keys = _keys([sample.latent_key for sample in samples])
        self.latents = Lookup(keys, [sample.latents for sample in samples], latent_cache)
        self.images = _stack([sample.image for sample in samples], image_size)
        self.encoder_images: Tensor | None = None
        if encoder_image_size is not None:
            self.encoder_images = _stack([sample.encoder_image for sample in samples], encoder_image_size)
        self.lane, self.position, self.skipped, self.examples = lane, position, skipped, examples
        self.ticket = 0

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RawBatch:
        """This batch, its tensors on ``device``."""
        self.images = self.images.to(device, non_blocking=non_blocking)
        if self.encoder_images is not None:
            self.encoder_images = self.encoder_images.to(device, non_blocking=non_blocking)
        self.features.to(device, non_blocking)
        self.latents.to(device, non_blocking)
        return self

    def pin_memory(self) -> RawBatch:
        """This batch, its images, features and latents in page-locked memory."""
        self.images = self.images.pin_memory()
        self.features.pin_memory()
        self.latents.pin_memory()
        return self


def _keys(keys: Sequence[str | None]) -> list[str]:
    """The keys; samples without one get their index, so that no two samples share a value."""
    return [str(index) if key is None else key for index, key in enumerate(keys)]


def _stack(images: Sequence[NDArray[np.uint8] | None], size: int) -> Tensor:
    """``[n, 3, size, size]`` of the n images that are not None."""
    present = [image for image in images if image is not None]
    stacked = torch.from_numpy(np.stack(present)) if present else torch.empty(0, size, size, 3, dtype=torch.uint8)
    return stacked.permute(0, 3, 1, 2).contiguous()
