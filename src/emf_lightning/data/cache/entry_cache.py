"""What is computed once for a sample and read ever after: a store on disk, shared by all processes of all runs."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from emf_lightning.data.cache.entry_format import EntryFormat, StoredDtype
from emf_lightning.data.cache.lmdb_store import LmdbStore


class EntryCache:
    """Base of the caches: features ``[L, D]`` by a frozen model and a name.

    A key is the digest of the model's fingerprint, the stored dtype and the name, so that one folder serves any number
    of models, and a changed model finds nothing rather than something wrong. A damaged entry is counted, computed again
    and overwritten. Objects are small and picklable; every process counts for itself.

    Args:
        path: folder, on a local disk; made if it does not exist. Several caches may share one. Each node has
            its own, and in the end holds whatever its ranks have seen.
        max_gb: size in GB (10^9 bytes) at which the folder stops growing; what comes beyond it is computed each time.
        dtype: of the stored numbers; bfloat16 halves the size and keeps three significant digits, float8 (e4m3, a
            power of two for each token) quarters it and keeps one and a half.

    Attributes:
        hits: names found.
        misses: names not found, the damaged ones included.
        corrupt: names whose entry was damaged.
        full: names that were not stored, for want of room.
    """

    def __init__(self, path: str | Path, max_gb: float = 16.0, dtype: StoredDtype = "float32") -> None:
        if max_gb < 0.001:
            raise ValueError(f"{type(self).__name__}: max_gb must be at least 0.001 (1 MB), got {max_gb}")
        self.path = Path(path)
        self.max_gb = max_gb
        self.dtype = dtype
        self.hits = self.misses = self.corrupt = self.full = 0
        self._store = LmdbStore(str(path), map_size=int(max_gb * 1e9) // 65536 * 65536)  # whole pages of any system
        self._format: EntryFormat | None = None
        self._salt = b""

    def _open(self, fingerprint: str, length: int, width: int) -> None:
        """Binds the cache to a model; warns if the disk is smaller than ``max_gb``.

        Raises:
            ValueError: if the folder cannot be written to or holds something else.
        """
        try:
            self._store.open()
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error
        self._format = EntryFormat(length, width, self.dtype)
        self._salt = f"{fingerprint} {self.dtype} ".encode()
        if self.room() < self._store.map_size:
            warnings.warn(
                f"{type(self).__name__}: max_gb={self.max_gb:g}, but the disk of {str(self.path)!r} has room for "
                f"{readable(self.room())}: lower max_gb, or choose a path on a larger disk",
                stacklevel=3,
            )

    def size(self, samples: int, entries: EntryFormat | None = None) -> int:
        """Bytes that ``samples`` entries take on disk at most, masked tokens included, in this or another format."""
        largest = (entries or self.entries).largest
        page, entry = self._store.page_size(), largest + 50  # with its key and LMDB's own
        # LMDB gives an entry beyond half a page whole pages; smaller ones share pages, 7 of 10 places taken.
        each = -(-(entry - 34) // page) * page + 80 if entry > page // 2 else page * 10 // (7 * (page // entry))
        return samples * each

    def estimate(self, samples: int) -> str:
        """One sentence on what ``samples`` entries take at most, and what there is.

        Raises:
            ValueError: if they do not fit the disk.
        """
        each, needed, limit, room = self.size(1), self.size(samples), self.max_gb * 1e9, self.room()
        sentence = (
            f"{samples:,} samples x {readable(each)} = {readable(needed)}; "
            f"free: {readable(room - self._store.used())}, limit {readable(limit)}"
        )
        if min(needed, limit) > room:
            raise ValueError(
                f"{type(self).__name__}: the disk of {str(self.path)!r} is too small: {sentence}; choose a path on a "
                "larger disk, dtype: bfloat16 or float8, or a lower max_gb"
            )
        if needed > limit:
            sentence += f", which holds about {int(limit / each):,}: raise max_gb to {needed / 1e9:.3g}"
        return sentence

    def fetch(self, name: str) -> bytes | None:
        """The intact entry of ``name``, to be unpacked with others; None where there is none."""
        import lmdb

        entries, key = self.entries, self._key(name)
        try:
            with self._store.transaction() as transaction:
                entry = transaction.get(key)
                found = bytes(entry) if entry is not None and entries.is_intact(entry) else None
        except lmdb.Error as error:
            raise ValueError(
                f"{type(self).__name__}: cannot read {str(self.path)!r} ({error}); delete the folder"
            ) from error
        self.hits += found is not None
        self.misses += found is None
        self.corrupt += found is None and entry is not None
        return found

    def holds(self, name: str) -> bool:
        """Whether there is an entry of ``name``, intact or not, without reading it."""
        assert self._format is not None
        with self._store.transaction() as transaction:
            return transaction.get(self._key(name)) is not None

    def _keep(self, names: Sequence[str], context: Tensor, mask: Tensor) -> None:
        """Writes rows that are not there intact already, in one transaction; at the size limit, warns and stops."""
        import lmdb

        if self.full:
            self.full += len(names)
            return
        entries = dict(zip(map(self._key, names), self.entries.pack(context, mask), strict=True))
        try:
            with self._store.transaction(write=True) as transaction:
                for key, entry in entries.items():
                    # Another process may have been faster; writing the same again would cost disk and time.
                    present = transaction.get(key)
                    if present is None or not self.entries.is_intact(present):
                        transaction.put(key, entry)
        except lmdb.Error as error:  # whatever it is (a full disk has several names), training can do without
            self.full += len(names)
            full = isinstance(error, lmdb.MapFullError)
            reason = f"reached max_gb={self.max_gb:g}" if full else f"cannot be written any more ({error})"
            remedy = "raise max_gb, or choose dtype: bfloat16" if full else "look for room on its disk"
            warnings.warn(
                f"{type(self).__name__}: {str(self.path)!r} {reason}: what is new is computed each time it comes; "
                f"{remedy}",
                stacklevel=2,
            )

    @property
    def entries(self) -> EntryFormat:
        """How entries are written."""
        if self._format is None:
            raise ValueError(f"{type(self).__name__}: {str(self.path)!r} is not open; call open first")
        return self._format

    def _key(self, name: str) -> bytes:
        return hashlib.sha256(self._salt + name.encode()).digest()

    def room(self) -> int:
        """Bytes that the cache may occupy on its disk, those that it does included."""
        return shutil.disk_usage(self.path).free + self._store.used()


def readable(size: float) -> str:
    """``size`` bytes in the largest fitting decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
