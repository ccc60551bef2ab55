"""Filling the caches ahead of training: what they lack, each rank its part, as often as it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from emf_lightning.data.cache.entry_cache import EntryCache, readable
from emf_lightning.data.cache.entry_format import EntryFormat, StoredDtype
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.shard_paths import shard_paths
from emf_lightning.data.reading.streams import CACHED, RawBatch, ShardStream
from emf_lightning.data.reading.tar_samples import count_samples
from emf_lightning.text.blip3o_next import BLIP3oNext

DTYPES: tuple[StoredDtype, ...] = ("float32", "bfloat16", "float16", "float8")


@dataclass(frozen=True)
class StorageOption:
    """What one dtype takes and costs.

    Attributes:
        dtype: of the stored numbers.
        token_pool: of the encoder, where it has one and could take another; 1 is the published one.
        size: bytes of all samples on disk.
        error: relative, of what comes back, on the samples that were looked at.
    """

    dtype: StoredDtype
    size: int
    error: float
    token_pool: int = 1


@dataclass(frozen=True)
class Filled:
    """How far this rank is.

    Attributes:
        done: samples written.
        present: samples that were there already.
        skipped: reason -> samples left out.
        seconds: since the first one.
    """

    done: int
    present: int
    skipped: dict[str, int]
    seconds: float


class CacheFilling:
    """What fills the caches of ``data`` from its training shards.

    Args:
        data: with a cache, or a latent cache, or both.
        device: on which to encode.
        rank: of this process.
        ranks: processes that share the work, each on its own part of the samples.

    Raises:
        ValueError: if there is no cache to fill, images are mirrored at random, or the shards are not there.
    """

    def __init__(self, data: CaptionImageData, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        if data.cache is None and data.latent_cache is None:
            raise ValueError("data: nothing to fill; set data.cache, data.latent_cache or both")
        if data.flip and (data.latent_cache is not None or data.text.view_side is not None):
            raise ValueError(
                "data.flip: mirrors images at random, so each would have to be kept twice; set data.flip to false, or "
                "let `emf fit` fill the caches on its way"
            )
        self.data = data
        self.device = device
        self.shards = shard_paths(data.shards, "CaptionImageData: shards")
        data.open_caches()
        data.move(device)
        lanes = max(data.num_workers, 1)
        self.stream = ShardStream(
            self.shards,
            data.transform,
            data.batch_size,
            rank=rank,
            ranks=ranks,
            lanes=lanes,
            features=data.cache,
            latents=data.latent_cache,
            view_side=data.text.view_side,
            only_missing=True,
            captions=data.caption_files,
        )

    @property
    def caches(self) -> dict[str, EntryCache]:
        """The caches by what they hold."""
        both = {"features": self.data.cache, "latents": self.data.latent_cache}
        return {name: cache for name, cache in both.items() if cache is not None}

    def count(self) -> int:
        """Samples in all shards."""
        return sum(map(count_samples, self.shards))

    @torch.no_grad()
    def options(self, samples: int) -> dict[str, list[StorageOption]]:
        """For each cache what each dtype would take for ``samples`` samples, and its error on one batch of them.

        Of an encoder whose tokens can be averaged also what that would save, with the error that is there before
        anything is stored.

        Raises:
            ValueError: if the shards give no batch.
        """
        data = self.data
        stream = ShardStream(
            self.shards, data.transform, data.batch_size, view_side=data.text.view_side, captions=data.caption_files
        )
        batch = next(iter(stream)).to(self.device)
        if not len(batch):
            raise ValueError(f"data.shards: no usable sample in {len(self.shards)} shards ({self.shards[0]}, ...)")
        found: dict[str, tuple[EntryCache, Tensor, Tensor]] = {}
        if data.cache is not None:
            features = (
                data.placed(data.text)(batch.captions)
                if batch.views is None
                else data.placed(data.text).encode_pairs(batch.captions, batch.views.float() / 127.5 - 1)
            )
            found["features"] = (data.cache, features.context.cpu(), features.mask.cpu())
        if data.latent_cache is not None:
            latents = data.placed(data.autoencoder).encode(batch.images.float() / 127.5 - 1).float().flatten(2).cpu()
            found["latents"] = (data.latent_cache, latents, torch.ones(latents.shape[:2], dtype=torch.bool))
        options = {}
        for name, (cache, context, mask) in found.items():
            entries = [EntryFormat(cache.entries.length, cache.entries.width, dtype) for dtype in DTYPES]
            options[name] = [StorageOption(e.dtype, cache.size(samples, e), e.error(context, mask)) for e in entries]
            if name == "features" and isinstance(data.text, BLIP3oNext) and data.text.token_pool == 1:
                options[name] += _pooled_options(cache, context, samples)
        return options

    def check(self, samples: int) -> dict[str, str]:
        """For each cache one sentence on what ``samples`` samples take, and what there is.

        Raises:
            ValueError: if they do not fit the disk, alone or together, or a cache's ``max_gb``.
        """
        sentences = {name: cache.estimate(samples) for name, cache in self.caches.items()}
        for name, cache in self.caches.items():
            if cache.size(samples) > cache.max_gb * 1e9:
                raise ValueError(f"data: the {name} would not fit: {sentences[name]}")
        needed = sum(cache.size(samples) for cache in self.caches.values())
        room = min(cache.room() for cache in self.caches.values())
        paths = {str(cache.path.resolve()) for cache in self.caches.values()}
        if len(paths) == 1 < len(self.caches):
            limit = min(cache.max_gb for cache in self.caches.values()) * 1e9
            if needed > min(limit, room):
                raise ValueError(
                    f"data: features and latents share {paths.pop()!r} and take {readable(needed)} together, the limit "
                    f"is {readable(limit)} and the disk has room for {readable(room)}: raise both max_gb, or choose "
                    "another path for one"
                )
        return sentences

    @torch.no_grad()
    def fill(self) -> Iterator[Filled]:
        """Computes and writes what is missing; says after each batch how far it is.

        Raises:
            ValueError: if a cache is full.
        """
        workers = self.data.num_workers
        loader = DataLoader(self.stream, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)
        done = present = 0
        skipped: dict[str, int] = {}
        began = time.perf_counter()
        if self.data.cache is not None:
            self.data.null_features()
        for batch in loader:
            for reason, count in batch.skipped.items():
                if reason == CACHED:
                    present += count
                else:
                    skipped[reason] = skipped.get(reason, 0) + count
            if len(batch):
                self._keep(batch.to(self.device))
                done += len(batch)
            yield Filled(done, present, dict(skipped), time.perf_counter() - began)

    def _keep(self, batch: RawBatch) -> None:
        if self.data.cache is not None:
            self.data.features_of(batch)
        if self.data.latent_cache is not None:
            self.data.latents_of(batch)
        for name, cache in self.caches.items():
            if cache.full:
                raise ValueError(
                    f"data: the cache of {name} took no more at max_gb={cache.max_gb:g} ({str(cache.path)!r}); raise "
                    "max_gb or make room, then call again: it goes on where it stopped"
                )


def _pooled_options(cache: EntryCache, context: Tensor, samples: int) -> Iterator[StorageOption]:
    """What averaging squares of tokens would take, in the cache's dtype: the error is that of the average itself."""
    side = math.isqrt(context.shape[1] - 1)
    patches = context[:, 1:].transpose(1, 2).reshape(len(context), -1, side, side)
    for pool in (pool for pool in (3, 9) if side % pool == 0):
        averages = torch.nn.functional.avg_pool2d(patches, pool)
        spread = averages.repeat_interleave(pool, -1).repeat_interleave(pool, -2)
        entries = EntryFormat(1 + averages[0, 0].numel(), context.shape[2], cache.dtype)
        error = float((spread - patches).norm() / context.norm())
        yield StorageOption(cache.dtype, cache.size(samples, entries), error, pool)
