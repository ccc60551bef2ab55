"""Fills the caches ahead of training; ranks share the work, and an interrupted call is simply repeated."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from emf_lightning.data.batch_encoder import BatchEncoder
from emf_lightning.data.cache.entry_cache import EntryCache, format_bytes
from emf_lightning.data.cache.entry_format import EntryFormat, StoredDtype
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.raw_batch import RawBatch
from emf_lightning.data.reading.sources import count_all
from emf_lightning.data.reading.streams import CACHED
from emf_lightning.text.blip3o_next import BLIP3oNext

DTYPES: tuple[StoredDtype, ...] = ("float32", "bfloat16", "float16", "float8")


@dataclass(frozen=True)
class StorageOption:
    """One way to store entries: dtype, bytes of all samples on disk, relative L2 error, the encoder's token_pool."""

    dtype: StoredDtype
    size: int
    error: float
    token_pool: int = 1


@dataclass(frozen=True)
class FillProgress:
    """Progress of this rank: samples written, cached already, left out (by reason), and seconds since the start.

    Each of several captions of an image is a sample, and so is a caption of ``sampling_captions``, written or not.
    """

    done: int
    present: int
    skipped: dict[str, int]
    seconds: float


class CacheFiller:
    """Fills the caches of ``data`` from its training shards.

    Args:
        data: data with a cache, a latent cache, or both.
        device: device of the encoders.
        rank: rank of this process among the ``ranks`` that share the work: those of one machine, with its own caches.
        machines: that run this at once, each for itself.

    Raises:
        ValueError: if there is no cache to fill, images are mirrored at random, or shards are missing.
    """

    def __init__(
        self, data: CaptionImageData, device: torch.device, rank: int = 0, ranks: int = 1, machines: int = 1
    ) -> None:
        if data.cache is None and data.latent_cache is None:
            both = (
                "data.cache, data.latent_cache or both" if data.images else "data.cache (images: false has no latents)"
            )
            raise ValueError(f"data: nothing to fill; set {both}")
        if data.flip and (data.latent_cache is not None or data.text.image_size is not None):
            raise ValueError(
                "data.flip: mirrors images at random, so that each would need two entries; set data.flip to false, or "
                "let `emf fit` fill the caches during training"
            )
        self.data = data
        self.device = device
        self.rank, self.ranks = rank, ranks
        self.shards = data.training_sources
        data.open_caches(machines)
        data.encoder.device = device
        caches = {"feature_cache": data.cache, "latent_cache": data.latent_cache}
        lanes = max(data.num_workers, 1)
        self.stream = data.stream(self.shards, rank=rank, ranks=ranks, lanes=lanes, only_missing=True, **caches)

    @property
    def caches(self) -> dict[str, EntryCache]:
        """The caches as "features" and "latents"."""
        both = {"features": self.data.cache, "latents": self.data.latent_cache}
        return {name: cache for name, cache in both.items() if cache is not None}

    def count(self) -> int:
        """Number of samples in all shards, see ``count_all``."""
        return count_all(self.shards)

    def entries(self, samples: int) -> dict[str, int]:
        """Number of entries of each cache for ``samples`` samples: an image may have several captions."""
        captions = self.stream.captions_per_sample()
        found = {name: round(samples * (captions if name == "features" else 1)) for name in self.caches}
        if "features" in found and (sampling := self.data.sampling_prompts) is not None:
            found["features"] += len(sampling)
        return found

    @torch.no_grad()
    def options(self, samples: int) -> dict[str, list[StorageOption]]:
        """Options of each cache for ``samples`` samples: size by dtype, and its error on one batch.

        For an encoder that can average tokens, also the size after averaging, with the error of the average itself.
        Raises ``ValueError`` if the shards give no batch.
        """
        data = self.data
        batch = next(iter(data.stream(self.shards, images=data.images))).to(self.device)
        if not len(batch):
            raise ValueError(f"data.shards: no usable sample in {len(self.shards)} shards ({self.shards[0]}, ...)")
        uncached = BatchEncoder(data.text, data.autoencoder, None, None, data.resolution, device=self.device)
        encode: dict[str, Callable[[RawBatch], Any]] = {"features": uncached.features, "latents": uncached.latents}
        options = {}
        for name, cache in self.caches.items():
            context, mask = (tensor.cpu() for tensor in cache.to_tokens(encode[name](batch)))
            entries = [EntryFormat(cache.entry_format.length, cache.entry_format.width, dtype) for dtype in DTYPES]
            number = self.entries(samples)[name]
            options[name] = [StorageOption(e.dtype, cache.size(number, e), e.error(context, mask)) for e in entries]
            if name == "features" and isinstance(data.text, BLIP3oNext) and data.text.token_pool == 1:
                options[name] += _pooled_options(cache, context, number)
        return options

    def check(self, samples: int) -> dict[str, str]:
        """The sentence of ``EntryCache.estimate`` for each cache.
        Raises ``ValueError`` if the entries do not fit the disk, alone or together, or a cache's ``max_gb``.
        """
        entries = self.entries(samples)
        sentences = {name: cache.estimate(entries[name]) for name, cache in self.caches.items()}
        for name, cache in self.caches.items():
            if cache.size(entries[name]) > cache.max_gb * 1e9:
                raise ValueError(f"data: the {name} would not fit: {sentences[name]}")
        needed = sum(cache.size(entries[name]) for name, cache in self.caches.items())
        room = min(cache.available_bytes() for cache in self.caches.values())
        limit = min(cache.max_gb for cache in self.caches.values()) * 1e9
        paths = {str(cache.path.resolve()) for cache in self.caches.values()}
        if len(paths) == 1 < len(self.caches) and needed > min(limit, room):
            raise ValueError(
                f"data: features and latents share {paths.pop()!r} and take {format_bytes(needed)} together, the limit "
                f"is {format_bytes(limit)} and the disk has room for {format_bytes(room)}: raise both max_gb, or "
                "choose another path for one"
            )
        return sentences

    @torch.no_grad()
    def fill(self) -> Iterator[FillProgress]:
        """Computes and writes missing entries; yields the progress after each batch; ValueError if a cache is full."""
        workers = self.data.num_workers
        loader = DataLoader(self.stream, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)
        done, left_out = 0, Counter[str]()
        began = time.perf_counter()
        if self.data.cache is not None:
            self.data.null_features()
        if self.data.cache is not None and (sampling := self.data.sampling_prompts) is not None:
            size = self.data.batch_size
            for first in range(self.rank * size, len(sampling), self.ranks * size):
                here = range(first, min(first + size, len(sampling)))
                self.data.text_features([sampling.prompts[i] for i in here])
                self._check_room()
                done += len(here)
                yield FillProgress(done, 0, {}, time.perf_counter() - began)
        for batch in loader:
            left_out.update(batch.skipped)
            if len(batch):
                self._store(batch.to(self.device))
                done += len(batch)
            skipped = {reason: count for reason, count in left_out.items() if reason != CACHED}
            yield FillProgress(done, left_out[CACHED], skipped, time.perf_counter() - began)

    def _store(self, batch: RawBatch) -> None:
        if self.data.cache is not None:
            self.data.encoder.features(batch)
        if self.data.latent_cache is not None:
            self.data.encoder.latents(batch)
        self._check_room()

    def _check_room(self) -> None:
        for name, cache in self.caches.items():
            if cache.full:
                raise ValueError(
                    f"data: the cache of {name} took no more at max_gb={cache.max_gb:g} ({str(cache.path)!r}); raise "
                    "max_gb or make room, then repeat the call: it continues from here"
                )


def _pooled_options(cache: EntryCache, context: Tensor, samples: int) -> Iterator[StorageOption]:
    """Options with averaged squares of tokens, in the cache's dtype; the error is that of the average."""
    side = math.isqrt(context.shape[1] - 1)
    patches = context[:, 1:].transpose(1, 2).reshape(len(context), -1, side, side)
    for pool in (pool for pool in (3, 9) if side % pool == 0):
        averages = torch.nn.functional.avg_pool2d(patches, pool)
        spread = averages.repeat_interleave(pool, -1).repeat_interleave(pool, -2)
        entries = EntryFormat(1 + averages[0, 0].numel(), context.shape[2], cache.dtype)
        error = float((spread - patches).norm() / context.norm())
        yield StorageOption(cache.dtype, cache.size(samples, entries), error, pool)
