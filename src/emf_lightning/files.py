"""Text and JSON files, written atomically."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in UTF-8. A killed run leaves the old file or the new one, never a part."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context that writes a file beside ``path``, and renames it to ``path`` once it is whole and on the disk.

    Yields:
        The file to write; a process that dies leaves it and the old ``path``, and the next call replaces it.

    Raises:
        OSError: naming ``path``, where its disk is full; nothing is left of the new file.
    """
    partial = path.with_name(f".{path.name.lstrip('.')}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if (number := full_disk(error)) is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def remove_partial(folder: Path, seconds: float = 60.0) -> None:
    """Removes the files ``.NAME.PROCESS.partial`` in ``folder`` of processes that died.

    Args:
        folder: where shards are written.
        seconds: how long a file has not grown; its process may run on another machine that shares the folder.
    """
    for path in folder.glob(".*.partial"):
        process = path.name.split(".")[-2]
        alive = process.isdecimal() and Path("/proc", process).exists()
        if process.isdecimal() and not alive and time.time() - path.stat().st_mtime > seconds:
            path.unlink(missing_ok=True)


def full_disk(error: BaseException | None) -> int | None:
    """The number of the error of a full disk, quota or file size limit in the causes of ``error``, or None."""
    while error is not None:
        named = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors
        number = error.errno if isinstance(error, OSError) else int(named[1]) if named else None
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return number
        error = error.__cause__ or error.__context__
    return None


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object a line, atomically, with null for NaN and infinity; creates the folder of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: for a file that cannot be read or holds something else; the message ends with ``remedy``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"{path} cannot be read as JSON ({reason}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; {remedy}")
    return content


def to_json(content: Any) -> str:
    """Indented standard JSON of ``content``, with a final newline. Numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
