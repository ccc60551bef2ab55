"""Arrays that a file of captions becomes: made once, kept on the disk, and mapped into memory at each later start."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

FORMAT = 1
"""Raised when texts are read in another way or the arrays change: what was kept before is not used then."""
SMALLEST = 1_000_000
"""Bytes of the files from which their arrays are kept; fewer are read in tens of milliseconds."""
ENDS = 1 << 16
"""Bytes at either end of a file that are part of its identity."""
UNUSED_DAYS = 30
"""Days after the last start with them at which kept arrays are removed."""


class Texts(Sequence[str]):
    """Texts in two arrays: their bytes in UTF-8, one behind the other, and the end of each."""

    def __init__(self, data: NDArray[Any], ends: NDArray[Any]) -> None:
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._data[start : int(self._ends[index])].tobytes().decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class TextRows:
    """Texts that are added one by one, and become the arrays of ``Texts``."""

    def __init__(self) -> None:
        self._data, self._ends = bytearray(), bytearray()

    def add(self, text: str) -> None:
        """Adds a text; halves of surrogate pairs, which names in JSON may have, are kept."""
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends += len(self._data).to_bytes(8, "little")

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Bytes and ends."""
        return np.frombuffer(self._data, np.uint8), np.frombuffer(self._ends, "<i8")


def digest(text: str) -> int:
    """Signed 64-bit digest."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


def kept_arrays(files: Sequence[str | Path], how: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays that ``build`` makes of the files.

    Those of large files are kept in the user's cache folder (``$XDG_CACHE_HOME/emf_lightning/captions``, by
    default below ``~/.cache``) and mapped from there as long as path, size, time and both ends of each file are the
    same, so that a start neither reads the files nor holds them in memory. Where the folder cannot be written, the
    arrays are made at each start. A run keeps the captions of its start, whatever becomes of the files.

    Processes that start at once each build the arrays; the first that is done keeps them. Kept arrays are never
    replaced, since a process of another machine may have mapped them.

    Args:
        files: the files.
        how: distinguishes what different functions, or other options, make of the same files.
        build: makes the arrays; its warnings are repeated at each start.
    """
    identity, place = _identity(files, how), _cache_folder()
    folder = None if identity is None or place is None else place / identity
    arrays = None if folder is None else _mapped(folder)
    if arrays is None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arrays = build()
        said = json.dumps([str(warning.message) for warning in caught])
        arrays["warnings"] = np.frombuffer(said.encode(), np.uint8)
        if folder is not None and _identity(files, how) == identity:  # not changed meanwhile
            arrays = _kept(arrays, folder)
    for message in json.loads(arrays["warnings"].tobytes()):
        warnings.warn(message, stacklevel=3)
    return arrays


def _cache_folder() -> Path | None:
    """Where arrays are kept; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "emf_lightning/captions") if os.path.isabs(cache) else None


def _identity(files: Iterable[str | Path], how: str) -> str | None:
    """Name for the arrays of these files; None for small ones, and for what is no file."""
    found, total = blake2b(f"{FORMAT} {how}".encode(), digest_size=16), 0
    try:
        for file in files:
            path = Path(file).expanduser()
            if not path.is_file():  # reading the ends of a pipe would take them
                return None
            with path.open("rb") as opened:
                about = os.fstat(opened.fileno())
                ends = opened.read(ENDS)
                opened.seek(max(about.st_size - ENDS, 0))
                ends += opened.read(ENDS)
            found.update(repr((os.path.abspath(path), about.st_size, about.st_mtime_ns, len(ends))).encode() + ends)
            total += about.st_size
    except OSError:  # told by ``build``
        return None
    return found.hexdigest() if total >= SMALLEST else None


def _mapped(folder: Path) -> Arrays | None:
    """The arrays in ``folder``; None, and no folder, if it is missing or damaged."""
    if not folder.is_dir():  # one that is there is whole, unless it is damaged
        return None
    try:
        names = json.loads((folder / "arrays.json").read_text())
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
    except (OSError, ValueError, EOFError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    with suppress(OSError):
        os.utime(folder)  # so that it is not taken for unused
    return arrays


def _kept(arrays: Arrays, folder: Path) -> Arrays:
    """The arrays, from now on mapped from ``folder``; as they are where it cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unused(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as made:
            for name, array in arrays.items():
                with Path(made, f"{name}.npy").open("wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
            Path(made, "arrays.json").write_text(json.dumps(list(arrays)))
            with suppress(OSError):  # another process was faster
                os.rename(made, folder)
    except OSError:
        return arrays
    return _mapped(folder) or arrays


def _remove_unused(parent: Path) -> None:
    for folder in parent.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - folder.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)
