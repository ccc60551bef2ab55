"""Batch of samples as a loader worker yields it: decoded, looked up in the caches, not yet encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.cache.lookup import Lookup
from emf_lightning.data.shared_memory import empty
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


class RawBatch:
    """B samples, not yet encoded. Not a dataclass: Lightning's precision plugins and movers take dataclasses apart.

    Attributes:
        captions: the B captions.
        features: lookup of the B text features.
        latents: lookup of the B latents.
        images: images for the autoencoder, ``[missing latents, 3, H, H]``, uint8, in batch order; in memory a pixel's
            three numbers lie together, as decoders write them.
        encoder_images: images for the text encoder, ``[missing features, 3, S, S]``, uint8, likewise.
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
        captions: Sequence[str],
        features: Lookup[TextFeatures],
        latents: Lookup[Tensor],
        images: Tensor,
        encoder_images: Tensor,
    ) -> None:
        self.captions = tuple(captions)
        self.features = features
        self.latents = latents
        self.images = images
        self.encoder_images = encoder_images

    @staticmethod
    def cat(parts: Sequence[RawBatch]) -> RawBatch:
        """The samples of all parts, the only one itself."""
        if len(parts) == 1:
            return parts[0]
        return RawBatch(
            [caption for part in parts for caption in part.captions],
            Lookup.cat([part.features for part in parts]),
            Lookup.cat([part.latents for part in parts]),
            torch.cat([part.images for part in parts]),
            torch.cat([part.encoder_images for part in parts]),
        )

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


class ImageRows:
    """Memory of a batch for at most ``count`` images of one side, which are added one by one."""

    def __init__(self, count: int, side: int) -> None:
        self._rows, self._count = empty(count, side, side, 3, dtype=torch.uint8), 0

    def add(self, pixels: NDArray[np.uint8] | None) -> None:
        """Copies an image ``[side, side, 3]``; None adds none."""
        if pixels is not None:
            self._rows[self._count].numpy()[:] = pixels
            self._count += 1

    @property
    def filled(self) -> Tensor:
        """The images so far, ``[n, 3, side, side]``."""
        return self._rows[: self._count].permute(0, 3, 1, 2)
