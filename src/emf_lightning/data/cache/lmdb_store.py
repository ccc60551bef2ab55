"""LMDB folder for concurrent reads and writes by several processes and threads."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lmdb

# A process may open an LMDB folder only once, and an open folder must not cross a fork (py-lmdb refuses to reopen it in
# the child). Hence one registry a process, emptied before any fork, and one transaction at a time. Its keys are device
# and inode of the data file: whichever path leads there, and whether another folder has taken its place.
_ENVIRONMENTS: dict[tuple[int, int], lmdb.Environment] = {}
_LOCK = threading.Lock()

MIN_FREE_BYTES = 1_000_000
"""Free bytes needed for a new folder: LMDB maps pages before it has them, and crashes on a full disk."""


@dataclass(frozen=True)
class LmdbStore:
    """A folder of key-value pairs of at most ``map_size`` bytes, opened at the first use in each process.

    It survives ``kill -9`` at any moment, because LMDB writes pages before the page that points to them. Commits are
    flushed to disk (``sync``), but not the record of the commit (no ``metasync``): after a power failure the last
    commit may be missing, which a cache can afford, and the rest is intact. LMDB does not work on network file systems.
    """

    path: str
    map_size: int

    def open(self) -> None:
        """Creates the folder if it is missing; ValueError if it cannot be made or read, or holds no intact LMDB file.

        A folder that may only be read is opened for that: writing to it raises ``lmdb.ReadonlyError``.
        """
        with _LOCK:
            environment = self._environment()
            if environment.info()["map_size"] < self.map_size:  # opened by a store with a smaller limit
                environment.set_mapsize(self.map_size)

    @contextmanager
    def transaction(self, write: bool = False) -> Iterator[lmdb.Transaction[memoryview]]:
        """A transaction that commits on exit; values are buffers, valid only inside it."""
        import lmdb

        with _LOCK:
            environment = self._environment()
            try:
                transaction = environment.begin(write=write, buffers=True)
            except lmdb.MapResizedError:  # another process with a larger limit has grown the file
                environment.set_mapsize(0)
                transaction = environment.begin(write=write, buffers=True)
            with transaction:
                yield transaction

    def page_size(self) -> int:
        """Bytes of a page; large values take whole pages."""
        with _LOCK:
            return self._environment().stat()["psize"]

    def used(self) -> int:
        """Bytes used on disk."""
        return os.stat(_data_file(self.path)).st_size

    def _environment(self) -> lmdb.Environment:
        environment = _ENVIRONMENTS.get(_place(self.path) or (0, 0))
        if environment is None:
            _set_fork_hooks()
            for place, other in list(_ENVIRONMENTS.items()):
                if _place(other.path()) != place:  # deleted since
                    _ENVIRONMENTS.pop(place).close()
            path = os.path.realpath(self.path)
            environment = _open(path, self.map_size)
            stat = os.stat(_data_file(path))
            _ENVIRONMENTS[stat.st_dev, stat.st_ino] = environment
        return environment


def _data_file(folder: str) -> str:
    return os.path.join(folder, "data.mdb")


def _place(folder: str) -> tuple[int, int] | None:
    """Device and inode of the folder's data file: faster than the path's resolution. None if missing."""
    try:
        stat = os.stat(_data_file(folder))
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _open(path: str, map_size: int) -> lmdb.Environment:
    import lmdb

    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < MIN_FREE_BYTES and not Path(path, "lock.mdb").exists():
            raise ValueError(f"no room on the disk of {path!r} ({free:,} bytes); choose another path, or make room")
        # more than LMDB's default of 126: each loader worker of each rank of each run is a reader
        try:
            environment = lmdb.open(path, map_size=map_size, metasync=False, max_readers=1024)
        except lmdb.Error as error:
            if not _is_forbidden(error) or not Path(path, "data.mdb").is_file():
                raise
            environment = lmdb.open(path, map_size=map_size, readonly=True, lock=False)  # somebody else's, shared
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
        raise ValueError(f"{path!r} holds no LMDB file ({error}); delete it or choose another path") from error
    except (OSError, lmdb.Error) as error:
        raise ValueError(f"cannot write to the folder {path!r} ({error}); choose another path") from error
    environment.reader_check()  # frees the slots of killed readers
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    present = os.stat(_data_file(path)).st_size
    if present < needed:  # reading beyond the end of a mapped file kills the process
        environment.close()
        raise ValueError(f"{path!r} was cut short ({present:,} of {needed:,} bytes), by a copy perhaps; delete it")
    return environment


def _is_forbidden(error: Exception) -> bool:
    """True for a folder or a disk that may only be read; LMDB has one class for most errors of the system."""
    return any(os.strerror(number) in str(error) for number in (errno.EACCES, errno.EPERM, errno.EROFS))


@cache  # once a process
def _set_fork_hooks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


def _before_fork() -> None:
    _LOCK.acquire()  # no transaction of another thread is open, and none begins
    for environment in _ENVIRONMENTS.values():
        environment.close()
    _ENVIRONMENTS.clear()
