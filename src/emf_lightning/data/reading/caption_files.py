"""Captions in files beside the shards, the format of ShareGPT-4o-Image and Echo-4o-Image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CAPTIONS = ("caption", "prompt", "text", "txt", "instruction", "input_prompt")
IMAGES = ("output_image", "image_path", "image", "file_name")
"""Field names for a caption and for its image in published files."""


class CaptionFiles:
    """Captions from JSON or JSON-lines files, by image name.

    A file applies to the shards in its folder and below, since many sets number their images from 0, e.g.
    Echo-4o-Image's ``Instruction-Following-Image/*.jsonl`` to ``Instruction-Following-Image/images/*.tar.gz``. Raises
    ``ValueError`` for a file that is missing, is not JSON, or holds no captions with images.
    """

    def __init__(self, files: str | Path | Sequence[str | Path]) -> None:
        self._folders: dict[str, dict[str, str]] = {}
        for file in [files] if isinstance(files, (str, Path)) else files:
            path = Path(file).expanduser()
            folder = os.path.abspath(path.parent)
            self._folders.setdefault(folder, {}).update(_captions(path))

    def find(self, location: str) -> str | None:
        """The caption of the sample at ``location`` (``shard/name``); None if no file has it."""
        shard, _, name = os.path.abspath(location).rpartition("/")
        for folder, captions in self._folders.items():
            if f"{shard}/".startswith(f"{folder}/") and name in captions:
                return captions[name]
        return None


def _captions(path: Path) -> dict[str, str]:
    try:
        captions = dict(filter(None, map(_entry, _records(path))))
    except OSError as error:
        raise ValueError(
            f"captions: cannot read {str(path)!r} ({error.strerror}); give a JSON file, or --data.captions null if "
            "the shards hold their captions"
        ) from error
    except ValueError as error:
        raise ValueError(f"captions: {str(path)!r} is neither JSON nor JSON lines ({error})") from error
    if not captions:
        raise ValueError(
            f"captions: {str(path)!r} holds no record with one of {', '.join(CAPTIONS)} and one of {', '.join(IMAGES)}"
        )
    return captions


def _records(path: Path) -> Iterable[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".jsonl" and text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _entry(record: Any) -> tuple[str, str] | None:
    """(image name without folder and extension, caption) of a record; None if it lacks either."""
    if not isinstance(record, dict):
        return None
    caption = next((record[key] for key in CAPTIONS if isinstance(record.get(key), str)), "")
    image = next((record[key] for key in IMAGES if isinstance(record.get(key), str)), "")
    name = image.rpartition("/")[2].partition(".")[0]
    return (name, caption.strip()) if name and caption.strip() else None
