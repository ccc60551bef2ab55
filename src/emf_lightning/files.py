"""Text and JSON files, written atomically."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import socket
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
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A context that writes a file beside ``path``, and renames it to ``path`` once it is whole and on the disk.

    Args:
        path: of the file.
        shared: whether other processes may write the same file at the same time; ``remove_partial`` removes what
            those leave that die.

    Yields:
        The file to write; a process that dies leaves it and the old ``path``, and the next call replaces it.

    Raises:
        OSError: naming ``path``, where its disk is full; nothing is left of the new file.
    """
    process = f".{os.getpid()}@{socket.gethostname()}" if shared else ""
    partial = path.with_name(f".{path.name.lstrip('.')}{process}.partial")
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


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A context that fills a folder beside ``folder``, and renames it to ``folder`` once it is whole.

    Where ``folder`` holds files of other names, they stay, and the new files are renamed into it one by one.

    Yields:
        The folder to fill; a process that dies leaves it and the old ``folder``, and the next call replaces it.

    Raises:
        OSError: naming ``folder``, where its disk is full; nothing is left of the new one.
    """
    folder = Path(os.path.realpath(folder))  # a link to a folder stays one
    partial = folder.with_name(f".{folder.name}.partial")
    if os.path.ismount(folder):  # it cannot be replaced
        yield folder
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        new, old = (sorted(p.relative_to(top) for p in top.rglob("*") if p.is_file()) for top in (partial, folder))
        if set(old) <= set(new):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
        else:
            for name in new:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / name, folder / name)
            shutil.rmtree(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (number := full_disk(error)) is not None:
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def remove_partial(folder: Path, seconds: float = 60.0) -> None:
    """Removes the files in ``folder`` that ``replacing`` with ``shared`` has not finished, of processes that died.

    Args:
        folder: where shards are written.
        seconds: how long a file of another machine that shares the folder has not grown.
    """
    for path in folder.glob(".*.partial"):
        if not (found := re.search(r"\.(\d+)@(.+)\.partial$", path.name)):
            continue
        if found[2] == socket.gethostname():
            died = not _is_alive(int(found[1]))
        else:
            died = time.time() - path.stat().st_mtime > seconds
        if died:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


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
    write_atomic(path, "".join(map(json_line, rows)))


def json_line(row: Mapping[str, Any]) -> str:
    """``row`` as a line of a JSON Lines file, with null for NaN and infinity."""
    return json.dumps(_finite(row), allow_nan=False) + "\n"


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
