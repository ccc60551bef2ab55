"""An image data set of the Hugging Face hub, or captions alone, as the shards that training reads."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from emf_lightning.data.geneval_prompts import with_article

MANIFEST = "manifest.json"


def open_dataset(name: str, split: str, revision: str | None = None) -> Any:
    """A split of a data set: a hub name, a folder of parquet or picture files, or one that ``save_to_disk`` wrote.

    Raises:
        ValueError: where there is none.
    """
    from datasets import load_dataset, load_from_disk

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return load_from_disk(name)[split]
        if (Path(name) / "state.json").is_file():
            return load_from_disk(name)
        return load_dataset(name, split=split, revision=revision)
    except Exception as error:  # of many kinds: hub, files, names of splits
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"dataset: cannot read split {split!r} of {name} ({reason}); give a hub name that can be reached, or the "
            "path of a local copy"
        ) from error


def caption_rule(dataset: Any, caption: str) -> Callable[[dict[str, Any]], str]:
    """What says a row's caption: the column ``caption`` where there is one (a class by its name), else that text.

    Raises:
        ValueError: for a column that holds neither text nor classes.
    """
    from datasets import ClassLabel, Value

    feature = dataset.features.get(caption)
    if feature is None:
        return lambda row: caption
    if isinstance(feature, ClassLabel):
        return lambda row: f"a photo of {with_article(feature.int2str(row[caption]).replace('_', ' '))}"
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return lambda row: str(row[caption])
    raise ValueError(f"caption: column {caption!r} holds {feature}, neither text nor classes")


def picture_column(dataset: Any) -> str:
    """The name of the one column that holds pictures.

    Raises:
        ValueError: where there is none, or there are several.
    """
    from datasets import Image

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        raise ValueError(
            f"dataset: one column of pictures is needed, and there are {columns or 'none'} among "
            f"{', '.join(dataset.features)}"
        )
    return columns[0]


def samples_of(dataset: Any, caption: str) -> Iterator[tuple[bytes | None, str]]:
    """Each row's picture as PNG, and its caption (``caption_rule``)."""
    column, rule = picture_column(dataset), caption_rule(dataset, caption)

    def sample(row: dict[str, Any]) -> tuple[bytes | None, str]:
        png = io.BytesIO()
        row[column].convert("RGB").save(png, "png", compress_level=1)
        return png.getvalue(), rule(row)

    return map(sample, dataset)  # columns are looked at now, rows when they are wanted


def write_samples(
    samples: Iterable[tuple[bytes | None, str]],
    directory: Path,
    identity: dict[str, Any],
    samples_per_shard: int = 2000,
    progress: Callable[[int], None] | None = None,
) -> Sequence[Path]:
    """The paths of shards ``data-000000.tar`` with a ``.txt`` a sample, and a ``.png`` where there is a picture.

    A shard appears under its name only when it is complete; those of an interrupted call are not written again.

    Args:
        samples: PNG bytes or None, and caption.
        directory: made if missing.
        identity: what the samples are; a directory remembers it in ``manifest.json``.
        samples_per_shard: the last shard may have fewer.
        progress: called with the number of samples done.

    Raises:
        ValueError: for a directory that holds other samples, or for no samples.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    directory.mkdir(parents=True, exist_ok=True)
    manifest, identity = directory / MANIFEST, identity | {"samples_per_shard": samples_per_shard}
    if manifest.exists() and json.loads(manifest.read_text()) != identity:
        raise ValueError(
            f"out: {directory} holds other samples (see its {MANIFEST}); choose another, or delete this one"
        )
    manifest.write_text(json.dumps(identity, indent=1) + "\n")
    paths: list[Path] = []
    block: list[tuple[bytes | None, str]] = []
    done = 0

    def write() -> None:
        nonlocal done
        path = directory / f"data-{len(paths):06d}.tar"
        if not path.exists():
            _write_shard(path, block, done)
        paths.append(path)
        done += len(block)
        block.clear()
        if progress is not None:
            progress(done)

    for sample in samples:
        block.append(sample)
        if len(block) == samples_per_shard:
            write()
    if block:
        write()
    if not paths:
        raise ValueError("there are no samples to write")
    return paths


def _write_shard(path: Path, samples: Sequence[tuple[bytes | None, str]], first: int) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with tarfile.open(partial, "w") as tar:
        for number, (png, caption) in enumerate(samples, first):
            for suffix, content in (("png", png), ("txt", caption.encode())):
                if content is not None:
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    os.replace(partial, path)
