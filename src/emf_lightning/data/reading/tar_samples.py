"""Reads WebDataset samples from tar shards, one by one, from any byte offset at which a sample ended."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from emf_lightning.data.reading.pixels import EXTENSIONS
from emf_lightning.data.reading.tar_members import END, Member, ShardFile, members
from emf_lightning.data.reading.urls import check_url, is_url

IMAGES = EXTENSIONS
MEMBER_MB = 64.0
"""Megabytes of a member from which it is left out."""
HIDDEN = "hidden image (of macOS, or its name starts with a dot)"
NO_EXTENSION = "name without an extension"
NO_FILE = "image is no file"
"""Reasons for files that are passed over, in shards and in folders."""
COUNTED = 64
"""Number of samples from which ``count_samples`` extrapolates."""

_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
"""webdataset's rule: the key ends at the first dot of the last component, the rest is the extension."""


@dataclass(frozen=True)
class TarSample:
    """The members of one key, undecoded.

    Attributes:
        location: ``shard/key``, for messages and ``CaptionFiles``; of a fault the shard and the bytes that are lost.
        number: running number in the shard.
        end: byte offset in the shard after the sample; reading can resume there.
        image, text, json: the members' bytes; None for a missing member.
        fault: reason why the sample, or a stretch of the shard, is left out.
        ignored: (reason, location) of members that were passed over since the sample before.
    """

    location: str
    number: int
    end: int
    image: bytes | None = None
    text: bytes | None = None
    json: bytes | None = None
    fault: str | None = None
    ignored: tuple[tuple[str, str], ...] = ()


@dataclass
class _Run:
    """A run of members with one key, as far as it is read; ``start`` is the offset of its first member."""

    key: str | None = None
    start: int = 0
    found: dict[str, bytes] = field(default_factory=dict)
    extensions: set[str] = field(default_factory=set)
    fault: str | None = None


def read_samples(
    path: str, offset: int = 0, number: int = 0, part: int = 0, parts: int = 1, member_mb: float = MEMBER_MB
) -> Iterator[TarSample]:
    """The samples of one shard with ``number % parts == part``.

    A sample is a run of members with one key (the name up to the first dot of its last component). Members without a
    key are passed over, wherever they are. A stretch that is damaged or cut off is a sample of its own, with a
    ``fault`` and a running number, and reading goes on at the next member behind it.

    Args:
        path: file or URL.
        offset: start: 0 or the ``end`` of an earlier sample.
        number: running number of the sample at ``offset``.
        part: index of the part to yield; the bytes of other samples are not read.
        parts: number of parts that the shard's samples are dealt to.
        member_mb: members that are larger are not read.
    """
    run, ignored, place = _Run(), list[tuple[str, str]](), offset

    def sample(where: str, end: int, **content: object) -> TarSample:
        made = TarSample(where, number, end, **content, ignored=tuple(ignored))  # type: ignore[arg-type]
        ignored.clear()
        return made

    def close(end: int, whole: bool = True) -> Iterator[TarSample]:
        nonlocal number, run
        if run.key is not None:
            # members before a fault are a sample, unless there are none: then they are lost with the fault
            if number % parts == part and (whole or run.found):
                yield sample(f"{path}/{run.key}", end, fault=run.fault, **run.found)
            elif number % parts != part:
                ignored.clear()
            number += 1
        run = _Run()

    def lost(reason: str, start: int, end: int) -> Iterator[TarSample]:
        nonlocal number
        if number % parts == part:
            last = f"{end:,}" if end != END else "the end"
            yield sample(f"{path} from byte {start:,} to {last}", end, fault=reason)
        ignored.clear()
        number += 1

    try:
        with ShardFile(path) as file:
            for member in members(file, offset):
                if member.fault is not None:
                    if run.start == member.start:  # of a member that turned out to be cut off
                        run = _Run()
                    yield from close(member.start, whole=False)
                    yield from lost(member.fault, member.start, member.end)
                    continue
                place = member.end
                matched = _key(member)
                if matched is None or member.odd is not None:
                    if (reason := _reason(member)) is not None:
                        ignored.append((reason, f"{path}/{member.name}"))
                    continue
                key, extension = matched
                if key != run.key:
                    yield from close(member.start)
                    run = _Run(key, member.start)
                if number % parts != part:
                    continue
                kind = "image" if extension in IMAGES else {"txt": "text", "json": "json"}.get(extension)
                if extension in run.extensions:
                    run.fault = "the same name twice in a sample"
                elif kind in run.found:
                    ignored.append(("second image in a sample", f"{path}/{member.name}"))
                elif kind is not None and member.size > member_mb * 1e6:
                    ignored.append((f"member larger than member_mb={member_mb:g}", f"{path}/{member.name}"))
                elif kind is not None and len(data := file.read(member.data, member.size)) == member.size:
                    run.found[kind] = data
                elif kind is None and _image(extension):
                    ignored.append(("image under a double extension", f"{path}/{member.name}"))
                run.extensions.add(extension)
            yield from close(place)
            if ignored and number % parts == part:
                (reason, where) = ignored.pop(0)
                yield sample(where, END, fault=reason)
        return
    except (EOFError, zlib.error) as error:
        fault = "truncated shard" if isinstance(error, EOFError) else "damaged shard"
    except OSError as error:
        fault = f"unreadable shard ({type(error).__name__})"
    except Exception as error:  # each kind of URL has errors of its own
        if not is_url(path) or isinstance(error, ImportError):
            raise
        fault = f"unreadable shard ({type(error).__name__})"
    yield from close(place, whole=False)
    yield from lost(fault, place, END)


def count_samples(path: str) -> int:
    """Number of samples in a shard: exact for a plain local file, extrapolated by size for URLs and gzip."""
    count, last = 0, None
    try:
        with ShardFile(path) as file:
            for member in members(file, 0):
                matched = None if member.fault is not None or member.odd is not None else _key(member)
                if matched is not None and matched[0] != last:
                    count, last = count + 1, matched[0]
                if count > COUNTED and (is_url(path) or path.endswith("gz")):
                    return round(_size(path) / member.start * COUNTED)  # images hardly compress
    except (EOFError, zlib.error, OSError):
        pass  # reported when the shard is read
    return count


def _size(path: str) -> int:
    """Bytes of the file, compressed or not."""
    import fsspec

    if not is_url(path):
        return os.path.getsize(path)
    check_url(path)
    system, inside = fsspec.core.url_to_fs(path)
    return int(system.size(inside) or 0)


def _key(member: Member) -> tuple[str, str] | None:
    """The key of the sample that a member belongs to, and its extension in lower case; None if it belongs to none."""
    matched = _NAME.fullmatch(member.name)
    if matched is None or "__MACOSX" in member.name:
        return None
    return matched[1], matched[2].lower()


def _image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGES


def _reason(member: Member) -> str | None:
    """Reason under which a member that belongs to no sample is counted; None for one that can be no image."""
    base = member.name.rpartition("/")[2]
    if member.odd is not None:
        return f"image is {member.odd}" if _image(base) else None
    if base.startswith(".") or "__MACOSX" in member.name:
        return HIDDEN if _image(base) else None
    return NO_EXTENSION
