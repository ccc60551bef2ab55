"""Files that are there as a whole or not at all, whenever a run is ended."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in UTF-8, at once or not at all."""
    partial = path.with_name(f".{path.name.lstrip('.')}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
