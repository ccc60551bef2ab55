"""What is wrong with a folder of images, said before hours go into scoring it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emf_lightning.evaluation.folders.image_folder import DrawnImage
    from emf_lightning.evaluation.image_metric import ImageMetric

DRAWING = ("steps", "guidance")
"""Fields of a line of ``prompts.jsonl`` that say how its image was drawn; images that differ have no common score."""


def check_complete(listed: Mapping[str, Any], names: Sequence[str], files: str, source: str) -> None:
    """Raises a ``ValueError`` where images that ``source`` lists and that match ``files`` are not among ``names``."""
    wanted = [file for file in listed if fnmatch(file, files)]
    there = set(names)
    absent = [file for file in wanted if file not in there]
    if absent:
        raise ValueError(
            f"folder: {len(absent):,} of the {len(wanted):,} images that {source} lists are missing, {absent[0]} "
            "first; draw them, or give --partial true for a score that is not comparable"
        )


def check_one_drawing(listed: Mapping[str, Mapping[str, Any]], names: Sequence[str], source: str) -> None:
    """Raises a ``ValueError`` where ``source`` says that the images ``names`` were drawn in several ways."""
    ways: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        if name in listed and any(field in listed[name] for field in DRAWING):
            ways.setdefault(tuple(listed[name].get(field) for field in DRAWING), []).append(name)
    if len(ways) < 2:
        return
    fields = [field for n, field in enumerate(DRAWING) if len({way[n] for way in ways}) > 1]
    patterns = [pattern for group in ways.values() if (pattern := _pattern_of(group, names))]
    choices = f"one of --files {', '.join(map(repr, patterns))}" if patterns else "--files"
    raise ValueError(
        f"folder: the {len(names):,} images were drawn with {len(ways)} different settings of {' and '.join(fields)}, "
        f"by {source}, and have no score in common; choose with {choices}"
    )


def _pattern_of(group: Sequence[str], names: Sequence[str]) -> str | None:
    """A pattern that selects the files of ``group`` alone, whose names are like ``00012-4step_cfg2-1.png``."""
    _, dash, rest = PurePath(group[0]).stem.partition("-")
    label = rest.partition("-")[0]
    for pattern in (f"*-{label}[-.]*", f"*-{label}.[!0-9]*") if dash else ():
        if [name for name in names if fnmatch(name, pattern)] == list(group):
            return pattern
    return None


def check_prompts(images: Sequence[DrawnImage], metric: ImageMetric, partial: bool) -> None:
    """Raises a ``ValueError`` for images of other prompts than the metric's.

    And, but for ``partial``, for prompts without images or with fewer than most have: they would weigh less.
    """
    known = set(metric.prompts())
    strangers = [image for image in images if image.prompt not in known]
    if strangers:
        raise ValueError(
            f"folder: {len(strangers):,} of {len(images):,} images are for prompts that {metric.title} does not "
            f"have, {strangers[0].path} for {strangers[0].prompt!r} among them; choose with files=, or score with "
            "the suite that they were drawn for"
        )
    if partial:
        return
    counts = Counter(image.prompt for image in images)
    missing = [prompt for prompt in metric.prompts() if prompt not in counts]
    if missing:
        raise ValueError(
            f"folder: {len(missing):,} of {metric.title}'s {len(known):,} prompts have no image, {missing[0]!r} among "
            "them; draw them, or give --partial true for a score that is not comparable"
        )
    # texts that a benchmark lists twice have more images than the others
    times = Counter(counts.values())
    usual = max(times, key=lambda count: (times[count], count))
    short = [prompt for prompt in metric.prompts() if counts[prompt] < usual]
    if short:
        raise ValueError(
            f"folder: {len(short):,} of {metric.title}'s {len(known):,} prompts have fewer images than the others' "
            f"{usual}, {short[0]!r} with {counts[short[0]]} among them; draw them, or give --partial true for a score "
            "that is not comparable"
        )


def check_readable(paths: Sequence[Path], argument: str) -> None:
    """Raises a ``ValueError`` for files that are no images, and PNG files that are not whole.

    Nothing is decoded, so that ten thousand take seconds; a JPEG file that breaks off is found when it is read. The
    message begins with ``argument``.
    """
    with ThreadPoolExecutor(8) as pool:  # on a network drive most of the time is waiting
        complaints = list(pool.map(_complaint, paths))
    broken = [(path, complaint) for path, complaint in zip(paths, complaints, strict=True) if complaint]
    if broken:
        raise ValueError(
            f"{argument}: {len(broken):,} of {len(paths):,} images cannot be read, {broken[0][0]} first "
            f"({broken[0][1]}); replace them"
        )


def _complaint(path: Path) -> str:
    """Why the file at ``path`` is no image; empty where it is one."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.verify()
    except Exception as error:  # Pillow's formats complain in kinds of their own
        return str(error) or type(error).__name__
    return ""
