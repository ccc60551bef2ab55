"""Folders of drawn images, in the layouts that evaluators know, with the prompt of each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
        files: pattern that paths below the folder must match, e.g. ``*-4step*``.
        partial: whether prompts of the benchmark may lack images.

    Raises:
        ValueError: for no images, images without a prompt or with another benchmark's, prompts without images.
    """
    paths = [path for path in image_files(folder, "folder") if fnmatch(str(path.relative_to(folder)), files)]
    if not paths:
        raise ValueError(f"folder: no image in {folder} matches files={files!r}")
    prompts = _prompts(folder, paths, metric)
    nameless = [path for path in paths if prompts[path] is None]
    if nameless and metric.needs_prompts:
        raise ValueError(
            f"folder: no prompt for {len(nameless):,} of {len(paths):,} images, {nameless[0]} among them; known "
            f"layouts: {LAYOUTS}"
        )
    images = [DrawnImage(path, prompts[path] or "") for path in paths]
    known = set(metric.prompts())
    if known:
        strangers = [image for image in images if image.prompt not in known]
        if strangers:
            raise ValueError(
                f"folder: {len(strangers):,} of {len(images):,} images are for prompts that {metric.title} does not "
                f"have, {strangers[0].path} for {strangers[0].prompt!r} among them; choose with files=, or score with "
                "the suite that they were drawn for"
            )
        missing = known.difference(image.prompt for image in images)
        if missing and not partial:
            first = next(prompt for prompt in metric.prompts() if prompt in missing)
            raise ValueError(
                f"folder: {len(missing):,} of {metric.title}'s {len(known):,} prompts have no image, {first!r} among "
                "them; draw them, or give --partial true for a score that is not comparable"
            )
    return images


def image_files(folder: Path, argument: str) -> list[Path]:
    """All image files below ``folder``, by path; files and folders that begin with a dot are left out.

    Raises:
        ValueError: where there is no such folder, or no image in it; the message begins with ``argument``.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{argument}: no folder {folder}")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
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


def _prompts(folder: Path, paths: Sequence[Path], metric: ImageMetric) -> dict[Path, str | None]:
    """The prompt of each path, None where no layout knows one."""
    listed = _listed(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    of_folder: dict[Path, str | None] = {}

    def prompt(path: Path) -> str | None:
        relative = PurePath(path.relative_to(folder))
        if str(relative) in listed:
            return listed[str(relative)]
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


def _listed(path: Path) -> dict[str, str]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row["file"]: row["prompt"] for row in rows}
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
