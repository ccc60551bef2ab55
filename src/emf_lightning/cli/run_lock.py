"""The lock of a directory in which one process works at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import IO, Any

LOCK = "run.lock"
"""File in the directory, locked while a process works there; it names the process and what it does."""


def process() -> dict[str, Any]:
    """This process, for a lock."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def lock(directory: Path, about: dict[str, Any], patience: float = 0.0) -> IO[str]:
    """Locks ``directory`` until the file returned is closed, or the process ends, however it ends.

    A POSIX lock: data workers do not inherit it. On NFS it needs the server's lock service; a file system without locks
    has a warning in its place.

    Args:
        directory: created if missing.
        about: record of this process, for others to read.
        patience: seconds to wait for another process that works there.

    Raises:
        ValueError: naming the process that works there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file, begin = os.fdopen(os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+"), None
    while not _locked(file, directory):
        other = read(directory)
        name = f"process {other.get('pid', 'unknown')} on {other.get('host', 'another machine')}"
        if begin is None:
            begin = time.monotonic()
            if patience:
                print(f"{directory}: waiting up to {patience:g} s for {name}, which works there\n", end="", flush=True)
        if time.monotonic() - begin >= patience:
            file.close()
            raise ValueError(f"{directory}: {name} works there; wait for it, end it, or choose another directory")
        time.sleep(0.1)
    # one write over the earlier record, never an empty file: other ranks read it at this moment
    file.write(json.dumps(about).ljust(os.fstat(file.fileno()).st_size))
    file.flush()
    return file


def _locked(file: IO[str], directory: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"{directory}: the file system has no locks ({error.strerror}), so nothing keeps a second process from "
            "working in this directory at the same time; on Lustre mount with flock",
            stacklevel=3,
        )
    return True


def read(directory: Path) -> dict[str, Any]:
    """The record of the last process that worked in ``directory``; empty where there is none."""
    try:
        found = json.loads((directory / LOCK).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
