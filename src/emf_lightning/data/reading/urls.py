"""Opens files behind URLs of storage services, and of nothing else that fsspec knows."""

from __future__ import annotations

from typing import BinaryIO, cast

PROTOCOLS = (
    *("file", "local", "http", "https", "hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"),
    *("hdfs", "webhdfs", "sftp", "ssh"),
)
"""Protocols that read one file of a disk or a service. Others, such as ``reference://``, read what a file tells them
to, wherever that is; chains of several, ``zip://x::https://...``, may hold one of them."""


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


def open_url(path: str, compression: str | None = None) -> BinaryIO:
    """The file behind a URL of ``PROTOCOLS``; ValueError for another."""
    import fsspec

    check_url(path)
    return cast(BinaryIO, fsspec.open(path, "rb", compression=compression).open())
