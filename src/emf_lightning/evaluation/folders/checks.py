"""Checks of a folder of images and their prompts, before hours go into scoring it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from emf_lightning.evaluation.image_metric import ImageMetric

SAMPLING = ("steps", "guidance")
"""Sampling settings in a line of ``prompts.jsonl``; images of different settings have no common score."""


def check_complete(listed: Mapping[str, Any], names: Sequence[str], files: str, source: str) -> None:
    """Raises a ``ValueError`` if images that ``source`` lists and that match ``files`` are not among ``names``."""
    wanted = [file for file in listed if fnmatch(file, files)]
    there = set(names)
    absent = [file for file in wanted if file not in there]
    if absent:
        raise ValueError(
            f"folder: {len(absent):,} of the {len(wanted):,} images that {source} lists are missing, {absent[0]} "
            "first; generate them, or give --partial true for a score that is not comparable"
        )


def check_same_sampling(listed: Mapping[str, Mapping[str, Any]], names: Sequence[str], source: str) -> None:
    """Raises a ``ValueError`` if ``source`` lists the images ``names`` with different sampling settings."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        if name in listed and any(field in listed[name] for field in SAMPLING):
            groups.setdefault(tuple(listed[name].get(field) for field in SAMPLING), []).append(name)
    if len(groups) < 2:
        return
    fields = [field for n, field in enumerate(SAMPLING) if len({values[n] for values in groups}) > 1]
    patterns = [pattern for group in groups.values() if (pattern := _pattern_of(group, names))]
    choices = f"one of --files {', '.join(map(repr, patterns))}" if patterns else "--files"
    raise ValueError(
        f"folder: the {len(names):,} images were sampled with {len(groups)} different settings of "
        f"{' and '.join(fields)}, by {source}, and have no score in common; choose with {choices}"
    )


def _pattern_of(group: Sequence[str], names: Sequence[str]) -> str | None:
    """A pattern that only the files of ``group`` match, for names like ``00012-4step_cfg2-1.png``; None without one."""
    _, dash, rest = PurePath(group[0]).stem.partition("-")
    label = rest.partition("-")[0]
    for pattern in (f"*-{label}[-.]*", f"*-{label}.[!0-9]*") if dash else ():
        if [name for name in names if fnmatch(name, pattern)] == list(group):
            return pattern
    return None


def check_prompts(prompts: Mapping[Path, str], metric: ImageMetric, partial: bool) -> None:
    """Raises a ``ValueError`` for images of prompts that the metric does not have.

    Unless ``partial``, also for prompts without images or with fewer than most have, which would weigh less.
    """
    known = set(metric.prompts())
    unknown = [path for path, prompt in prompts.items() if prompt not in known]
    if unknown:
        raise ValueError(
            f"folder: {len(unknown):,} of {len(prompts):,} images are for prompts that {metric.title} does not "
            f"have, {unknown[0]} for {prompts[unknown[0]]!r} among them; choose with files=, or score with "
            "the suite of these prompts"
        )
    if partial:
        return
    counts = Counter(prompts.values())
    missing = [prompt for prompt in metric.prompts() if prompt not in counts]
    if missing:
        raise ValueError(
            f"folder: {len(missing):,} of {metric.title}'s {len(known):,} prompts have no image, {missing[0]!r} among "
            "them; generate them, or give --partial true for a score that is not comparable"
        )
    # prompts that a benchmark lists twice have more images than the others
    times = Counter(counts.values())
    usual = max(times, key=lambda count: (times[count], count))
    short = [prompt for prompt in metric.prompts() if counts[prompt] < usual]
    if short:
        raise ValueError(
            f"folder: {len(short):,} of {metric.title}'s {len(known):,} prompts have fewer images than the others' "
            f"{usual}, {short[0]!r} with {counts[short[0]]} among them; generate them, or give --partial true for a "
            "score that is not comparable"
        )
