"""WebDataset samples out of tar shards, one by one, from any byte offset that an earlier reading stood at."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

BLOCK = tarfile.BLOCKSIZE
IMAGES = ("jpg", "jpeg", "png", "webp")
COUNTED = 64
"""Samples from which the size of the others is guessed."""


@dataclass(frozen=True)
class TarSample:
    """The members of one key, undecoded.

    Attributes:
        where: ``shard/key``, for messages.
        number: running number in the shard.
        end: byte offset in the shard behind the sample, from which reading can go on.
        image, text, json: the members' bytes, None where there is none.
        fault: the reason why nothing more could be read here; then the members are None.
    """

    where: str
    number: int
    end: int
    image: bytes | None = None
    text: bytes | None = None
    json: bytes | None = None
    fault: str | None = None


class _FaultError(Exception):
    """Nothing more can be read: the reason, and an offset at which reading would find the same fault again."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


def open_shard(path: str) -> BinaryIO:
    """The shard as a seekable binary file; addresses with a scheme (``hf://``, ``https://``, ``s3://``) by fsspec.

    A compressed one is undone on the way. Images do not shrink by it, so that it costs little, but to begin in the
    middle means to undo all that is before.
    """
    if "://" not in path:
        if path.endswith("gz"):
            return cast(BinaryIO, gzip.open(path, "rb"))
        return open(path, "rb", buffering=1 << 18)
    import fsspec

    compression = "gzip" if path.endswith("gz") else None
    return cast(BinaryIO, fsspec.open(path, "rb", compression=compression).open())


def _read(file: BinaryIO, size: int) -> bytes:
    with _faults(file):
        data = file.read(size)
    if len(data) < size:
        raise _FaultError("truncated shard", file.tell())
    return data


@contextmanager
def _faults(file: BinaryIO) -> Iterator[None]:
    """What a compressed file says where it is cut or damaged, as faults."""
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
    """(offset of the first header, name, size) of each regular file; leaves ``file`` at its data.

    tarfile's own iterator cannot tell the end of an archive from a file that was cut between two members, and keeps
    every member it has seen; so only its header parser is used.
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
                return  # the archive's proper end: a block of zeros
            raise _FaultError("damaged shard", start) from error
        if info.isreg():
            yield start, long_name or info.name, info.size
        if not (info.islnk() or info.issym() or info.isdir() or info.isdev()):  # these have no data, whatever they say
            offset += -(-info.size // BLOCK) * BLOCK
        if info.type not in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            start, long_name = offset, None


def read_samples(path: str, offset: int = 0, number: int = 0, part: int = 0, parts: int = 1) -> Iterator[TarSample]:
    """The samples of one shard whose running number, modulo ``parts``, is ``part``.

    A sample is a run of members of one key (the name up to the first dot of its last component). A shard that is
    cut off, damaged or cannot be opened ends with a sample that is a ``fault`` (and has a running number itself).

    Args:
        path: file or address.
        offset: where to begin: 0 or the ``end`` of an earlier sample.
        number: running number of the sample at ``offset``.
        part: which of the ``parts`` to yield; the other samples' bytes are not read.
        parts: into how many the shard's samples are dealt.
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
        # what came before a cut is a sample if it is whole, else it is part of what the fault stands for
        if number % parts == part and (fault is None or ("image" in found and len(found) > 1)):
            yield TarSample(f"{path}/{key}", number, start, **found)  # type: ignore[arg-type]
        number += 1
    if fault is not None and number % parts == part:
        yield TarSample(path, number, start, fault=fault)


def count_samples(path: str) -> int:
    """How many samples a shard has: a plain local one by its headers, others by their size and their first samples."""
    keys: list[str] = []
    start = 0
    try:
        with open_shard(path) as file:
            for start, name, _ in _members(file, 0):
                key = _key(name)[0]
                if not keys or key != keys[-1]:
                    keys.append(key)
                if len(keys) > COUNTED and ("://" in path or path.endswith("gz")):
                    return round(_size(path) / start * COUNTED)  # images do not shrink by compression
    except (_FaultError, OSError):
        pass  # said when it is read
    return len(keys)


def _size(path: str) -> int:
    """Bytes of the file, compressed or not."""
    if "://" not in path:
        return os.stat(path).st_size
    import fsspec

    system, inside = fsspec.core.url_to_fs(path)
    return int(system.size(inside) or 0)


def _key(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, and its extension in small letters."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()
