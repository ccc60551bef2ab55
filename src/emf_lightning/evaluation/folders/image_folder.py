"""Folders of generated images with their prompts, in the layouts of common benchmarks, checked before scoring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from emf_lightning.data.reading.decoding import UnusableSampleError, json_caption, usable_caption
from emf_lightning.evaluation.folders.image_files import image_files
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.text.plain import lines, parse_json, plain

PROMPTS = "prompts.jsonl"
"""The list that `emf predict` writes beside its images: lines with ``file`` and ``prompt``."""
SAMPLING = ("steps", "guidance")
"""Sampling settings in a line of ``prompts.jsonl``; images of different settings have no common score."""

UNKNOWN = object()
"""Stands for the prompt of an image for which no layout knows one."""


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image and its prompt, empty if the image has none and the metric needs none.

    Attributes:
        fault: reason why the image is left out and counted; empty for a usable one.
    """

    path: Path
    prompt: str
    fault: str = ""


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
        ValueError: for missing images, images without a prompt where others have one or the metric needs it, images
            of different sampling settings, or a prompt of another benchmark.
    """
    paths = [path for path in image_files(folder, "folder") if fnmatch(str(path.relative_to(folder)), files)]
    if not paths:
        raise ValueError(f"folder: no image in {folder} matches files={files!r}")
    listed = _listed(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    names = [str(path.relative_to(folder)) for path in paths]
    if not partial:
        _check_complete(listed, names, files)
    _check_same_sampling(listed, names)
    stated, own = _prompts(folder, paths, metric, listed), set(metric.prompts())
    benchmarks = {plain(text): text for text in metric.prompts()}  # `emf predict` strips its prompts
    without = [path for path in paths if path not in stated]
    if without and listed and not metric.needs_prompts:
        raise ValueError(
            f"folder: {len(without):,} of the {len(paths):,} images are not in {PROMPTS}, {without[0]} among them: an "
            "earlier `emf predict` may have left them; delete them, or choose with --files"
        )
    prompts, faults = {}, {}
    for path, prompt in stated.items():
        try:
            prompts[path] = prompt if isinstance(prompt, str) and prompt in own else _usable(prompt)
            prompts[path] = benchmarks.get(prompts[path], prompts[path])
        except UnusableSampleError as reason:
            faults[path] = str(reason) if metric.needs_prompts else ""
    if without and metric.needs_prompts:
        raise ValueError(
            f"folder: no prompt for {len(without):,} of {len(paths):,} images, {without[0]} among them; known layouts: "
            f"{PROMPTS} with lines of `file` and `prompt`, as `emf predict` writes it; GenEval's 00012/metadata.jsonl "
            "and 00012/samples/0003.png; or a text file beside each image"
        )
    if metric.prompts():
        _check_prompts({path: prompts.get(path, "") for path in paths if path not in faults}, metric, partial)
    return [GeneratedImage(path, prompts.get(path, ""), faults.get(path, "")) for path in paths]


def _prompts(folder: Path, paths: Sequence[Path], metric: ImageMetric, listed: dict[str, Any]) -> dict[Path, Any]:
    """The prompts of the paths for which a layout knows one, as stated: any value, or the bytes of a file."""

    def prompt(path: Path) -> Any:
        relative = PurePath(path.relative_to(folder))
        if str(relative) in listed:
            return listed[str(relative)]["prompt"]
        beside = path.with_suffix(".txt")
        if beside.is_file():
            return beside.read_bytes()
        metadata = path.parent.parent / "metadata.jsonl"  # GenEval's
        if path.parent.name == "samples" and metadata.is_file():
            return metadata
        own = metric.prompt_of(relative)
        return UNKNOWN if own is None else own

    return {path: text for path in paths if (text := prompt(path)) is not UNKNOWN}


def _usable(prompt: Any) -> str:
    """The text of a prompt, of a text file's bytes, or of a record of GenEval's; UnusableSampleError for none."""
    return json_caption(prompt.read_bytes(), ("prompt",)) if isinstance(prompt, Path) else usable_caption(prompt)


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of ``prompts.jsonl`` by the image's path below the folder."""
    try:
        rows = [parse_json(line) for line in lines(path.read_text(encoding="utf-8-sig")) if line.strip()]
        return {str(PurePath(row["file"])): {"prompt": row["prompt"], **row} for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path} must have `file` and `prompt` in every line ({error})") from error


def _check_complete(listed: Mapping[str, Any], names: Sequence[str], files: str) -> None:
    """Raises a ``ValueError`` if ``prompts.jsonl`` lists images that match ``files`` and are not among ``names``."""
    wanted = [file for file in listed if fnmatch(file, files)]
    there = set(names)
    if absent := [file for file in wanted if file not in there]:
        raise ValueError(
            f"folder: {len(absent):,} of the {len(wanted):,} images that {PROMPTS} lists are missing, {absent[0]} "
            "first; generate them, or give --partial true for a score that is not comparable"
        )


def _check_same_sampling(listed: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raises a ``ValueError`` if ``prompts.jsonl`` lists the images ``names`` with different sampling settings."""
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
        f"{' and '.join(fields)}, by {PROMPTS}, and have no score in common; choose with {choices}"
    )


def _pattern_of(group: Sequence[str], names: Sequence[str]) -> str | None:
    """A pattern that only the files of ``group`` match, for names like ``00012-4step_cfg2-1.png``; None without one."""
    _, dash, rest = PurePath(group[0]).stem.partition("-")
    label = rest.partition("-")[0]
    for pattern in (f"*-{label}[-.]*", f"*-{label}.[!0-9]*") if dash else ():
        if [name for name in names if fnmatch(name, pattern)] == list(group):
            return pattern
    return None


def _check_prompts(prompts: Mapping[Path, str], metric: ImageMetric, partial: bool) -> None:
    """Raises a ``ValueError`` for images of prompts that the metric does not have.

    Unless ``partial``, also for prompts without images or with fewer than most have, which would weigh less.
    """
    known = set(metric.prompts())
    if unknown := [path for path, prompt in prompts.items() if prompt not in known]:
        raise ValueError(
            f"folder: {len(unknown):,} of {len(prompts):,} images are for prompts that {metric.title} does not "
            f"have, {unknown[0]} for {prompts[unknown[0]]!r} among them; choose with files=, or score with "
            "the suite of these prompts"
        )
    if partial:
        return
    counts = Counter(prompts.values())
    if missing := [prompt for prompt in metric.prompts() if prompt not in counts]:
        raise ValueError(
            f"folder: {len(missing):,} of {metric.title}'s {len(known):,} prompts have no image, {missing[0]!r} among "
            "them; generate them, or give --partial true for a score that is not comparable"
        )
    # prompts that a benchmark lists twice have more images than the others
    times = Counter(counts.values())
    usual = max(times, key=lambda count: (times[count], count))
    if short := [prompt for prompt in metric.prompts() if counts[prompt] < usual]:
        raise ValueError(
            f"folder: {len(short):,} of {metric.title}'s {len(known):,} prompts have fewer images than the others' "
            f"{usual}, {short[0]!r} with {counts[short[0]]} among them; generate them, or give --partial true for a "
            "score that is not comparable"
        )
