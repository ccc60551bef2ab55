"""Folders of generated images with their prompts, in the layouts of common benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from emf_lightning.evaluation.folders.checks import check_complete, check_prompts, check_same_sampling
from emf_lightning.evaluation.folders.image_files import check_readable, image_files
from emf_lightning.evaluation.image_metric import ImageMetric

PROMPTS = "prompts.jsonl"
"""The list that `emf predict` writes beside its images: lines with ``file`` and ``prompt``."""
LAYOUTS = (
    f"{PROMPTS} with lines of `file` and `prompt`, as `emf predict` writes it; GenEval's 00012/metadata.jsonl and "
    "00012/samples/0003.png; or a text file beside each image"
)


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image in a folder.

    Attributes:
        path: of the file.
        prompt: that it was generated from; empty if it has none and the metric needs none.
    """

    path: Path
    prompt: str


def generated_images(
    folder: Path, metric: ImageMetric, files: str = "*", partial: bool = False
) -> list[GeneratedImage]:
    """The images of ``folder`` with their prompts, in the order of their paths.

    Prompts come from one of the general layouts, or else from the metric's own layout.

    Args:
        folder: searched with its subfolders.
        metric: that will score the images.
        files: pattern that paths below the folder must match, e.g. ``*-4step[-.]*``, which leaves out ``4step_cfg2``.
        partial: whether prompts of the benchmark, or lines of ``prompts.jsonl``, may lack images.

    Raises:
        ValueError: for missing images, or images that cannot be read, have different sampling settings, no prompt, or
            a prompt of another benchmark.
    """
    paths = [path for path in image_files(folder, "folder") if fnmatch(str(path.relative_to(folder)), files)]
    if not paths:
        raise ValueError(f"folder: no image in {folder} matches files={files!r}")
    listed = _listed(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    names = [str(path.relative_to(folder)) for path in paths]
    if not partial:
        check_complete(listed, names, files, PROMPTS)
    check_same_sampling(listed, names, PROMPTS)
    prompts = _prompts(folder, paths, metric, listed)
    without = [path for path in paths if path not in prompts]
    if without and metric.needs_prompts:
        raise ValueError(
            f"folder: no prompt for {len(without):,} of {len(paths):,} images, {without[0]} among them; known "
            f"layouts: {LAYOUTS}"
        )
    if metric.prompts():
        check_prompts({path: prompts.get(path, "") for path in paths}, metric, partial)
    check_readable(paths, "folder")
    return [GeneratedImage(path, prompts.get(path, "")) for path in paths]


def _prompts(
    folder: Path, paths: Sequence[Path], metric: ImageMetric, listed: dict[str, dict[str, Any]]
) -> dict[Path, str]:
    """The prompts of the paths for which a layout knows one."""
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

    return {path: text for path in paths if (text := prompt(path)) is not None}


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of ``prompts.jsonl`` by the image's path below the folder."""
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
