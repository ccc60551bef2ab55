"""Everything that ``data.shards`` may name, as sources that are read alike."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from emf_lightning.data.reading.metadata_files import METADATA
from emf_lightning.data.reading.parquet_shards import ParquetShard
from emf_lightning.data.reading.picture_folders import PictureFolders
from emf_lightning.data.reading.shard_paths import ENDINGS, PARQUET, shard_paths
from emf_lightning.data.reading.tar_samples import TarSample, count_samples, kind_of
from emf_lightning.text.plain import shorten

HUB_NAME = re.compile(r"(?:hf://(?:datasets/)?)?([\w.-]+/[\w.-]+)(?:@([^/]+))?")

COUNTED_SHARDS, COUNTED_SAMPLES = 64, 8192
"""Shards, and samples of all of them together, at which ``count`` looks."""


class Source(Protocol):
    """Samples that can be read from any offset, as ``read_samples`` reads those of a tar shard."""

    @property
    def identity(self) -> str:
        """Text that differs where positions in the source do not apply; the place of the source is no part of it."""

    def count(self) -> int:
        """Number of samples."""

    def samples(
        self,
        offset: int = 0,
        number: int = 0,
        part: int = 0,
        parts: int = 1,
        member_mb: float = 0,
        wanted: Callable[[str], bool] = ...,
        width: int = 1,
    ) -> Iterator[TarSample]:
        """The samples of the ``width`` parts from ``part`` on that are ``wanted``, from ``offset`` on.

        ``number % parts`` is the part of a sample.
        """


_OF_TRAINING = re.compile(r"(^|[-._ 0-9/])train(ing)?([-._ 0-9/]|$)")
"""A file's path below its folder that names it for training, by the rule of the hub's library."""


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub, stored as parquet files or tar shards; they are streamed.

    Attributes:
        name: ``owner/name``, or a local folder in the hub's layout.
        split: by default train, and for validation the first of validation and test.
        subset: the hub's name of a part of the data set.
        revision: branch, tag or commit, e.g. ``refs/convert/parquet``, which the hub makes for other formats.
    """

    name: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None

    def files(self, argument: str, among: Sequence[str] | None = None) -> list[str]:
        """Files or URLs of the split; raises a ``ValueError`` that starts with ``argument`` if there are none.

        ``among`` are all parquet files of a local folder: none of them may be left out of all splits.
        """
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(self.name, self.subset, revision=self.revision)
        except Exception as error:  # many kinds: hub, files, names of subsets
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{argument}: {self.name!r} matches no file (relative ones start at {Path.cwd()}), and no data set of "
                f"the hub ({shorten(reason, 200)})"
            ) from error
        splits = {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
        if among is not None:
            self._check_complete(splits, among, argument)
        wanted = (self.split,) if self.split else ("validation", "test") if "validation" in argument else ("train",)
        split = next((name for name in wanted if name in splits), None)
        if split is None and not self.split and splits.keys() == {"train"} and self._names_no_split(splits["train"]):
            split = "train"  # all files of a local folder
        if split is None:
            raise ValueError(
                f"{argument}: {self.name!r} has no split {' or '.join(wanted)}, but {', '.join(splits) or 'none'}; "
                "name one, e.g. {name: owner/name, split: train}"
            )
        if other := next((file for file in splits[split] if not file.endswith((*ENDINGS, PARQUET))), None):
            raise ValueError(
                f"{argument}: {self.name!r} is not stored as parquet or tar shards ({other}); take the hub's copy with "
                f"{{name: {self.name}, revision: refs/convert/parquet}}, or write shards with `emf images --dataset`"
            )
        return splits[split]

    def _names_no_split(self, files: Sequence[str]) -> bool:
        """Whether a local folder's files are named for no split, so that the hub's library makes them one."""
        folder = Path(self.name).expanduser()
        return folder.is_dir() and not any(_OF_TRAINING.search(os.path.relpath(file, folder)) for file in files)

    def _check_complete(self, splits: Mapping[str, Sequence[str]], files: Sequence[str], argument: str) -> None:
        """Raises a ``ValueError`` where the hub's library leaves out some of ``files``, those of a local folder.

        Of a folder in which a name says a split it takes such files alone. A README may say otherwise.
        """
        folder = Path(self.name).expanduser()
        if any("configs:" in file.read_text(errors="replace") for file in folder.glob("README.md")):
            return
        named = {os.path.realpath(file) for found in splits.values() for file in found}
        if left_out := [file for file in files if os.path.realpath(file) not in named]:
            raise ValueError(
                f"{argument}: of the {len(files)} parquet files in {self.name!r} {len(left_out)} belong to no split by "
                f"their names ({left_out[0]}, ...), and others do; name them train-..., or give the files themselves: "
                f"{folder}/*.parquet"
            )


Shards = str | HubDataset | Sequence[str | HubDataset]


def open_sources(
    shards: Shards,
    argument: str,
    *,
    caption_column: str | None = None,
    image_column: str | None = None,
    images: bool = True,
    captioned: bool = False,
) -> tuple[str | Source, ...]:
    """The sources that ``shards`` names: paths or URLs of tar shards, parquet files, and folders of pictures as one.

    Args:
        shards: an entry, or several; see ``CaptionImageData``.
        argument: name in messages.
        caption_column: name of the captions in parquet files and metadata files.
        image_column: name of the pictures in parquet files.
        images: whether there must be pictures.
        captioned: whether captions come from elsewhere.

    Raises:
        ValueError: for an entry that holds no samples, pictures without any caption, or missing columns.
    """
    entries = [shards] if isinstance(shards, str | Path | HubDataset) else list(shards)
    files: list[str] = [] if entries else list(shard_paths([], argument))
    folders: list[str] = []
    for entry in entries:
        if isinstance(entry, HubDataset):
            files += entry.files(argument)
        elif _holds_no_shards(str(entry)):
            folders.append(str(Path(entry).expanduser()))
        elif (named := _hub_name(str(entry))) is not None:
            files += HubDataset(named[1], revision=named[2]).files(argument)
        else:
            files += shard_paths(entry, argument)
            _warn_of_pictures(Path(entry).expanduser(), argument)
    sources: list[str | Source] = []
    if folders:
        pictures = PictureFolders(folders, caption_column, images)
        for folder, others in pictures.others.items():
            if pictures.sizes[folder] and others:
                raise ValueError(
                    f"{argument}: {folder!r} holds pictures and shards ({others[0]}, ...); name the folder of either"
                )
            if not pictures.sizes[folder] and not others:
                raise ValueError(f"{argument}: {folder!r} holds no pictures, tar shards or parquet files")
            # the names of parquet files tell splits apart
            parquet = bool(others) and all(name.endswith(PARQUET) for name in others)
            files += HubDataset(folder).files(argument, others) if parquet else others
        if len(pictures) and not pictures.captioned and not captioned:
            raise ValueError(
                f"{argument}: {folders[0]!r} holds {pictures.pictures:,} pictures and no captions; put a.txt "
                "beside a.jpg, or a metadata.jsonl with file_name and caption into the folder"
            )
        sources += [pictures] if len(pictures) else []
    for path in files:
        sources.append(ParquetShard(path, image_column, caption_column, images) if path.endswith(PARQUET) else path)
    for source in [source for source in sources if isinstance(source, ParquetShard)][:1]:
        source.check(argument)
    return tuple(sources)


def _warn_of_pictures(folder: Path, argument: str) -> None:
    """Warns of captioned pictures that lie beside the shards of a folder, whose shards alone are read."""
    if not folder.is_dir():
        return
    kinds: dict[str, set[str | None]] = {}
    for path in folder.iterdir():
        stem, _, extension = path.name.rpartition(".")
        kinds.setdefault("" if path.name in METADATA else stem, set()).add(kind_of(extension.lower()))
    everywhere = "" in kinds
    pictures = [name for name, kind in kinds.items() if "image" in kind and (everywhere or kind & {"text", "json"})]
    if pictures:
        warnings.warn(
            f"{argument}: {str(folder)!r} holds {len(pictures)} captioned pictures beside its shards ({min(pictures)}, "
            "...): the shards alone are read; move the pictures into a folder of their own and name both",
            stacklevel=3,
        )


def count(source: str | Source, at_most: int = COUNTED_SAMPLES) -> int:
    """Number of samples in a source, of a tar shard by ``count_samples``."""
    return count_samples(source, at_most) if isinstance(source, str) else source.count()


def count_all(sources: Sequence[str | Source]) -> int:
    """Number of samples in all sources: exact for few, else estimated in a time that does not grow with their number.

    Of many shards ``COUNTED_SHARDS`` are counted, evenly spaced; of large ones the first samples, by ``count_samples``.
    """
    shards = [source for source in sources if not isinstance(source, PictureFolders)]
    step = max(len(shards) / COUNTED_SHARDS, 1)
    chosen = [shards[int(number * step)] for number in range(min(len(shards), COUNTED_SHARDS))]
    counted = sum(count(shard, COUNTED_SAMPLES // len(chosen)) for shard in chosen)
    return round(counted * step) + sum(len(source) for source in sources if isinstance(source, PictureFolders))


def _hub_name(entry: str) -> re.Match[str] | None:
    """The parts of a hub name, if ``entry`` is one, and no file."""
    if entry.endswith((*ENDINGS, PARQUET)) or Path(entry).expanduser().exists():
        return None
    return HUB_NAME.fullmatch(entry)


def _holds_no_shards(entry: str) -> bool:
    """Whether ``entry`` is a local folder without tar shards in it; they are not looked for further below."""
    path = Path(entry).expanduser()
    return path.is_dir() and not any(name.name.endswith(ENDINGS) for name in path.iterdir())
