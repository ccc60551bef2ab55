"""Captions in files beside the shards, the format of ShareGPT-4o-Image and Echo-4o-Image."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.reading.decoding import UnusableSampleError, usable_caption
from emf_lightning.data.reading.kept_arrays import Arrays, TextRows, Texts, digest, kept_arrays
from emf_lightning.data.reading.names import CAPTIONS, IMAGES
from emf_lightning.data.reading.shard_paths import ENDINGS
from emf_lightning.text.plain import parse_json, shorten

Image = tuple[str, tuple[str, ...]]
"""Folder of the caption file, and the components of the image's path in it."""


class CaptionFiles:
    """Captions from JSON or JSON-lines files, by the path of the image.

    A file applies to the shards in its folder and below, since many sets number their images from 0, e.g.
    Echo-4o-Image's ``Instruction-Following-Image/*.jsonl`` to ``Instruction-Following-Image/images/*.tar.gz``. Of the
    images with a sample's name it is the one whose path has the most components in common with the sample's, from the
    end. Raises ``ValueError`` for a file that is missing, is not JSON, or holds no captions with images.

    The captions of large files are mapped from the disk, see ``kept_arrays``.

    Args:
        files: one or more.
        key: of a record's caption; records without it have theirs under one of the usual keys.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], key: str | None = None) -> None:
        paths = [Path(file).expanduser() for file in ([files] if isinstance(files, (str, Path)) else files)]
        self._folders = [os.path.abspath(path.parent) for path in paths]
        arrays = kept_arrays(paths, f"captions of folders {key or ''}", partial(_arrays, paths, key))
        self._stems, self._rows, self._places, self._files, self._parents, self._counts = (
            arrays[name] for name in ("stems", "rows", "places", "files", "parents", "counts")
        )
        self._images = Texts(arrays["images"], arrays["images_ends"])
        self._captions = Texts(arrays["captions"], arrays["captions_ends"])

    @property
    def per_image(self) -> float:
        """Mean number of captions of an image."""
        images, captions = self._counts.tolist()
        return captions / images

    def find(self, location: str, seed: int = 0, epoch: int = 0) -> str | None:
        """The caption of the sample at ``location`` (``shard/name``); None if no file has it.

        Of several captions each pass ``epoch`` takes the next, the first by ``seed``. Raises ``UnusableSampleError`` if
        several images match equally well.
        """
        image, captions = self._find(location)
        if image is None:
            return None
        return captions[(zlib.crc32(f"{seed} {'/'.join(image[1])}".encode()) + epoch) % len(captions)]

    def find_all(self, location: str) -> Sequence[str]:
        """All captions of the sample at ``location``, which ``find`` takes in turns."""
        return self._find(location)[1]

    def _named(self, name: str, folders: Sequence[str] | None) -> dict[Image, list[int]]:
        """The rows of each image with this name, in any or in one of ``folders``, in the order of the files."""
        found: dict[Image, list[int]] = {}
        equal = _equal(self._stems, name)
        rows = self._rows[equal]
        if folders is not None:
            rows = rows[np.isin(self._places[equal], [digest(folder) for folder in folders])]
        for row in rows.tolist():
            parts = tuple(self._images[row].split("/"))
            if _stem(parts[-1]) == name:
                found.setdefault((self._folders[int(self._files[row])], parts), []).append(row)
        return found

    def _find(self, location: str) -> tuple[Image | None, Sequence[str]]:
        """The image of the files that is the sample's, and its captions, each once; None if no file has it."""
        place = os.path.abspath(location.replace("\\", "/"))
        *folders, name = place.split("/")
        inside = next((n for n, part in enumerate(folders) if part.endswith(ENDINGS)), len(folders) - 1)
        shard = folders[inside].partition(".tar")[0]
        # a set may be unpacked beside its shard, or in a folder of the shard's name
        paths = [[*folders[:inside], *middle, *folders[inside + 1 :], name] for middle in ([shard], [])]
        ranked: dict[tuple[int, bool, int], list[Image]] = {}
        # a thousand shards may each have an image of this name: those of other folders have no component in common
        for near in ([path[-2] for path in paths], None):
            named = self._named(name, near)
            for folder, parts in named:
                if place.startswith(f"{folder}/"):
                    common = max(_common(path[:-1], parts[:-1]) for path in paths)
                    ranked.setdefault((common, common == len(parts) - 1, len(folder)), []).append((folder, parts))
            if ranked:
                break
        else:
            return None, ()
        best = max(ranked)
        (image, *others) = ranked[best]
        if best[:2] == (0, False) and len(self._parents[_equal(self._parents, folders[-1])]):
            # the files name this folder, for other images
            return None, ()
        if others:
            raise UnusableSampleError("several images in the caption files match")
        return image, tuple(dict.fromkeys(self._captions[row] for row in named[image]))


