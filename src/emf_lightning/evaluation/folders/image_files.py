"""Image files in folders: listing, reading."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.reading.pixels import EXTENSIONS, ImageLimits, UnusableImageError, read_picture
from emf_lightning.data.reading.tar_samples import HIDDEN, NO_EXTENSION, NO_FILE

SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)


def image_files(folder: Path, argument: str) -> list[Path]:
    """Sorted paths of all image files below ``folder``, except GenEval's grids and hidden ones.

    A warning counts what is passed over.

    Raises:
        ValueError: for a missing folder, or one without images; the message begins with ``argument``.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{argument}: no folder {folder}")
    paths, ignored = [], dict[str, list[Path]]()
    for path in sorted(_files(Path(folder))):
        image = path.suffix.lower() in SUFFIXES
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
        if image and path.name == "grid.png" and (path.parent / "samples").is_dir():
            continue  # GenEval's 00012/grid.png beside 00012/samples
        if image and not hidden and path.is_file():
            paths.append(path)
        elif image:
            ignored.setdefault(HIDDEN if hidden else NO_FILE, []).append(path)
        elif not hidden and not path.suffix and path.is_file():
            ignored.setdefault(NO_EXTENSION, []).append(path)
    if ignored:
        counts = ", ".join(f"{len(found):,} x {reason} ({found[0]} first)" for reason, found in ignored.items())
        warnings.warn(f"{argument}: passed over: {counts}", stacklevel=2)
    if not paths:
        raise ValueError(f"{argument}: no image in {folder}; known are {', '.join(SUFFIXES)}")
    return paths


def _files(folder: Path) -> Iterator[Path]:
    """All paths below ``folder``; links to folders are followed, and each folder is looked into once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in (*names, *folders))


def usable_pixels(path: Path, limits: ImageLimits) -> NDArray[np.uint8] | str:
    """The image at ``path`` as ``[H, W, 3]``, 8-bit RGB, see ``read_picture``; or the reason why it is left out."""
    try:
        return np.array(read_picture(path, limits))
    except UnusableImageError as reason:
        return str(reason)


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image at ``path`` like ``usable_pixels``; ValueError for one that is not usable."""
    pixels = usable_pixels(path, ImageLimits())
    if isinstance(pixels, str):
        raise ValueError(f"{path} is no image that can be read ({pixels}); replace it")
    return pixels
