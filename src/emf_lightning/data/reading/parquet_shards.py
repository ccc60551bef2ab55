"""Caption-image rows of parquet files, read from any row on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from emf_lightning.data.reading.dataset_shards import caption_function
from emf_lightning.data.reading.names import CAPTIONS
from emf_lightning.data.reading.tar_members import END, open_shard
from emf_lightning.data.reading.tar_samples import MEMBER_MB, TarSample, everything, in_parts
from emf_lightning.data.reading.urls import is_url

ROWS = 16
"""Rows that are held in memory at once: pictures may have megabytes."""

Caption = str | list[Any] | None


class MissingColumnError(ValueError):
    """A parquet file without a column of pictures, or of captions."""


@dataclass(frozen=True)
class ParquetShard:
    """A parquet file with a column of pictures and one of captions, of lists of captions, or of classes.

    Pictures are HF's ``Image`` feature or bytes. Row groups before a resumed row are not read.

    Attributes:
        path: file or URL.
        image_column: by default the only column of pictures.
        caption_column: by default the first of ``CAPTIONS`` that is there.
        images: whether there must be pictures.
    """

    path: str
    image_column: str | None = None
    caption_column: str | None = None
    images: bool = True

    def __str__(self) -> str:
        return self.path

    @property
    def identity(self) -> str:
        """The file's name."""
        return self.path.rpartition("/")[2]

    def count(self) -> int:
        """Number of rows; 0 for a file that cannot be read, which is told when it is."""
        from pyarrow.parquet import ParquetFile

        try:
            with closing(open_shard(self.path)) as file:
                return int(ParquetFile(file).metadata.num_rows)
        except (OSError, ValueError):
            return 0

    def check(self, argument: str) -> None:
        """Raises a ``ValueError`` that starts with ``argument`` for a file without the columns."""
        from pyarrow.parquet import ParquetFile

        try:
            with closing(open_shard(self.path)) as file:
                schema = ParquetFile(file).schema_arrow
        except Exception:  # each kind of URL has errors of its own; they are counted when the file is read
            return
        try:
            self._columns(schema)
        except ValueError as error:
            raise ValueError(f"{argument}: {self.path} {error}") from error

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
        """As ``read_samples``; offsets are numbers of rows."""
        if offset == END:
            return
        row = offset
        try:
            with closing(open_shard(self.path)) as file:
                for row, image, caption in self._rows(file, offset):
                    if in_parts(row, part, parts, width) and wanted(f"{self.identity}/{row}"):
                        yield self._sample(row, image, caption, member_mb)
            return
        except MissingColumnError as error:
            fault = f"parquet file without its columns ({error})"
        except (OSError, ValueError) as error:  # pyarrow's own are among them
            fault = f"unreadable shard ({type(error).__name__})" if isinstance(error, OSError) else "damaged shard"
        except Exception as error:  # each kind of URL has errors of its own
            if not is_url(self.path) or isinstance(error, ImportError):
                raise
            fault = f"unreadable shard ({type(error).__name__})"
        if is_url(self.path) or in_parts(row, part, parts, width):  # a service may have answered the other lanes
            yield TarSample(f"{self.path} from row {row:,} to the end", row, END, fault=fault)

    def _rows(self, opened: Any, offset: int) -> Iterator[tuple[int, Any, Callable[[], Caption]]]:
        """Number, picture and caption of each row from ``offset`` on, the latter two not yet converted."""
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(opened)
        image, caption, caption_of = self._columns(file.schema_arrow)
        columns = [name for name in (image, caption) if name is not None]
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if offset < first + rows:
                at = first
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
                    images, captions = None if image is None else batch[image], batch[caption]
                    for i in range(max(offset - at, 0), len(batch)):
                        yield (
                            at + i,
                            None if images is None else images[i],
                            partial(_converted, caption_of, captions[i]),
                        )
                    at += len(batch)
            first += rows

    def _sample(self, row: int, image: Any, caption: Callable[[], Caption], member_mb: float) -> TarSample:
        location, fault = f"{self.path}/{row}", None
        ignored: tuple[tuple[str, str], ...] = ()
        picture = None if image is None else image.as_py()
        picture = picture.get("bytes") if isinstance(picture, dict) else picture
        if picture is not None and len(picture) > member_mb * 1e6:
            picture, ignored = None, ((f"member larger than member_mb={member_mb:g}", location),)
        text: Caption = None
        try:
            text = caption()
        except UnicodeDecodeError:
            fault = "caption not UTF-8"
        several = tuple(text) if isinstance(text, list) else ()
        single = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else None
        return TarSample(location, row, row + 1, picture, single, captions=several, fault=fault, ignored=ignored)

    def _columns(self, schema: Any) -> tuple[str | None, str, Callable[[Any], Caption]]:
        """The columns of pictures and captions, and the caption of a value; ValueError if one is missing."""
        import pyarrow

        def is_picture(name: str) -> bool:
            kind = schema.field(name).type
            bytes_ = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
            struct = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            return bytes_ or struct

        named = [self.image_column] if self.image_column is not None else schema.names
        pictures = [name for name in named if name in schema.names and is_picture(name)]
        if len(pictures) != 1 and (self.images or pictures):
            known = "none of pictures" if not pictures else f"several of pictures ({', '.join(pictures)})"
            raise MissingColumnError(
                f"has the columns {', '.join(schema.names)}, {known}"
                + (f" named {self.image_column!r}" if self.image_column is not None else "")
                + "; name it with data.image_column"
            )
        names = CAPTIONS if self.caption_column is None else (self.caption_column,)
        caption = next((name for name in names if name in schema.names), None)
        if caption is None:
            raise MissingColumnError(
                f"has the columns {', '.join(schema.names)}, but none named {' or '.join(names)}; name the captions' "
                "with data.caption_column"
            )
        return (pictures or [None])[0], caption, _caption_of(caption, schema)


def _converted(caption_of: Callable[[Any], Caption], value: Any) -> Caption:
    return caption_of(value.as_py())


def _caption_of(column: str, schema: Any) -> Callable[[Any], Caption]:
    import pyarrow
    from datasets import Features

    kind = schema.field(column).type

    def is_text(kind: Any) -> bool:
        return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)

    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    if is_text(kind) or (is_list and is_text(kind.value_type)):
        return lambda value: value
    # of this column alone: others may be of kinds that `datasets` does not know
    features = Features.from_arrow_schema(pyarrow.schema([schema.field(column)], schema.metadata))
    of_row = caption_function(SimpleNamespace(features=features), column)
    return lambda value: of_row({column: value})
