"""Reads WebDataset samples from tar shards, one by one, from any byte offset at which a sample ended."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
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
"""Number of samples from which ``count_samples`` extrapolates, where reading is slow."""

_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
"""webdataset's rule: the key ends at the first dot of the last component, the rest is the extension."""

_TEXTS = {"txt": "text", "json": "json"}


@dataclass(frozen=True)
class TarSample:
    """The members of one key, undecoded.

    Attributes:
        location: ``shard/key``, for messages and ``CaptionFiles``; of a fault the shard and the bytes that are lost.
        number: running number in the shard.
        end: byte offset in the shard after the sample; reading can resume there.
        image, text, json: the members' bytes; None for a missing member.
        captions: captions that override ``text`` and ``json``, of a picture's row in a table.
        fault: reason why the sample, or a stretch of the shard, is left out.
        ignored: (reason, location) of members that were passed over since the sample before.
    """

    location: str
    number: int
    end: int
    image: bytes | None = None
    text: bytes | None = None
    json: bytes | None = None
    captions: tuple[str, ...] = ()
    fault: str | None = None
    ignored: tuple[tuple[str, str], ...] = ()


@dataclass
class SampleFiles:
    """The files of one key, as far as they are read.

    Attributes:
        key: None before the first sample.
        start: offset of the first file.
        wanted: whether the files are read.
        found: content by kind: image, text or json.
        fault: reason why the sample is left out.
    """

    key: str | None = None
    start: int = 0
    wanted: bool = True
    found: dict[str, bytes] = field(default_factory=dict)
    fault: str | None = None
    _extensions: set[str] = field(default_factory=set)

    def add(self, extension: str, size: int, read: Callable[[], bytes | None], member_mb: float) -> str | None:
        """Takes a file that ``read`` reads whole, or not at all; returns the reason if it is passed over."""
        kind, reason = kind_of(extension), None
        if extension in self._extensions:
            self.fault = "the same name twice in a sample"
        elif kind in self.found:
            reason = "second image in a sample"
        elif kind is not None and size > member_mb * 1e6:
            reason = f"member larger than member_mb={member_mb:g}"
        elif kind is not None and (data := read()) is not None:
            self.found[kind] = data
        elif kind is None and _image(extension):
            reason = "image under a double extension"
        self._extensions.add(extension)
        return reason


def kind_of(extension: str) -> str | None:
    """The kind of file by its extension in lower case: image, text or json; None for others."""
    return "image" if extension in IMAGES else _TEXTS.get(extension)


def in_parts(number: int, part: int, parts: int, width: int) -> bool:
    """Whether sample ``number`` of a shard in ``parts`` belongs to the ``width`` of them from ``part`` on."""
    return (number - part) % parts < width


def everything(key: str) -> bool:
    """True for each sample."""
    return True


def read_samples(
    path: str,
    offset: int = 0,
    number: int = 0,
    part: int = 0,
    parts: int = 1,
    member_mb: float = MEMBER_MB,
    wanted: Callable[[str], bool] = everything,
    width: int = 1,
) -> Iterator[TarSample]:
    """The samples of one shard in ``width`` parts of ``parts`` from ``part`` on: ``number % parts`` says the part.

    A sample is a run of members with one key (the name up to the first dot of its last component). Members without a
    key are passed over, wherever they are. A stretch that is damaged or cut off is a sample of its own, with a
    ``fault`` and a running number, and reading goes on at the next member behind it.

    Args:
        path: file or URL.
        offset: start: 0 or the ``end`` of an earlier sample.
        number: running number of the sample at ``offset``.
        part: index of the first part to yield; the bytes of other samples are not read.
        parts: number of parts that the shard's samples are dealt to.
        member_mb: members that are larger are not read.
        wanted: says by ``shard/key`` whether a sample is read; others are passed over.
        width: number of parts to yield.
    """
    run, ignored, place = SampleFiles(), list[tuple[str, str]](), offset
    shard = path.rpartition("/")[2]

    def mine() -> bool:
        return in_parts(number, part, parts, width)

    def sample(where: str, end: int, **content: object) -> TarSample:
        made = TarSample(where, number, end, **content, ignored=tuple(ignored))  # type: ignore[arg-type]
        ignored.clear()
        return made

    def close(end: int, whole: bool = True) -> Iterator[TarSample]:
        nonlocal number, run
        if run.key is not None:
            # members before a fault are a sample, unless there are none: then they are lost with the fault
            if run.wanted and (whole or run.found):
                yield sample(f"{path}/{run.key}", end, fault=run.fault, **run.found)
            elif not run.wanted:
                ignored.clear()
            number += 1
        run = SampleFiles()

    def lost(reason: str, start: int, end: int, here: bool = False) -> Iterator[TarSample]:
        """A stretch that all lanes lose, unless it is this one alone, ``here``."""
        nonlocal number
        if here or mine():
            last = f"{end:,}" if end != END else "the end"
            yield sample(f"{path} from byte {start:,} to {last}", end, fault=reason)
        ignored.clear()
        number += 1

    try:
        with ShardFile(path) as file:
            for member in members(file, offset):
                if member.fault is not None:
                    if run.start == member.start:  # of a member that turned out to be cut off
                        run = SampleFiles()
                    yield from close(member.start, whole=False)
                    yield from lost(member.fault, member.start, member.end)
                    continue
                place = member.end
                matched = sample_key(member)
                if matched is None or member.odd is not None:
                    if (reason := reason_of(member)) is not None:
                        ignored.append((reason, f"{path}/{member.name}"))
                    continue
                key, extension = matched
                if key != run.key:
                    yield from close(member.start)
                    run = SampleFiles(key, member.start, mine() and wanted(f"{shard}/{key}"))
                if not run.wanted:
                    continue

                def read(member: Member = member) -> bytes | None:
                    data = file.read(member.data, member.size)
                    return data if len(data) == member.size else None

                if (reason := run.add(extension, member.size, read, member_mb)) is not None:
                    ignored.append((reason, f"{path}/{member.name}"))
            yield from close(place)
            if ignored and mine():
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
    yield from lost(fault, place, END, is_url(path))  # of a service, which may have answered the other lanes


def count_samples(path: str, at_most: int = 8192) -> int:
    """Number of samples in a shard; extrapolated by size from the first ``at_most``, for URLs and gzip ``COUNTED``.

    A header is as far from the next as a picture is large: counting all of a shard reads most of it.
    """
    count, last = 0, None
    if is_url(path) or path.endswith("gz"):
        at_most = COUNTED
    try:
        with ShardFile(path) as file:
            for member in members(file, 0):
                matched = None if member.fault is not None or member.odd is not None else sample_key(member)
                if matched is not None and matched[0] != last:
                    count, last = count + 1, matched[0]
                if count > at_most:
                    return round(_size(path) / member.start * at_most)  # images hardly compress
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


def sample_key(member: Member) -> tuple[str, str] | None:
    """The key of the sample that a member belongs to, and its extension in lower case; None if it belongs to none."""
    matched = _NAME.fullmatch(member.name)
    if matched is None or "__MACOSX" in member.name:
        return None
    return matched[1], matched[2].lower()


def _image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGES


def reason_of(member: Member) -> str | None:
    """Reason under which a member that belongs to no sample is counted; None for one that can be no image."""
    base = member.name.rpartition("/")[2]
    if member.odd is not None:
        return f"image is {member.odd}" if _image(base) else None
    if base.startswith(".") or "__MACOSX" in member.name:
        return HIDDEN if _image(base) else None
    return NO_EXTENSION
