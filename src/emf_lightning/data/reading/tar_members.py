"""Members of a tar shard in order; damaged stretches are reported, and reading goes on behind them."""

from __future__ import annotations

import gzip
import re
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple, cast

from emf_lightning.data.reading.urls import is_url, open_url

BLOCK = tarfile.BLOCKSIZE
END = -1
"""Offset behind the last readable byte of a shard."""
CHUNK, PIECE = 1 << 20, 1 << 16
TRAILER = tarfile.RECORDSIZE + 2 * BLOCK
"""Zeros with which an archive ends, at most; more are a file that was allocated and never filled."""
LONGEST_NAME = 1 << 20
LARGEST = 1 << 60
"""Sizes in bytes above which an extended header, or any header, is damaged."""

EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_CHECKSUM = re.compile(rb" *[0-7]{1,8}[ \0]*")


class Member(NamedTuple):
    """A member of a shard, or a stretch of it that cannot be read.

    Attributes:
        start: offset of the first of its headers.
        end: offset behind it, from which reading goes on; ``END`` if nothing behind it can be read.
        name: of a member, in UTF-8, with escapes for other bytes.
        data: offset of the content.
        size: bytes of the content.
        odd: reason why the content is not that of a file; None for a file.
        fault: reason why the stretch cannot be read; None for a member.
    """

    start: int
    end: int
    name: str = ""
    data: int = 0
    size: int = 0
    odd: str | None = None
    fault: str | None = None


class ShardFile(AbstractContextManager["ShardFile"]):
    """The bytes of a shard, decompressed.

    Attributes:
        size: number of bytes; None for gzip as long as its end has not been met.
    """

    def __init__(self, path: str) -> None:
        self._file = open_shard(path, ahead=True)
        self.size = None if path.endswith("gz") else self._file.seek(0, 2)
        self._compressed = self.size is None
        self._window, self._first = bytearray(), 0

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``; fewer at the end of the shard."""
        if self._compressed:
            return self._read_compressed(offset, size)
        self._file.seek(offset)
        return self._file.read(size)

    def _read_compressed(self, offset: int, size: int) -> bytes:
        """The same through a window that always grows by the same pieces, so that damage is met at the same place."""
        window = self._window
        if offset < self._first:
            self._file.seek(0)
            self._first = 0
            window.clear()
        while self._first + len(window) < offset + size:
            passed = min(offset - self._first, len(window))
            self._first += passed
            del window[:passed]
            piece = self._file.read1(PIECE)  # type: ignore[attr-defined]  # loses nothing before an error
            if not piece:
                self.size = self._first + len(window)
                break
            window += piece
        return bytes(window[offset - self._first : offset - self._first + size])


def open_shard(path: str, ahead: bool = False) -> BinaryIO:
    """The shard as a seekable binary file; URLs (``hf://``, ``https://``, ``s3://``) by ``open_url``, also ``ahead``.

    Gzip is decompressed while reading. That is cheap, as images hardly compress, but a start in the middle decompresses
    everything before.
    """
    if not is_url(path):
        return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith("gz") else open(path, "rb", buffering=1 << 18)
    return open_url(path, compression="gzip" if path.endswith("gz") else None, ahead=ahead)


def members(file: ShardFile, offset: int) -> Iterator[Member]:
    """The members from ``offset`` on, and in their places the stretches that cannot be read.

    Only the header parser of tarfile is used: its iterator takes a block of zeros or a damaged header for the end,
    cannot tell the end of an archive from a file that was cut between two members, and keeps every member in memory.
    """
    last, compressed = Member(offset, offset), file.size is None
    while offset != END:
        found = _member(file, offset)
        if (
            compressed and file.size is not None and last.data + last.size > file.size
        ):  # known only now that the end was met
            found = _gap(file, last.start, last.data, "truncated shard")
        if found is None:
            return
        yield found
        last, offset = found, found.end


def _member(file: ShardFile, start: int) -> Member | None:
    """The member at ``start``, or the stretch up to the next one; None at the end of the archive."""
    offset, records = start, {}
    while True:
        block = file.read(offset, BLOCK)
        info = _header(block)
        if info is None:
            return _gap(file, start, offset, "damaged shard" if len(block) == BLOCK else "truncated shard")
        data = offset + BLOCK
        if info.type not in EXTENDED:
            break
        content = file.read(data, info.size) if info.size <= LONGEST_NAME else b""
        if len(content) < info.size:
            return _gap(file, start, data, "truncated shard" if info.size <= LONGEST_NAME else "damaged shard")
        try:
            if info.type == tarfile.GNUTYPE_LONGNAME:
                records["path"] = content.partition(b"\0")[0].decode("utf-8", "backslashreplace")
            elif info.type != tarfile.GNUTYPE_LONGLINK:
                records |= _pax(content)
        except ValueError:
            return _gap(file, start, data, "damaged shard")
        offset = data + _padded(info.size)
    size, name, odd = info.size, info.name, None
    if records or info.type != tarfile.REGTYPE:  # unlike nearly all
        while info.type == tarfile.GNUTYPE_SPARSE and block[482 if data == offset + BLOCK else 504]:
            block, data = file.read(data, BLOCK).ljust(BLOCK, b"\0"), data + BLOCK  # more of the map
        size = 0 if info.type in WITHOUT_DATA else int(records.get("size", size))
        name = records.get("GNU.sparse.name") or records.get("path") or name
        if info.islnk() or info.issym():
            odd = "a link"
        elif not info.isreg():
            odd = "no file"
        elif info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
            odd = "a sparse file"
    if size > (LARGEST if file.size is None else file.size - data):
        return _gap(file, start, offset + BLOCK, "truncated shard")
    return Member(start, data + _padded(size), name, data, size, odd)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header in ``block``; None if it is none: zeros, a wrong checksum, a size that is negative."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")  # type: ignore[arg-type]
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return info if info.size >= 0 else None


def _pax(content: bytes) -> dict[str, str]:
    """The "length key=value" lines of a PAX header; ValueError for anything else."""
    records = {}
    while content.strip(b"\0"):
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(content):
            raise ValueError("a PAX record without its length")
        key, equals, value = content[len(length) + 1 : int(length)].partition(b"=")
        if not equals:
            raise ValueError("a PAX record without a value")
        records[key.decode("utf-8", "backslashreplace")] = value.removesuffix(b"\n").decode("utf-8", "backslashreplace")
        content = content[int(length) :]
    if not records.get("size", "0").isdecimal():
        raise ValueError("a PAX size that is no number")
    int(records.get("size", "0"))
    return records


def _gap(file: ShardFile, start: int, offset: int, reason: str) -> Member | None:
    """The stretch from ``start`` to the first header from ``offset`` on; None for the zeros that end an archive."""
    size = CHUNK if file.size is not None else BLOCK  # a compressed file must not be read backwards
    zeros, position = start == offset, offset
    while chunk := file.read(position, size):
        if chunk.count(0) < len(chunk):
            for at in range(0, len(chunk), BLOCK):
                block = chunk[at : at + BLOCK]
                if _header(block) is not None:
                    return Member(start, position + at, fault="zeros inside a shard" if zeros else "damaged shard")
                zeros = zeros and not any(block)
        position += len(chunk)
    if zeros and BLOCK <= position - start:
        return None if position - start <= TRAILER else Member(start, END, fault="shard with zeros at its end")
    return Member(start, END, fault=reason)
