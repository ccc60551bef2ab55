"""Digests of a saved folder's files: damage is seen when the folder is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from emf_lightning.files import to_json, write_atomic

DIGESTS = "digests.json"
_SUFFIXES = (".json", ".safetensors")


def write_digests(folder: Path) -> None:
    """Writes the SHA-256 of the folder's JSON files and weights, those in its subfolders too, into ``digests.json``."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES and path.name != DIGESTS]
    write_atomic(folder / DIGESTS, to_json({path.relative_to(folder).as_posix(): _sha256(path) for path in files}))
    for path in files:
        path.chmod((folder / DIGESTS).stat().st_mode)  # safetensors' files are their owner's alone


def check_digests(folder: Path) -> None:
    """Compares the folder's files with its ``digests.json``; a folder without one, as others write it, passes.

    Reads each file once: a second for some 1.5 GB.

    Raises:
        ValueError: naming the first file that is missing or has another content.
    """
    file = folder / DIGESTS
    if not file.is_file():
        return
    remedy = f"write the folder again, or delete {DIGESTS} if you changed the file on purpose"
    try:
        digests = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged; {remedy}") from error
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; {remedy}")
        if _sha256(path) != digest:
            raise ValueError(f"{path} is damaged: its content is not that which was written; {remedy}")


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()
