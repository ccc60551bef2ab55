"""Digests of a saved folder's files: damage is seen when the folder is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emf_lightning.files import read_json, to_json, write_atomic

DIGESTS = "digests.json"
_SUFFIXES = (".json", ".safetensors")
_REMEDY = f"write the folder again, or delete {DIGESTS} if you changed the file on purpose"


def write_digests(folder: Path) -> None:
    """Writes the SHA-256 of the folder's JSON files and weights, those in its subfolders too, into ``digests.json``."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES and path.name != DIGESTS]
    write_atomic(folder / DIGESTS, to_json({path.relative_to(folder).as_posix(): sha256(path) for path in files}))
    for path in files:
        path.chmod((folder / DIGESTS).stat().st_mode)  # safetensors' files are their owner's alone


def check_digests(folder: Path) -> None:
    """Compares the folder's files with its ``digests.json``; a folder without one, as others write it, passes.

    Reads each file once: a second for some 1.5 GB.

    Raises:
        ValueError: naming the first file that is missing or has another content.
    """
    for name, digest in read_digests(folder).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; {_REMEDY}")
        if sha256(path) != digest:
            raise ValueError(f"{path} is damaged: its content is not that which was written; {_REMEDY}")


def read_digests(folder: Path) -> dict[str, str]:
    """The digests that the folder's ``digests.json`` names, by file; none where there is no such file."""
    file = folder / DIGESTS
    return read_json(file, _REMEDY) if file.is_file() else {}


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()
