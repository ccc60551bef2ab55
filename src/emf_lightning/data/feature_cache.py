"""Text features that are computed once: a read-through store on disk, shared by all processes of all runs."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from emf_lightning.data.entry_format import EntryFormat
from emf_lightning.data.lmdb_store import LmdbStore
from emf_lightning.text.base import TextEncoder, TextFeatures


class FeatureCache:
    """The features of captions that any process has encoded before, by encoder and caption.

    A key is the digest of the encoder's fingerprint, the stored dtype and the caption, so that one folder serves any
    number of encoders, and a changed encoder finds nothing rather than something wrong. The null caption is an entry
    like any other. A damaged entry is counted, encoded again and overwritten. Objects are small and picklable; every
    process counts for itself.

    Args:
        path: folder, on a local disk; made if it does not exist.
        max_gb: size in GB (10^9 bytes) at which the cache stops growing; captions beyond it are encoded each time.
        dtype: of the stored numbers; bfloat16 halves the size and keeps three significant digits.

    Attributes:
        hits: captions found.
        misses: captions not found, the damaged ones included.
        corrupt: captions whose entry was damaged.
        full: captions that were not stored, for want of room.
    """

    def __init__(
        self,
        path: str | Path,
        max_gb: float = 16.0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if max_gb < 0.001:
            raise ValueError(f"FeatureCache: max_gb must be at least 0.001 (1 MB), got {max_gb}")
        self.path = Path(path)
        self.max_gb = max_gb
        self.dtype = dtype
        self.hits = self.misses = self.corrupt = self.full = 0
        self._store = LmdbStore(str(path), map_size=int(max_gb * 1e9) // 65536 * 65536)  # whole pages of any system
        self._format: EntryFormat | None = None
        self._salt = b""

    def open(self, encoder: TextEncoder) -> None:
        """Binds the cache to ``encoder``; warns if the disk is smaller than ``max_gb``.

        Raises:
            ValueError: if the folder cannot be written to or holds something else.
        """
        try:
            self._store.open()
        except ValueError as error:
            raise ValueError(f"FeatureCache: {error}") from error
        self._format = EntryFormat(encoder.length, encoder.width, self.dtype)
        self._salt = f"{encoder.fingerprint} {self.dtype} ".encode()
        if self._room() < self._store.map_size:
            warnings.warn(
                f"FeatureCache: max_gb={self.max_gb:g}, but the disk of {str(self.path)!r} has room for "
                f"{_readable(self._room())}: lower max_gb, or choose a path on a larger disk",
                stacklevel=2,
            )

    def estimate(self, captions: int) -> str:
        """One sentence on what ``captions`` captions take at most, masked tokens included, and what there is.

        Raises:
            ValueError: if they do not fit the disk.
        """
        page, entry = self._store.page_size(), self._entries.largest + 50  # with its key and LMDB's own
        # LMDB gives an entry beyond half a page whole pages; smaller ones share pages, 7 of 10 places taken.
        each = -(-(entry - 34) // page) * page + 80 if entry > page // 2 else page * 10 // (7 * (page // entry))
        needed, limit, room = captions * each, self.max_gb * 1e9, self._room()
        sentence = (
            f"{captions:,} captions x {_readable(each)} = {_readable(needed)}; "
            f"free: {_readable(room - self._store.used())}, limit {_readable(limit)}"
        )
        if min(needed, limit) > room:
            raise ValueError(
                f"FeatureCache: the disk of {str(self.path)!r} is too small: {sentence}; choose a path on a larger "
                "disk, dtype: bfloat16, or a lower max_gb"
            )
        if needed > limit:
            sentence += f", which holds about {int(limit / each):,}: raise max_gb to {needed / 1e9:.3g}"
        return sentence

    def lookup(self, captions: Sequence[str]) -> list[TextFeatures | None]:
        """A row for each caption, in order, None where there is no intact entry; rows share the batch's memory."""
        features, found = self._read(captions)
        return [features[row : row + 1] if hit else None for row, hit in enumerate(found)]

    def store(self, captions: Sequence[str], features: TextFeatures) -> None:
        """Writes rows that are not there intact already, in one transaction; at the size limit, warns and stops."""
        import lmdb

        if self.full:
            self.full += len(captions)
            return
        entries = dict(zip(map(self._key, captions), self._entries.pack(features.context, features.mask), strict=True))
        try:
            with self._store.transaction(write=True) as transaction:
                for key, entry in entries.items():
                    # Another process may have been faster; writing the same again would cost disk and time.
                    present = transaction.get(key)
                    if present is None or not self._entries.is_intact(present):
                        transaction.put(key, entry)
        except lmdb.Error as error:  # whatever it is (a full disk has several names), training can do without
            self.full += len(captions)
            full = isinstance(error, lmdb.MapFullError)
            reason = f"reached max_gb={self.max_gb:g}" if full else f"cannot be written any more ({error})"
            remedy = "raise max_gb, or choose dtype: bfloat16" if full else "look for room on its disk"
            warnings.warn(
                f"FeatureCache: {str(self.path)!r} {reason}: further captions are encoded each time they come; "
                f"{remedy}",
                stacklevel=2,
            )

    def features(self, captions: Sequence[str], encode: Callable[[Sequence[str]], TextFeatures]) -> TextFeatures:
        """The features of ``captions``, float32 on the CPU; ``encode`` gets those not found, each once, in one call.

        What was just encoded comes back as it will from the store: rounded to ``dtype``, zero where masked.
        """
        features, found = self._read(captions)
        missing = list(dict.fromkeys(caption for caption, hit in zip(captions, found, strict=True) if not hit))
        if missing:
            fresh = encode(missing).to("cpu")
            self.store(missing, fresh)
            rows = [row for row, hit in enumerate(found) if not hit]
            sources = [missing.index(captions[row]) for row in rows]
            context = self._entries.rounded(fresh.context).masked_fill_(~fresh.mask[..., None], 0.0)
            features.context[rows], features.mask[rows] = context[sources], fresh.mask[sources]
        return features

    def _read(self, captions: Sequence[str]) -> tuple[TextFeatures, list[bool]]:
        """Features ``[B, L, D]`` and which of them were found; the others hold anything."""
        import lmdb

        length, width = self._entries.length, self._entries.width
        features = TextFeatures(
            torch.empty(len(captions), length, width), torch.empty(len(captions), length, dtype=torch.bool)
        )
        context, mask = features.context.numpy(), features.mask.numpy()
        found = []
        keys = [self._key(caption) for caption in captions]
        try:
            with self._store.transaction() as transaction:
                for row, key in enumerate(keys):
                    entry = transaction.get(key)
                    found.append(entry is not None and self._entries.unpack(entry, context[row], mask[row]))
                    self.corrupt += entry is not None and not found[-1]
        except lmdb.Error as error:
            raise ValueError(f"FeatureCache: cannot read {str(self.path)!r} ({error}); delete the folder") from error
        self.hits += sum(found)
        self.misses += len(found) - sum(found)
        return features, found

    @property
    def _entries(self) -> EntryFormat:
        if self._format is None:
            raise ValueError(f"FeatureCache: {str(self.path)!r} is not open; call open(encoder) first")
        return self._format

    def _key(self, caption: str) -> bytes:
        return hashlib.sha256(self._salt + caption.encode()).digest()

    def _room(self) -> int:
        """Bytes that the cache may occupy on its disk, those that it does included."""
        return shutil.disk_usage(self.path).free + self._store.used()


def _readable(size: float) -> str:
    """``size`` bytes in the largest fitting decimal unit."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
