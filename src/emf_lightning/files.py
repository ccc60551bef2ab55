"""Text and JSON files, written atomically."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in UTF-8. A killed run leaves the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name.lstrip('.')}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object a line, atomically; creates the folder of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def to_json(content: Any) -> str:
    """Indented standard JSON of ``content``, with a final newline. Numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
