"""Image files in folders: listing, checking, reading."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def image_files(folder: Path, argument: str) -> list[Path]:
    """Sorted paths of all image files below ``folder``, except GenEval's grids and names that begin with a dot.

    Raises:
        ValueError: for a missing folder, or one without images; the message begins with ``argument``.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{argument}: no folder {folder}")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    geneval_folders = {path.parent.parent for path in paths if path.parent.name == "samples"}
    paths = [path for path in paths if path.parent not in geneval_folders]  # 00012/grid.png beside 00012/samples
    if not paths:
        raise ValueError(f"{argument}: no image in {folder}; known are {', '.join(SUFFIXES)}")
    return paths


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image at ``path`` as ``[H, W, 3]``, 8-bit RGB, in the orientation of its EXIF data.

    Raises:
        ValueError: for a file that is no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} is no image that can be read ({error}); generate it again") from error


def check_readable(paths: Sequence[Path], argument: str) -> None:
    """Raises a ``ValueError`` for files that are no images and for truncated PNG files.

    Images are not decoded, so that ten thousand take seconds; a truncated JPEG file fails when it is read. The message
    begins with ``argument``.
    """
    with ThreadPoolExecutor(8) as pool:  # on a network drive most of the time is waiting
        errors = list(pool.map(_error_of, paths))
    broken = [(path, error) for path, error in zip(paths, errors, strict=True) if error]
    if broken:
        raise ValueError(
            f"{argument}: {len(broken):,} of {len(paths):,} images cannot be read, {broken[0][0]} first "
            f"({broken[0][1]}); replace them"
        )


def _error_of(path: Path) -> str:
    """Pillow's error message for the file at ``path``; empty for an image."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.verify()
    except Exception as error:  # Pillow's formats have exception types of their own
        return str(error) or type(error).__name__
    return ""
