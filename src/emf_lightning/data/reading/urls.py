"""Opens files behind URLs of storage services, and of nothing else that fsspec knows."""

from __future__ import annotations

from typing import BinaryIO, cast

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
    options = {}
    if ahead and path.partition("://")[0] in SERVICES:
        options = {"block_size": BLOCK, "cache_type": "background", "cache_options": {"maxblocks": BLOCKS}}
    return cast(BinaryIO, system.open(inside, "rb", compression=compression, **options))
