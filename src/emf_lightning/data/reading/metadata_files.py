"""Captions in the ``metadata.jsonl``, ``.csv`` or ``.parquet`` of a folder of pictures, as in HF's imagefolder."""

from __future__ import annotations

import csv
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np

from emf_lightning.data.reading.decoding import UnusableSampleError, usable_caption
from emf_lightning.data.reading.kept_arrays import Arrays, kept_arrays
from emf_lightning.data.reading.names import CAPTIONS, IMAGES
from emf_lightning.text.plain import parse_json, shorten

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class MetadataCaptions:
    """Captions by the path of the picture. A picture may have several rows, and a row a list of captions.

    All captions are held as the bytes of their text and 24 more each; those of large files are mapped from the disk,
    see ``kept_arrays``.

    Args:
        files: the files; names in them are relative to their folders.
        caption_column: name of the captions; by default the first of ``CAPTIONS`` that a row has.

    Raises:
        ValueError: for a file that cannot be read, or has no column of names or captions.
    """

    def __init__(self, files: Sequence[str], caption_column: str | None = None) -> None:
        self.files = tuple(files)
        names = ("file_name", *IMAGES), CAPTIONS if caption_column is None else (caption_column,)
        # names of pictures are hashed with the paths of the files as they are given
        arrays = kept_arrays(self.files, f"metadata {names} {self.files}", partial(_arrays, self.files, *names))
        self._keys, self._starts, self._ends = arrays["keys"], arrays["starts"], arrays["ends"]
        self._text = arrays["text"]

    def find(self, path: str) -> tuple[str, ...]:
        """The captions of the picture at ``path``, given without its ending, in their order; each once."""
        key = np.uint64(_hash(path))
        rows = range(int(np.searchsorted(self._keys, key)), int(np.searchsorted(self._keys, key, "right")))
        texts = (self._text[int(self._starts[row]) : int(self._ends[row])].tobytes().decode() for row in rows)
        return tuple(dict.fromkeys(texts))

    def warn_of_missing(self, paths: Iterable[str]) -> None:
        """Warns of rows that name none of the pictures at ``paths``."""
        known = np.fromiter(map(_hash, paths), np.uint64)
        if missing := int((~np.isin(self._keys, known)).sum()):
            warnings.warn(
                f"{self.files[0]}: {missing:,} of {len(self._keys):,} captions name a picture that is not there; "
                "they are left out",
                stacklevel=2,
            )


def _arrays(files: Sequence[str], images: Sequence[str], columns: Sequence[str]) -> Arrays:
    """The captions' text, and in the order of the pictures' digests each caption's place in it."""
    keys, text, ends = array("Q"), bytearray(), array("Q", [0])
    for file in files:
        for name, caption in _pairs(file, images, columns):
            keys.append(_hash(os.path.join(os.path.dirname(file), name.replace("\\", "/"))))
            text += caption.encode()
            ends.append(len(text))
    hashes, places = np.array(keys, np.uint64), np.array(ends, np.uint64)
    order = np.argsort(hashes, kind="stable")
    return {
        "keys": hashes[order],
        "starts": places[:-1][order],
        "ends": places[1:][order],
        "text": np.frombuffer(text, np.uint8),
    }


def _hash(path: str) -> int:
    """Digest of a path without what follows the first dot of its last component."""
    folder, name = os.path.split(os.path.normpath(path))
    stem = os.path.join(folder, name.partition(".")[0])
    try:
        data = os.fsencode(stem)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and no file's name holds
        data = stem.encode("utf-16", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _pairs(file: str, images: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, usable caption) of the rows."""
    seen: dict[str, None] = {}
    count = 0
    for row in _rows(file):
        seen.update(dict.fromkeys(map(str, row)))
        image = next((row[name] for name in images if isinstance(row.get(name), str)), None)
        captions: Any = next((row[name] for name in columns if isinstance(row.get(name), str | list)), [])
        count += image is not None and captions != []
        for caption in [captions] if isinstance(captions, str) else captions:
            try:
                usable = usable_caption(caption)
            except UnusableSampleError:  # the picture is counted as one without a caption when it is read
                continue
            if image is not None:
                yield image, usable
    if not count:
        wanted = columns[0] if len(columns) == 1 else f"a caption ({', '.join(columns)})"
        raise ValueError(
            f"{file} has no rows with {images[-1]} and {wanted}: its columns are {', '.join(seen) or 'none'}; name the "
            "captions' with data.caption_column"
        )


def _rows(file: str) -> Iterator[dict[str, Any]]:
    """The rows of a table, one at a time; lines that are no JSON are left out with a warning."""
    if file.endswith(".parquet"):
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
                yield from batch.to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
            raise ValueError(f"{file} cannot be read as parquet ({shorten(str(error), 200)})") from error
        return
    broken = 0
    try:
        with open(file, encoding="utf-8-sig", newline="" if file.endswith(".csv") else "\n") as lines:
            if file.endswith(".csv"):
                csv.field_size_limit(2**31 - 1)  # a caption has no limit in other files either
                yield from csv.DictReader(lines)
                return
            for line in lines:
                try:
                    row = parse_json(line) if line.strip() else {}
                except ValueError:
                    row = None
                broken += not isinstance(row, dict)
                yield row if isinstance(row, dict) else {}
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read ({shorten(str(error), 200)}); it must be UTF-8 text") from error
    if broken:
        warnings.warn(f"{file}: {broken:,} lines are no JSON objects and are left out", stacklevel=2)
