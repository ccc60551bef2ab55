"""Cache on disk of tensors that a frozen model computes, shared by all processes of all runs."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from emf_lightning.data.cache.entry_format import EntryFormat, StoredDtype, gigabytes
from emf_lightning.data.cache.lmdb_store import LmdbStore
from emf_lightning.text.base import TextFeatures

T = TypeVar("T", Tensor, TextFeatures)


class EntryCache(ABC, Generic[T]):
    """Base of the caches: tokens ``[L, D]`` by a frozen model and a key.

    The stored key is the digest of the model's fingerprint, the stored dtype and the key. One folder therefore serves
    any number of models, and a changed model finds none of the old entries. A damaged entry is counted, computed again
    and overwritten. Objects are small and picklable; every process counts for itself.

    Args:
        path: folder on a local disk, created if missing. Several caches may share one. Each node has its own, which in
            the end holds all samples that its ranks have seen.
        max_gb: size in GB (10^9 bytes) at which the folder stops growing; further entries are computed each time.
        dtype: of the stored numbers; bfloat16 halves the size and keeps three significant digits, float8 (e4m3, a
            power of two for each token) quarters it and keeps one and a half.

    Attributes:
        hits: keys found.
        misses: keys not found, damaged entries included.
        corrupt: keys whose entry was damaged.
        full: keys that were not stored because the cache was full.
    """

    def __init__(self, path: str | Path, max_gb: float = 16.0, dtype: StoredDtype = "float32") -> None:
        if max_gb < 0.001:
            raise ValueError(f"{type(self).__name__}: max_gb must be at least 0.001 (1 MB), got {max_gb}")
        self.path = Path(path).expanduser()
        self.max_gb = max_gb
        self.dtype = dtype
        self.hits = self.misses = self.corrupt = self.full = 0
        self._store = LmdbStore(
            str(self.path), map_size=int(max_gb * 1e9) // 65536 * 65536
        )  # a multiple of any page size
        self._format: EntryFormat | None = None
        self._salt = b""

    @abstractmethod
    def to_tokens(self, values: T) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, L, D]`` and mask ``[B, L]`` of the values."""

    @abstractmethod
    def from_tokens(self, tokens: Tensor, mask: Tensor) -> T:
        """The inverse of ``to_tokens``."""

    def _open(self, fingerprint: str, length: int, width: int) -> None:
        """Binds the cache to a model; raises ValueError if the folder is not writable or holds other files."""
        try:
            self._store.open()
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error
        self._format = EntryFormat(length, width, self.dtype)
        self._salt = f"{fingerprint} {self.dtype} ".encode()
        if self.available_bytes() < self._store.map_size:
            warnings.warn(
                f"{type(self).__name__}: max_gb={self.max_gb:g}, but the disk of {str(self.path)!r} has room for "
                f"{format_bytes(self.available_bytes())}: lower max_gb, or choose a path on a larger disk",
                stacklevel=3,
            )

    def size(self, samples: int, entry_format: EntryFormat | None = None) -> int:
        """Upper bound of the bytes on disk of ``samples`` entries without a masked token, in this or another format."""
        return samples * (entry_format or self.entry_format).on_disk(self._store.page_size())

    def estimate(self, samples: int) -> str:
        """Space for ``samples`` entries, free space and limit, as a sentence; ValueError if the disk is too small."""
        each, needed, limit, room = self.size(1), self.size(samples), self.max_gb * 1e9, self.available_bytes()
        sentence = (
            f"{samples:,} samples x {format_bytes(each)} = {format_bytes(needed)}; "
            f"free: {format_bytes(room - self._store.used())}, limit {format_bytes(limit)}"
        )
        if min(needed, limit) > room:
            raise ValueError(
                f"{type(self).__name__}: the disk of {str(self.path)!r} is too small: {sentence}; choose a path on a "
                "larger disk, dtype: bfloat16 or float8, or a lower max_gb"
            )
        if needed > limit:
            sentence += f", which holds about {int(limit / each):,}: raise max_gb to {gigabytes(needed):g}"
        return sentence

    def read(self, keys: Sequence[str]) -> tuple[Tensor, T | None]:
        """Which keys have an intact entry, ``[B]``, bool, and the values of those, in the stored dtype; None for none.

        One transaction, whose entries are copied from the map straight into the batch; float8 becomes bfloat16.
        """
        with self._reading() as transaction:
            entries = [self._intact(transaction, key) for key in keys]
            intact = [entry for entry in entries if entry is not None]
            return torch.tensor([entry is not None for entry in entries]), self.unpack(intact) if intact else None

    def fetch(self, key: str) -> bytes | None:
        """The intact entry of ``key``, for ``unpack``; None if there is none."""
        with self._reading() as transaction:
            entry = self._intact(transaction, key)
            return None if entry is None else bytes(entry)

    def _intact(self, transaction: Any, key: str) -> memoryview | None:
        entry_format, entry = self.entry_format, transaction.get(self._stored_key(key))
        intact = entry is not None and entry_format.is_intact(entry)
        self.hits += intact
        self.misses += not intact
        self.corrupt += entry is not None and not intact
        return entry if intact else None

    def holds(self, key: str) -> bool:
        """True if there is an entry of ``key``; does not read it, so that it may be damaged."""
        with self._reading() as transaction:
            return transaction.get(self._stored_key(key)) is not None

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """A transaction for reading; ValueError where the folder is damaged or not open."""
        import lmdb

        assert self.entry_format
        try:
            with self._store.transaction() as transaction:
                yield transaction
        except lmdb.Error as error:
            raise ValueError(
                f"{type(self).__name__}: cannot read {str(self.path)!r} ({error}); delete the folder"
            ) from error

    def unpack(self, entries: Sequence[memoryview | bytes]) -> T:
        """The B values of fetched entries, in the stored dtype (float8: bfloat16)."""
        return self.from_tokens(*self.entry_format.unpack(entries))

    def store(self, keys: Sequence[str], values: T) -> None:
        """Writes the values that have no intact entry yet, in one transaction; warns and stops at the size limit."""
        import lmdb

        if self.full:
            self.full += len(keys)
            return
        entries = dict(zip(map(self._stored_key, keys), self.entry_format.pack(*self.to_tokens(values)), strict=True))
        try:
            with self._store.transaction(write=True) as transaction:
                for key, entry in entries.items():
                    # Another process may have been faster; writing the same entry again would cost disk and time.
                    present = transaction.get(key)
                    if present is None or not self.entry_format.is_intact(present):
                        transaction.put(key, entry)
        except lmdb.Error as error:  # a full disk raises several kinds; training can go on without the cache
            self.full += len(keys)
            full = isinstance(error, lmdb.MapFullError)
            reason = f"reached max_gb={self.max_gb:g}" if full else f"cannot be written any more ({error})"
            remedy = "raise max_gb, or choose dtype: bfloat16" if full else "make room on its disk"
            if isinstance(error, lmdb.ReadonlyError):
                reason, remedy = "may only be read", "its owner can add to it, or choose another path"
            warnings.warn(
                f"{type(self).__name__}: {str(self.path)!r} {reason}: further entries are computed each time; {remedy}",
                stacklevel=2,
            )

    def as_stored(self, values: T) -> T:
        """``values`` as ``unpack`` returns them after ``store``: rounded to ``dtype``, zero where masked; float32."""
        tokens, mask = self.to_tokens(values)
        return self.from_tokens(self.entry_format.rounded(tokens).masked_fill(~mask[..., None], 0.0), mask)

    @property
    def entry_format(self) -> EntryFormat:
        """The byte format of the entries."""
        if self._format is None:
            raise ValueError(f"{type(self).__name__}: {str(self.path)!r} is not open; call open first")
        return self._format

    def _stored_key(self, key: str) -> bytes:
        return hashlib.sha256(self._salt + key.encode()).digest()

    def available_bytes(self) -> int:
        """Bytes that the cache may occupy on its disk, including those it occupies already."""
        return shutil.disk_usage(self.path).free + self._store.used()


def format_bytes(size: float) -> str:
    """``size`` bytes in the largest fitting decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
