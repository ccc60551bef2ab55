"""Opens files behind URLs of storage services, and of nothing else that fsspec knows."""

from __future__ import annotations

import gzip
import io
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, TypeVar, cast

T = TypeVar("T")

PROTOCOLS = (
    *("file", "local", "http", "https", "hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"),
    *("hdfs", "webhdfs", "sftp", "ssh"),
)
"""Protocols that read one file of a disk or a service. Others, such as ``reference://``, read what a file tells them
to, wherever that is; chains of several, ``zip://x::https://...``, may hold one of them."""

SERVICES = ("http", "https", "hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Those of them where a request takes long, and whose files fsspec fetches in blocks."""
BLOCK, BLOCKS = 4 << 20, 20
"""Bytes of a request, and requests whose answers are held: more than the largest member that is read."""

PAUSES = (1.0, 4.0, 15.0)
"""Seconds before a failed request is made again."""
RETRIED = (408, 429)
"""HTTP's statuses 4xx that another attempt may not meet: time-out, and too many requests."""


def is_url(path: str) -> bool:
    """Whether ``path`` is no local path."""
    return "://" in path


def check_url(path: str, argument: str = "shards") -> None:
    """Raises ``ValueError`` for a URL of another protocol; the message begins with ``argument``."""
    if is_url(path) and ("::" in path or path.partition("://")[0] not in PROTOCOLS):
        raise ValueError(
            f"{argument}: {path!r} has a protocol that is not read; give a local path (copy or mount the files) or a "
            f"URL of {', '.join(PROTOCOLS)}"
        )


def open_url(path: str, compression: str | None = None, ahead: bool = False) -> BinaryIO:
    """The file behind a URL of ``PROTOCOLS``; ValueError for another.

    Args:
        path: the URL.
        compression: fsspec's name of it.
        ahead: for reading from front to back: fetches the next ``BLOCK`` while the one before it is used.
    """
    import fsspec

    check_url(path)
    system, inside = fsspec.core.url_to_fs(path)
    protocol, options = path.partition("://")[0], {}
    if ahead and protocol in SERVICES:
        options = {"block_size": BLOCK, "cache_type": "background", "cache_options": {"maxblocks": BLOCKS}}
    if protocol in ("file", "local"):
        return cast(BinaryIO, system.open(inside, "rb", compression=compression, **options))
    file = RetriedFile(lambda: system.open(inside, "rb", **options))
    return cast(BinaryIO, file if compression is None else gzip.GzipFile(fileobj=file))


class RetriedFile(io.RawIOBase):
    """A file of a service, read from where it was after a request that failed: days of reading meet some.

    Args:
        open_file: opens the file; called again after a failure, up to as often as there are ``PAUSES``.

    Raises:
        Exception: of the last attempt; of the first for a file that is not there, and for other refusals (status 4xx).
    """

    def __init__(self, open_file: Callable[[], BinaryIO]) -> None:
        self._open, self._file, self._at = open_file, cast(BinaryIO | None, None), 0
        self._attempt(lambda file: None)

    def _attempt(self, use: Callable[[BinaryIO], T]) -> T:
        for pause in (*PAUSES, None):
            try:
                if self._file is None:
                    self._file = self._open()
                return use(self._file)
            except Exception as error:  # each kind of service has errors of its own
                # fsspec's HTTP calls every failure to open a file that is missing; its cause tells
                missing = isinstance(error, FileNotFoundError) and error.__cause__ is not None
                cause = error.__cause__ if missing else error
                status = getattr(cause, "status", None)
                refused = isinstance(status, int) and 400 <= status < 500 and status not in RETRIED
                final = isinstance(cause, FileNotFoundError | PermissionError | ImportError | ValueError)
                if pause is None or refused or final:
                    raise
                self._drop()
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):
                file.close()

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        def at(file: BinaryIO) -> bytes:
            file.seek(self._at)
            return file.read(-1 if size is None else size)

        data = self._attempt(at)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            self._at = self._attempt(lambda file: file.seek(offset, whence))
        else:
            self._at = offset if whence == io.SEEK_SET else self._at + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._drop()
        super().close()
