"""Expands paths, globs and ranges to a list of shards."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path

from emf_lightning.data.reading.urls import check_url, is_url
from emf_lightning.text.plain import shorten

ENDINGS = (".tar", ".tar.gz", ".tgz")
"""Endings of tar shards; gzip is decompressed while reading."""
PARQUET = ".parquet"

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST = 1_000_000
"""Shards that the ranges of an entry may name."""


def shard_paths(shards: str | Path | Sequence[str | Path], argument: str = "shards") -> tuple[str, ...]:
    """The shards' files or URLs, in order.

    Args:
        shards: a tar file (``.tar``, ``.tar.gz``, ``.tgz``), a parquet file, a folder of tar files, a glob, a range
            like ``data-{000000..000012}.tar``, a URL of ``PROTOCOLS`` (``hf://``, ``https://``, ``s3://``, ...), or a
            list of these.
        argument: name in the ValueError for an entry that matches no shard.
    """
    entries = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if not entries:
        raise ValueError(f"{argument} is empty; give at least one tar shard")
    paths = [path for entry in entries for part in _ranges(str(entry), argument) for path in _expand(part, argument)]
    for path in paths:
        if not path.endswith((*ENDINGS, PARQUET)):
            raise ValueError(f"{argument}: {path!r} is not a shard; they end in {', '.join((*ENDINGS, PARQUET))}")
    return tuple(paths)


def _ranges(entry: str, argument: str) -> list[str]:
    pieces = RANGE.split(entry)  # text, first, last, text, first, last, text
    if any(len(number) > 18 for number in pieces[1::3] + pieces[2::3]):
        raise ValueError(f"{argument}: {shorten(entry)!r} has a range of numbers of more than 18 digits")
    ranges = [range(int(first), int(last) + 1) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    if (count := math.prod(map(len, ranges))) > MOST:
        raise ValueError(
            f"{argument}: {shorten(entry)!r} names {count:,} shards, more than {MOST:,}; correct its range"
        )
    if not count:
        raise ValueError(f"{argument}: {shorten(entry)!r} has a range that ends before it starts, so it names no shard")
    parts = [pieces[0]]
    for first, numbers, text in zip(pieces[1::3], ranges, pieces[3::3], strict=True):
        parts = [f"{part}{number:0{len(first)}d}{text}" for part in parts for number in numbers]
    return parts


def _expand(entry: str, argument: str) -> list[str]:
    if is_url(entry):
        check_url(entry, argument)
        if not glob.has_magic(entry):
            return [entry]  # checked when it is read: checking here would cost one request a shard
        import fsspec

        system, pattern = fsspec.core.url_to_fs(entry)
        found = sorted(system.unstrip_protocol(path) for path in system.glob(pattern))
    elif Path(entry).expanduser().is_dir():
        found = sorted(str(path) for path in Path(entry).expanduser().iterdir() if path.name.endswith(ENDINGS))
    elif Path(entry).expanduser().is_file():
        found = [str(Path(entry).expanduser())]
    else:
        found = sorted(glob.glob(str(Path(entry).expanduser()), recursive=True))
    if not found:
        raise ValueError(f"{argument}: {entry!r} matches no file; check the path (relative ones start at {Path.cwd()})")
    return found
