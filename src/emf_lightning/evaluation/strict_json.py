"""JSON that every program reads: Python's own writes NaN, which is none."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(content: Any) -> str:
    """``content`` as indented JSON with a line end; numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
