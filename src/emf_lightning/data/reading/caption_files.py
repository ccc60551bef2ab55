"""Captions in files beside the shards, the format of ShareGPT-4o-Image and Echo-4o-Image."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emf_lightning.data.reading.decoding import UnusableSampleError, usable_caption
from emf_lightning.data.reading.names import CAPTIONS, IMAGES
from emf_lightning.data.reading.shard_paths import ENDINGS
from emf_lightning.text.plain import lines, parse_json, shorten

Image = tuple[str, tuple[str, ...]]
"""Folder of the caption file, and the components of the image's path in it."""


class CaptionFiles:
    """Captions from JSON or JSON-lines files, by the path of the image.

    A file applies to the shards in its folder and below, since many sets number their images from 0, e.g.
    Echo-4o-Image's ``Instruction-Following-Image/*.jsonl`` to ``Instruction-Following-Image/images/*.tar.gz``. Of the
    images with a sample's name it is the one whose path has the most components in common with the sample's, from the
    end. Raises ``ValueError`` for a file that is missing, is not JSON, or holds no captions with images.
    """

    def __init__(self, files: str | Path | Sequence[str | Path]) -> None:
        self._captions: dict[Image, list[str]] = {}
        self._images: dict[str, list[Image]] = {}
        self._parents: set[str] = set()
        for file in [files] if isinstance(files, (str, Path)) else files:
            path = Path(file).expanduser()
            folder = os.path.abspath(path.parent)
            for parts, caption in _captions(path):
                captions = self._captions.setdefault((folder, parts), [])
                if not captions:
                    self._images.setdefault(_stem(parts[-1]), []).append((folder, parts))
                    self._parents.update(parts[-2:-1])
                if caption not in captions:
                    captions.append(caption)

    @property
    def per_image(self) -> float:
        """Mean number of captions of an image."""
        return sum(map(len, self._captions.values())) / len(self._captions)

    def find(self, location: str, seed: int = 0, epoch: int = 0) -> str | None:
        """The caption of the sample at ``location`` (``shard/name``); None if no file has it.

        Of several captions each pass ``epoch`` takes the next, the first by ``seed``. Raises ``UnusableSampleError`` if
        several images match equally well.
        """
        image = self._find(location)
        if image is None:
            return None
        captions = self._captions[image]
        return captions[(zlib.crc32(f"{seed} {'/'.join(image[1])}".encode()) + epoch) % len(captions)]

    def find_all(self, location: str) -> Sequence[str]:
        """All captions of the sample at ``location``, which ``find`` takes in turns."""
        image = self._find(location)
        return () if image is None else self._captions[image]

    def _find(self, location: str) -> Image | None:
        """The image of the files that is the sample's; None if no file has it."""
        place = os.path.abspath(location.replace("\\", "/"))
        *folders, name = place.split("/")
        inside = next((n for n, part in enumerate(folders) if part.endswith(ENDINGS)), len(folders) - 1)
        shard = folders[inside].partition(".tar")[0]
        # a set may be unpacked beside its shard, or in a folder of the shard's name
        paths = [[*folders[:inside], *middle, *folders[inside + 1 :], name] for middle in ([shard], [])]
        ranked: dict[tuple[int, bool, int], list[Image]] = {}
        for folder, parts in self._images.get(name, ()):
            if place.startswith(f"{folder}/"):
                common = max(_common(path[:-1], parts[:-1]) for path in paths)
                ranked.setdefault((common, common == len(parts) - 1, len(folder)), []).append((folder, parts))
        if not ranked:
            return None
        best = max(ranked)
        (image, *others) = ranked[best]
        if best[:2] == (0, False) and folders[-1] in self._parents:  # the files name this folder, for other images
            return None
        if others:
            raise UnusableSampleError("several images in the caption files match")
        return image


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of equal components at the end of both."""
    pairs = enumerate(zip(reversed(first), reversed(second), strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _captions(path: Path) -> list[tuple[tuple[str, ...], str]]:
    try:
        captions = [entry for record in _records(path) for entry in _entries(record)]
    except OSError as error:
        raise ValueError(
            f"captions: cannot read {str(path)!r} ({error.strerror}); give a JSON file, or --data.captions null if "
            "the shards hold their captions"
        ) from error
    except ValueError as error:
        raise ValueError(f"captions: {str(path)!r} is neither JSON nor JSON lines ({error})") from error
    if not captions:
        raise ValueError(
            f"captions: {str(path)!r} holds no record with one of {', '.join(CAPTIONS)} and one of {', '.join(IMAGES)}"
        )
    return captions


def _records(path: Path) -> list[Any]:
    """The records of a file; lines that are not JSON are left out with a warning unless all are."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix != ".jsonl" and text.lstrip().startswith("["):
        return list(parse_json(text))
    records, broken = [], []
    for number, line in enumerate(lines(text), 1):
        try:
            if line.strip():
                records.append(parse_json(line))
        except ValueError as error:
            broken.append(f"line {number}: {error}")
    if broken and not records:
        raise ValueError(shorten(broken[0], 200))
    if broken:
        warnings.warn(
            f"captions: {len(broken):,} lines of {str(path)!r} are not JSON and are left out ({broken[0]}); images "
            "without another caption are counted when they are read",
            stacklevel=2,
        )
    return records


def _entries(record: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """(components of the image's path, caption) for each caption of a record; none if it lacks either."""
    if not isinstance(record, dict):
        return
    captions: str | list[Any] = next((record[key] for key in CAPTIONS if isinstance(record.get(key), (str, list))), [])
    image = next((record[key] for key in IMAGES if isinstance(record.get(key), str)), "")
    parts = tuple(part for part in image.replace("\\", "/").split("/") if part not in ("", "."))
    for caption in [captions] if isinstance(captions, str) else captions:
        try:
            usable = usable_caption(caption)
        except UnusableSampleError:  # the image is counted under "missing caption" when it is read
            continue
        if parts and _stem(parts[-1]):
            yield parts, usable
