"""Folders of pictures with their texts beside them, read without a conversion."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from emf_lightning.data.reading.metadata_files import METADATA, MetadataCaptions
from emf_lightning.data.reading.tar_members import Member
from emf_lightning.data.reading.tar_samples import (
    MEMBER_MB,
    SampleFiles,
    TarSample,
    everything,
    in_parts,
    kind_of,
    reason_of,
    sample_key,
)

OTHERS = (".tar", ".tar.gz", ".tgz", ".parquet")
"""Endings of files that hold samples of their own."""


class PictureFolders:
    """The samples of folders, at any depth, by the rules of shards: the files ``key.*`` of a folder are one sample.

    The order is a fixed random one, so that blocks of samples mix the folders. ``metadata.jsonl``, ``.csv`` and
    ``.parquet`` (``file_name`` and a caption, as in HF's imagefolder) override the texts of the pictures that they
    name. Folders whose name starts with a dot are left out; links are followed.

    All names are listed first, and held in memory, compactly; no file but the metadata is opened.

    Args:
        roots: the folders.
        caption_column: see ``MetadataCaptions``.
        images: whether samples need pictures; other files beside shards are then none.

    Attributes:
        others: files that hold samples of their own, by root.
        sizes: number of samples by root.
        pictures: number of files that look like pictures.
        captioned: whether there is any caption.
    """

    def __init__(self, roots: Sequence[str], caption_column: str | None = None, images: bool = True) -> None:
        self.roots = tuple(roots)
        self.others: dict[str, list[str]] = {root: [] for root in roots}
        self.sizes: dict[str, int] = {}
        self.pictures, self.captioned = 0, False
        self._folders: list[tuple[str, str]] = []
        self._names, self._ends, self._places = bytearray(), array("Q", [0]), array("I")
        metadata: list[str] = []
        for root in self.roots:
            pictures, captioned, samples, walked = self.pictures, self.captioned, len(self), len(self._folders)
            for folder, names in _walk(root):
                tables = [name for name in names if name in METADATA]
                metadata += [os.path.join(folder, name) for name in tables]
                self.others[root] += [
                    os.path.join(folder, n) for n in names if n.endswith(OTHERS) and n not in METADATA
                ]
                self._add(folder, os.path.relpath(folder, root), [name for name in names if name not in METADATA])
            if self.others[root] and images and self.pictures == pictures:  # shards, and a licence, statistics
                self._cut(samples, walked)
                self.captioned = captioned
            self.sizes[root] = len(self) - sum(self.sizes.values())
        self._order = np.random.default_rng(0).permutation(len(self)).astype(np.uint32)
        self._captions = MetadataCaptions(metadata, caption_column) if metadata else None
        if self._captions is not None:
            self._captions.warn_of_missing(self._key(number) for number in range(len(self)))
            self.captioned = True

    def _cut(self, samples: int, folders: int) -> None:
        """Leaves out all samples and folders but the first ones."""
        del self._folders[folders:], self._ends[samples + 1 :], self._places[samples:], self._names[self._ends[-1] :]

    def _add(self, folder: str, relative: str, names: Sequence[str]) -> None:
        self._folders.append((folder, relative))
        for group in _groups(names):
            self._names += os.fsencode("/".join(group))
            self._ends.append(len(self._names))
            self._places.append(len(self._folders) - 1)
            kinds = {kind_of(name.rpartition(".")[2].lower()) for name in group}
            self.pictures += "image" in kinds
            self.captioned |= bool(kinds & {"text", "json"})

    def __len__(self) -> int:
        return len(self._places)

    def __str__(self) -> str:
        return self.roots[0]

    @property
    def identity(self) -> str:
        """Digest of the names of all files in their folders."""
        digest = hashlib.sha256(self._names)
        for part in (self._ends.tobytes(), self._places.tobytes()):
            digest.update(part)
        digest.update(os.fsencode("\n".join(relative for _, relative in self._folders)))
        return digest.hexdigest()

    def count(self) -> int:
        """Number of samples."""
        return len(self)

    def _files(self, number: int) -> tuple[int, list[str]]:
        """The number of the folder, and the names of the files, of the sample ``number`` in the order of the names."""
        return self._places[number], os.fsdecode(bytes(self._names[self._ends[number] : self._ends[number + 1]])).split(
            "/"
        )

    def _key(self, number: int) -> str:
        """Path of the sample without an ending."""
        place, names = self._files(number)
        return os.path.join(self._folders[place][0], _key_of(names))

    def stamps(self, count: int, wanted: Callable[[str], bool] = everything) -> list[tuple[str, int, int]]:
        """Name, size and time of the metadata's files and of those of the first ``count`` samples that are wanted.

        Raises:
            OSError: for a file that is gone.
        """
        files = [(path, os.path.basename(path)) for path in (() if self._captions is None else self._captions.files)]
        for number in self._order:
            place, names = self._files(int(number))
            folder, relative = self._folders[place]
            if wanted(os.path.normpath(f"{relative}/{_key_of(names)}")):
                files += [(os.path.join(folder, name), f"{relative}/{name}") for name in names]
                count -= 1
            if count <= 0:
                break
        found = [(name, os.stat(path)) for path, name in files]
        return [(name, about.st_size, about.st_mtime_ns) for name, about in found]

    def samples(
        self,
        offset: int = 0,
        number: int = 0,
        part: int = 0,
        parts: int = 1,
        member_mb: float = MEMBER_MB,
        wanted: Callable[[str], bool] = everything,
        width: int = 1,
    ) -> Iterator[TarSample]:
        """As ``read_samples``; offsets are numbers of samples."""
        for number in range(offset, len(self)):
            if not in_parts(number, part, parts, width):
                continue
            place, names = self._files(int(self._order[number]))
            folder, relative = self._folders[place]
            key = _key_of(names)
            if not wanted(os.path.normpath(f"{relative}/{key}")):
                continue
            location = os.path.join(folder, key)
            if sample_key(Member(0, 0, names[0])) is None:
                yield TarSample(location, number, number + 1, fault=reason_of(Member(0, 0, names[0])))
                continue
            files, ignored = SampleFiles(key), list[tuple[str, str]]()
            for name in names:
                reason = _take(files, os.path.join(folder, name), name[len(key) + 1 :].lower(), member_mb)
                if reason is not None:
                    ignored.append((reason, os.path.join(folder, name)))
            captions = () if self._captions is None else self._captions.find(location)
            yield TarSample(
                location,
                number,
                number + 1,
                **files.found,
                captions=captions,
                fault=files.fault,
                ignored=tuple(ignored),
            )


def _key_of(names: Sequence[str]) -> str:
    """The key of the sample of these files; the name of a file that belongs to none."""
    matched = sample_key(Member(0, 0, names[0]))
    return names[0] if matched is None else matched[0]


def _take(files: SampleFiles, path: str, extension: str, member_mb: float) -> str | None:
    """Adds the file at ``path`` to the sample; returns the reason if it is passed over."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait forever
            return "image is no file" if kind_of(extension) == "image" else None

        def read() -> bytes:
            with open(path, "rb") as file:
                return file.read()

        return files.add(extension, about.st_size, read, member_mb)
    except OSError as error:
        if kind_of(extension) is not None:
            files.fault = f"unreadable file ({error.strerror or type(error).__name__})"
        return None


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder at and below ``root`` with the sorted names of its files; a folder that is linked twice once."""
    waiting, seen = [root], set[str]()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        names, inner = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    names.append(entry.name)
                elif not entry.name.startswith(".") and entry.name != "__MACOSX":
                    inner.append(entry.path)
        names.sort()
        yield folder, names
        waiting += sorted(inner, reverse=True)


def _groups(names: Sequence[str]) -> Iterator[list[str]]:
    """Names of the files of each sample, and alone each that is to be counted; others are left out."""
    group, last = list[str](), None
    for name in names:
        matched = sample_key(Member(0, 0, name))
        key = None if matched is None else matched[0]
        if group and (key is None or key != last):
            yield from _usable(group)
            group = []
        last = key
        if key is not None:
            group.append(name)
        elif reason_of(Member(0, 0, name)) is not None:
            yield [name]
    if group:
        yield from _usable(group)


def _usable(group: list[str]) -> Iterator[list[str]]:
    if any(kind_of(name.rpartition(".")[2].lower()) is not None for name in group):
        yield group
