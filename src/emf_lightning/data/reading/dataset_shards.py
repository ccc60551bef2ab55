"""Writes an image data set of the Hugging Face hub, or captions alone, as shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from emf_lightning.data.geneval_prompts import with_article
from emf_lightning.data.reading.decoding import UnusableSampleError, usable_caption
from emf_lightning.data.reading.pixels import EXTENSIONS, ImageLimits, UnusableImageError, read_pixels
from emf_lightning.data.reading.urls import is_url, open_url
from emf_lightning.files import read_json, remove_partial, replacing

MANIFEST = "manifest.json"


def open_dataset(name: str, split: str, revision: str | None = None) -> Any:
    """A split of a data set: a hub name, a folder of parquet or image files, or one that ``save_to_disk`` wrote.
    Raises ``ValueError`` if it cannot be read.
    """
    from datasets import load_dataset, load_from_disk

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return load_from_disk(name)[split]
        if (Path(name) / "state.json").is_file():
            return load_from_disk(name)
        return load_dataset(name, split=split, revision=revision)
    except Exception as error:  # many kinds: hub, files, split names
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "give a hub name that can be reached, or the path of a local copy"
        if Path(name).exists():
            remedy = "check the split, and the files there; a folder of pictures is also read as it is, by data.shards"
        raise ValueError(f"dataset: cannot read split {split!r} of {name} ({reason}); {remedy}") from error


def unlisted_images(dataset: Any, name: str, split: str) -> list[str]:
    """Paths of images in the local folder ``name`` that its metadata file does not list: the data set lacks them."""
    from datasets import Image, load_dataset_builder

    if getattr(dataset, "builder_name", None) != "imagefolder" or not Path(name).is_dir():
        return []
    column = image_column(dataset)
    listed = {row[column]["path"] for row in dataset.select_columns(column).cast_column(column, Image(decode=False))}
    files = map(str, (load_dataset_builder(name).config.data_files or {}).get(split, ()))
    return [file for file in files if file.rpartition(".")[2].lower() in EXTENSIONS and file not in listed]


def caption_function(dataset: Any, caption: str) -> Callable[[dict[str, Any]], str | None]:
    """Function from a row to its caption: the column ``caption`` if there is one (class names), else that text.

    It returns None for a null caption, and for a class that is null or has no name, as hidden labels are -1. Raises
    ``ValueError`` for a column that holds neither text nor classes.
    """
    from datasets import ClassLabel, Value

    feature = dataset.features.get(caption)
    if feature is None:
        if near := get_close_matches(caption, dataset.features, 1):
            raise ValueError(
                f"caption: {caption!r} is no column, and would be the caption of all images; did you mean {near[0]!r}?"
            )
        return lambda row: caption
    if isinstance(feature, ClassLabel):
        names = dict(enumerate(feature.names))
        return lambda row: (
            f"a photo of {with_article(names[row[caption]].replace('_', ' '))}" if row[caption] in names else None
        )
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return lambda row: row[caption]
    raise ValueError(f"caption: column {caption!r} holds {feature}, neither text nor classes")


def image_column(dataset: Any) -> str:
    """Name of the one column that holds images; ValueError unless there is exactly one."""
    from datasets import Image

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        raise ValueError(
            f"dataset: needs exactly one column of images, has {columns or 'none'} among {', '.join(dataset.features)}"
        )
    return columns[0]


def dataset_samples(
    dataset: Any,
    caption: str,
    limits: ImageLimits = ImageLimits(),
    left_out: Callable[[int, str], object] = lambda row, reason: None,
) -> Iterator[tuple[bytes | None, str]]:
    """(PNG bytes, caption) of each usable row; the caption by ``caption_function``, the image by ``read_pixels``.

    Args:
        dataset: as ``open_dataset`` returns it.
        caption: see ``caption_function``.
        limits: bounds beyond which an image is left out.
        left_out: called with the number and the reason of each row that is left out.
    """
    import datasets

    column, caption_of = image_column(dataset), caption_function(dataset, caption)
    undecoded = dataset.cast_column(column, datasets.Image(decode=False))

    def samples() -> Iterator[tuple[bytes | None, str]]:
        for number in range(len(undecoded)):
            try:
                row = undecoded[number]
                text = usable_caption(caption_of(row))
                image = read_pixels(_image_file(row[column]), limits)
            except (UnusableImageError, UnusableSampleError) as reason:
                left_out(number, str(reason))
            except UnicodeDecodeError:
                left_out(number, "caption not UTF-8")
            else:
                png = io.BytesIO()
                image.save(png, "png", compress_level=1)
                yield png.getvalue(), text

    return samples()  # columns are checked now, rows are read lazily


def _image_file(stored: dict[str, Any] | None) -> BinaryIO:
    """The file of an undecoded image, as bytes or at a path; raises ``UnusableImageError`` for a missing one."""
    if stored is None or (stored["bytes"] is None and not stored["path"]):
        raise UnusableImageError("missing image")
    if stored["bytes"] is not None:
        return io.BytesIO(stored["bytes"])
    try:
        with open_url(stored["path"]) if is_url(stored["path"]) else open(stored["path"], "rb") as file:
            return io.BytesIO(file.read())
    except ValueError as error:
        raise UnusableImageError("image at an address that is not read") from error
    except OSError as error:
        raise UnusableImageError(f"unreadable image file ({error.strerror or type(error).__name__})") from error


def write_samples(
    samples: Iterable[tuple[bytes | None, str]],
    directory: Path,
    identity: dict[str, Any],
    samples_per_shard: int = 2000,
    progress: Callable[[int], object] | None = None,
) -> Sequence[Path]:
    """Writes shards ``data-000000.tar`` of ``.txt`` captions and optional ``.png`` images; returns their paths.

    A shard gets its name only when it is complete; a repeated call writes the missing shards. Raises ``ValueError`` if
    the directory holds other samples, or there are no samples.

    Args:
        samples: (PNG bytes or None, caption).
        directory: created if missing.
        identity: describes the samples; stored in the directory's ``manifest.json``.
        samples_per_shard: the last shard may have fewer.
        progress: called with the number of samples written so far.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    directory.mkdir(parents=True, exist_ok=True)
    remove_partial(directory)
    manifest, identity = directory / MANIFEST, identity | {"samples_per_shard": samples_per_shard}
    remedy = "delete it with the shards beside it, or choose another directory"
    leftover = next(directory.glob("data-*.tar"), None)
    if leftover is not None and not manifest.exists():
        raise ValueError(
            f"out: {str(leftover)!r} has no {MANIFEST} beside it, which says what is in it; choose another directory, "
            "or delete the shards"
        )
    known = read_json(manifest, remedy) if manifest.exists() else identity
    # a manifest of an earlier version has fewer keys
    if not isinstance(known, dict) or known != {key: value for key, value in identity.items() if key in known}:
        raise ValueError(
            f"out: {directory} holds other samples (see its {MANIFEST}); choose another, or delete it with its shards"
        )
    with replacing(manifest, shared=True) as partial:
        partial.write_text(json.dumps(identity, indent=1) + "\n")
    paths: list[Path] = []
    remaining, done = iter(samples), 0
    while block := list(islice(remaining, samples_per_shard)):
        paths.append(directory / f"data-{len(paths):06d}.tar")
        if not paths[-1].exists():
            _write_shard(paths[-1], block, done)
        done += len(block)
        if progress is not None:
            progress(done)
    if not paths:
        raise ValueError("there are no samples to write")
    return paths


def _write_shard(path: Path, samples: Sequence[tuple[bytes | None, str]], first: int) -> None:
    with replacing(path, shared=True) as partial, tarfile.open(partial, "w") as tar:
        for number, (png, caption) in enumerate(samples, first):
            for suffix, content in (("png", png), ("txt", caption.encode())):
                if content is not None:
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
