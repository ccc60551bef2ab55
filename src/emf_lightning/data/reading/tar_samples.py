"""Reads WebDataset samples from tar shards, one by one, from any byte offset at which a sample ended."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from emf_lightning.data.reading.pixels import EXTENSIONS

BLOCK = tarfile.BLOCKSIZE
IMAGES = EXTENSIONS
COUNTED = 64
"""Number of samples from which ``count_samples`` extrapolates."""


@dataclass(frozen=True)
class TarSample:
    """The members of one key, undecoded.

    Attributes:
        location: ``shard/key``, for messages and ``CaptionFiles``.
        number: running number in the shard.
        end: byte offset in the shard after the sample; reading can resume there.
        image, text, json: the members' bytes; None for a missing member.
        fault: reason why the shard could not be read further; the members are then None.
    """

    location: str
    number: int
    end: int
    image: bytes | None = None
    text: bytes | None = None
    json: bytes | None = None
    fault: str | None = None


class _FaultError(Exception):
    """The shard cannot be read further: the reason, and an offset from which reading meets the same fault."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


def open_shard(path: str) -> BinaryIO:
    """The shard as a seekable binary file; URLs (``hf://``, ``https://``, ``s3://``) are opened by fsspec.

    Gzip is decompressed while reading. That is cheap, as images hardly compress, but a start in the middle decompresses
    everything before.
    """
    if "://" not in path:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith("gz") else open(path, "rb", buffering=1 << 18)
    import fsspec

    return fsspec.open(path, "rb", compression="gzip" if path.endswith("gz") else None).open()


def _read(file: BinaryIO, size: int) -> bytes:
    with _faults(file):
        data = file.read(size)
    if len(data) < size:
        raise _FaultError("truncated shard", file.tell())
    return data


@contextmanager
def _faults(file: BinaryIO) -> Iterator[None]:
    """Turns the errors of truncated or damaged compressed files into faults."""
    try:
        yield
    except EOFError as error:
        raise _FaultError("truncated shard", file.tell()) from error
    except zlib.error as error:
        raise _FaultError("damaged shard", file.tell()) from error


def _pax_path(records: bytes) -> str | None:
    """The ``path`` of a PAX header's "length key=value" lines."""
    while records:
        length = int(records.split(b" ", 1)[0])
        if length < 1:
            raise ValueError("a PAX record without a length")
        key, _, value = records[:length].partition(b" ")[2].partition(b"=")
        if key == b"path":
            return value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        records = records[length:]
    return None


def _members(file: BinaryIO, offset: int) -> Iterator[tuple[int, str, int]]:
    """(offset of the first header, name, size) of each regular file; positions ``file`` at its data.

    Only the header parser of tarfile is used: its iterator cannot tell the end of an archive from a file that was
    truncated between two members, and keeps every member in memory.
    """
    start, long_name = offset, None
    while True:
        with _faults(file):
            file.seek(offset)
        header = _read(file, BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            offset += BLOCK
            if info.type == tarfile.XHDTYPE:
                long_name = _pax_path(_read(file, info.size))
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _read(file, info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            if not any(header):
                return  # a block of zeros ends an archive
            raise _FaultError("damaged shard", start) from error
        if info.isreg():
            yield start, long_name or info.name, info.size
        # links, folders and devices have no data, whatever size they state
        if not (info.islnk() or info.issym() or info.isdir() or info.isdev()):
            offset += -(-info.size // BLOCK) * BLOCK
        if info.type not in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            start, long_name = offset, None


def read_samples(path: str, offset: int = 0, number: int = 0, part: int = 0, parts: int = 1) -> Iterator[TarSample]:
    """The samples of one shard with ``number % parts == part``.

    A sample is a run of members with one key (the name up to the first dot of its last component). A shard that is
    truncated, damaged or cannot be opened ends with a sample that has a ``fault`` (and a running number of its own).

    Args:
        path: file or URL.
        offset: start: 0 or the ``end`` of an earlier sample.
        number: running number of the sample at ``offset``.
        part: index of the part to yield; the bytes of other samples are not read.
        parts: number of parts that the shard's samples are dealt to.
    """
    key: str | None = None
    found: dict[str, bytes] = {}
    start = offset
    fault = None
    try:
        with open_shard(path) as file:
            for start, name, size in _members(file, offset):
                name, extension = _key(name)
                if name != key:
                    if key is not None:
                        if number % parts == part:
                            yield TarSample(f"{path}/{key}", number, start, **found)  # type: ignore[arg-type]
                        number += 1
                    key, found = name, {}
                kind = "image" if extension in IMAGES else {"txt": "text", "json": "json"}.get(extension)
                if kind is not None and kind not in found and number % parts == part:
                    found[kind] = _read(file, size)
            start = file.tell() - BLOCK
    except _FaultError as error:
        fault, start = str(error), error.offset
    except OSError as error:
        fault = f"unreadable shard ({type(error).__name__})"
    if key is not None:
        # the last members before a fault are a sample if they are complete, else they are lost with the fault
        if number % parts == part and (fault is None or ("image" in found and len(found) > 1)):
            yield TarSample(f"{path}/{key}", number, start, **found)  # type: ignore[arg-type]
        number += 1
    if fault is not None and number % parts == part:
        yield TarSample(path, number, start, fault=fault)


def count_samples(path: str) -> int:
    """Number of samples in a shard: exact for a plain local file, extrapolated by size for URLs and gzip."""
    keys: list[str] = []
    start = 0
    try:
        with open_shard(path) as file:
            for start, name, _ in _members(file, 0):
                key = _key(name)[0]
                if not keys or key != keys[-1]:
                    keys.append(key)
                if len(keys) > COUNTED and ("://" in path or path.endswith("gz")):
                    return round(_size(path) / start * COUNTED)  # images hardly compress
    except (_FaultError, OSError):
        pass  # reported when the shard is read
    return len(keys)


def _size(path: str) -> int:
    """Bytes of the file, compressed or not."""
    import fsspec

    system, inside = fsspec.core.url_to_fs(path)
    return int(system.size(inside) or 0)


def _key(name: str) -> tuple[str, str]:
    """The key of the sample that a member belongs to, and its extension in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()