def _equal(digests: NDArray[Any], text: str) -> slice:
    """Where the ascending digests are that of ``text``."""
    value = digest(text)
    return slice(int(np.searchsorted(digests, value)), int(np.searchsorted(digests, value, "right")))


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of equal components at the end of both."""
    pairs = enumerate(zip(reversed(first), reversed(second), strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _arrays(files: Sequence[Path], key: str | None = None) -> Arrays:
    """A row for each caption: its text, its image's path, its file's number; and the rows in the order of the stems."""
    folders = [os.path.abspath(path.parent) for path in files]
    images, captions, parents = TextRows(), TextRows(), set[int]()
    numbers, stems, places, keys, texts = array("i"), *(array("q") for _ in range(4))
    for number, path in enumerate(files):
        for parts, caption in _captions(path, key):
            image = "/".join(parts)
            images.add(image)
            captions.add(caption)
            stems.append(digest(_stem(parts[-1])))
            numbers.append(number)
            places.append(digest(parts[-2] if len(parts) > 1 else ""))
            parents.update(map(digest, parts[-2:-1]))
            keys.append(digest(f"{folders.index(folders[number])}\0{image}"))
            texts.append(digest(f"{keys[-1]}\0{caption}"))
    rows = np.argsort(np.array(stems), kind="stable")
    found: Arrays = {
        "stems": np.array(stems)[rows],
        "rows": rows,
        "places": np.array(places)[rows],
        "files": np.array(numbers),
        "parents": np.array(sorted(parents), np.int64),
        "counts": np.array([len(np.unique(each)) for each in (keys, texts)]),
    }
    found["images"], found["images_ends"] = images.arrays()
    found["captions"], found["captions_ends"] = captions.arrays()
    return found


def _captions(path: Path, key: str | None) -> Iterator[tuple[tuple[str, ...], str]]:
    """(components of the image's path, caption) for each caption of a file."""
    count, found = 0, key is None
    try:
        for record in _records(path):
            found = found or (isinstance(record, dict) and key in record)
            for entry in _entries(record, key):
                count += 1
                yield entry
    except OSError as error:
        raise ValueError(
            f"captions: cannot read {str(path)!r} ({error.strerror}); give a JSON file, or --data.captions null if "
            "the shards hold their captions"
        ) from error
    except ValueError as error:
        raise ValueError(f"captions: {str(path)!r} is neither JSON nor JSON lines ({error})") from error
    if not found:
        warnings.warn(
            f"caption_column: no record of {str(path)!r} has {key!r}; their usual captions are taken", stacklevel=2
        )
    if not count:
        raise ValueError(
            f"captions: {str(path)!r} holds no record with one of {', '.join(CAPTIONS)} and one of {', '.join(IMAGES)}"
        )


def _records(path: Path) -> Iterator[Any]:
    """The records of a file; lines that are not JSON are left out with a warning unless all are."""
    count, broken, first = 0, 0, ""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        source: TextIO = file
        if path.suffix != ".jsonl":
            text = file.read()
            if text.lstrip().startswith("["):
                yield from parse_json(text)
                return
            source = io.StringIO(text, newline="\n")
        for number, line in enumerate(source, 1):
            try:
                if line.strip():
                    yield parse_json(line.removeprefix("\ufeff") if number == 1 else line)
                    count += 1
            except ValueError as error:
                broken, first = broken + 1, first or f"line {number}: {error}"
    if broken and not count:
        raise ValueError(shorten(first, 200))
    if broken:
        warnings.warn(
            f"captions: {broken:,} lines of {str(path)!r} are not JSON and are left out ({first}); images "
            "without another caption are counted when they are read",
            stacklevel=2,
        )


def _entries(record: Any, key: str | None = None) -> Iterator[tuple[tuple[str, ...], str]]:
    """(components of the image's path, caption) for each caption of a record; none if it lacks either."""
    if not isinstance(record, dict):
        return
    keys = CAPTIONS if key is None else (key, *CAPTIONS)
    captions: str | list[Any] = next((record[k] for k in keys if isinstance(record.get(k), (str, list))), [])
    image = next((record[key] for key in IMAGES if isinstance(record.get(key), str)), "")
    parts = tuple(part for part in image.replace("\\", "/").split("/") if part not in ("", "."))
    for caption in [captions] if isinstance(captions, str) else captions:
        try:
            usable = usable_caption(caption)
        except UnusableSampleError:  # the image is counted under "missing caption" when it is read
            continue
        if parts and _stem(parts[-1]):
            yield parts, usable
