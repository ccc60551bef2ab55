"""Folders of drawn images, in the layouts that evaluators know, with the prompt of each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.evaluation.folders.checks import (
    check_complete,
    check_one_drawing,
    check_prompts,
    check_readable,
)

if TYPE_CHECKING:
    from emf_lightning.evaluation.image_metric import ImageMetric

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROMPTS = "prompts.jsonl"
"""What `emf predict` writes beside its images: lines with ``file`` and ``prompt``."""
LAYOUTS = (
    f"{PROMPTS} with lines of `file` and `prompt`, as `emf predict` writes it; GenEval's 00012/metadata.jsonl and "
    "00012/samples/0003.png; or a text file beside each image"
)


@dataclass(frozen=True)
class DrawnImage:
    """An image in a folder.

    Attributes:
        path: of the file.
        prompt: what it was drawn for; empty where a score needs none.
    """

    path: Path
    prompt: str


def drawn_images(folder: Path, metric: ImageMetric, files: str = "*", partial: bool = False) -> list[DrawnImage]:
    """The images of ``folder`` with their prompts, in the order of their paths.

    A prompt is what the metric's own layout says, or one of the general layouts.

    Args:
        folder: looked through, subfolders too.
        metric: that is to score them.
        files: pattern that paths below the folder must match, e.g. ``*-4step[-.]*``, which leaves out ``4step_cfg2``.
        partial: whether prompts of the benchmark, or lines of ``prompts.jsonl``, may lack images.

    Raises:
        ValueError: for no images, images that cannot be read, that were drawn with different steps or guidance, that
            have no prompt or another benchmark's; for images that are missing.
    """
    paths = [path for path in image_files(folder, "folder") if fnmatch(str(path.relative_to(folder)), files)]
    if not paths:
        raise ValueError(f"folder: no image in {folder} matches files={files!r}")
    listed = _listed(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    names = [str(path.relative_to(folder)) for path in paths]
    if not partial:
        check_complete(listed, names, files, PROMPTS)
    check_one_drawing(listed, names, PROMPTS)
    prompts = _prompts(folder, paths, metric, listed)
    nameless = [path for path in paths if prompts[path] is None]
    if nameless and metric.needs_prompts:
        raise ValueError(
            f"folder: no prompt for {len(nameless):,} of {len(paths):,} images, {nameless[0]} among them; known "
            f"layouts: {LAYOUTS}"
        )
    images = [DrawnImage(path, prompts[path] or "") for path in paths]
    if metric.prompts():
        check_prompts(images, metric, partial)
    check_readable(paths, "folder")
    return images


def image_files(folder: Path, argument: str) -> list[Path]:
    """All image files below ``folder``, by path; names that begin with a dot are left out, and GenEval's grids.

    Raises:
        ValueError: where there is no such folder, or no image in it; the message begins with ``argument``.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{argument}: no folder {folder}")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    of_genevals = {path.parent.parent for path in paths if path.parent.name == "samples"}
    paths = [path for path in paths if path.parent not in of_genevals]  # 00012/grid.png, beside 00012/samples
    if not paths:
        raise ValueError(f"{argument}: no image in {folder}; known are {', '.join(SUFFIXES)}")
    return paths


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image at ``path`` as ``[H, W, 3]``, 8-bit RGB, turned as its camera says.

    Raises:
        ValueError: for a file that is no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} is no image that can be read ({error}); draw it again") from error


def _prompts(
    folder: Path, paths: Sequence[Path], metric: ImageMetric, listed: dict[str, dict[str, Any]]
) -> dict[Path, str | None]:
    """The prompt of each path, None where no layout knows one."""
    of_folder: dict[Path, str | None] = {}

    def prompt(path: Path) -> str | None:
        relative = PurePath(path.relative_to(folder))
        if str(relative) in listed:
            return str(listed[str(relative)]["prompt"])
        beside = path.with_suffix(".txt")
        if beside.is_file():
            return beside.read_text(encoding="utf-8").strip()
        metadata = path.parent.parent / "metadata.jsonl"
        if path.parent.name == "samples":
            if metadata not in of_folder:
                of_folder[metadata] = _metadata(metadata)
            if of_folder[metadata] is not None:
                return of_folder[metadata]
        return metric.prompt_of(relative)

    return {path: prompt(path) for path in paths}


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """Path below the folder -> line of the list."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {str(PurePath(row["file"])): {"prompt": row["prompt"], **row} for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path} must have `file` and `prompt` in every line ({error})") from error


def _metadata(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path} is no record of GenEval's ({error})") from error
    return str(prompt)
