"""Lookup of one batch in a cache, completed by the encoder: the one way to text features and to latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from emf_lightning.data.cache.entry_cache import EntryCache, T
from emf_lightning.text.base import TextFeatures

Item = TypeVar("Item")


class Lookup(Generic[T]):
    """B keys, and the values of those that a cache holds.

    Loader workers look up, so that they decode only the images that are still needed; ``complete`` encodes the missing
    elements on the training device. Not a dataclass: Lightning takes dataclasses apart.

    Args:
        keys: the B keys; None, without a cache, stands for a key of its own.
        cache: the cache that is read; without one no key is found.

    Attributes:
        found: ``[B]``, bool, on the CPU: True where there is an entry.
        hits: the values found, in batch order and in the stored dtype; None if there are none.
    """

    def __init__(self, keys: Sequence[str | None], cache: EntryCache[T] | None = None) -> None:
        self.keys = tuple(keys)
        self.found, self.hits = torch.zeros(len(self.keys), dtype=torch.bool), None
        if cache is not None and keys:
            self.found, self.hits = cache.read([key for key in self.keys if key is not None])

    def __getitem__(self, kept: Sequence[int]) -> Lookup[T]:
        """The elements at ascending indices."""
        part: Lookup[T] = Lookup([self.keys[index] for index in kept])
        part.found = self.found[list(kept)]
        if self.hits is not None and part.found.any():
            row = self.found.cumsum(0) - 1
            part.hits = self.hits[row[list(kept)][part.found]]
        return part

    @staticmethod
    def cat(parts: Sequence[Lookup[T]]) -> Lookup[T]:
        """The elements of all parts."""
        whole: Lookup[T] = Lookup([key for part in parts for key in part.keys])
        whole.found = torch.cat([part.found for part in parts])
        hits: list[Any] = [part.hits for part in parts if part.hits is not None]
        whole.hits = _cat(hits) if hits else None
        return whole

    def missing(self, items: Sequence[Item]) -> list[Item]:
        """Those of B ``items`` whose keys were not found."""
        return [item for item, found in zip(items, self.found.tolist(), strict=True) if not found]

    def complete(self, encode: Callable[[list[int]], T], cache: EntryCache[T] | None, device: torch.device) -> T:
        """All B values on ``device``: hits as float32, the missing elements encoded.

        Missing keys are looked up once more, because another batch may have stored them since. The rest is encoded in
        one call, each key once, stored, and rounded as the cache returns it from then on. ``encode`` returns values of
        missing elements, given their indices among all missing elements. Without ``cache`` it encodes all of them.
        """
        keys = self.missing([str(index) if key is None else key for index, key in enumerate(self.keys)])
        if not keys:
            return self._merge(None, device)
        again = Lookup(keys, cache)
        new: dict[str, int] = {}
        for key, index in again.missing([(key, index) for index, key in enumerate(keys)]):
            new.setdefault(key, index)
        encoded: T | None = None
        if new:
            encoded = encode(list(new.values()))
            if cache is not None:
                encoded = encoded.to(device="cpu")  # where entries are packed, so that rounding agrees to the bit
                cache.store(list(new), encoded)
                encoded = cache.as_stored(encoded)
            place = {key: index for index, key in enumerate(new)}
            places = [place[key] for key in again.missing(keys)]
            encoded = encoded if len(places) == len(new) else encoded[torch.tensor(places)]
        return self._merge(again._merge(encoded, device), device)

    def _merge(self, misses: T | None, device: torch.device) -> T:
        """All B values in batch order: the hits, and ``misses`` for the missing elements."""
        parts: list[Any] = [] if self.hits is None else [self.hits.to(device=device, dtype=torch.float32)]
        parts += [] if misses is None else [misses.to(device=device)]
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([self.found.nonzero(), (~self.found).nonzero()]).flatten().argsort()
        return _cat(parts)[order]


def _cat(parts: Sequence[Any]) -> Any:
    return TextFeatures.cat(parts) if isinstance(parts[0], TextFeatures) else torch.cat(list(parts))
