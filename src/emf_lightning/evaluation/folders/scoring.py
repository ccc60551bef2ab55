"""Scoring of a folder of images: in bounded memory, on several ranks, resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from emf_lightning.data.reading.pixels import ImageLimits
from emf_lightning.evaluation.folders.image_files import usable_pixels
from emf_lightning.evaluation.folders.image_folder import GeneratedImage
from emf_lightning.evaluation.image_metric import ImageMetric, image_rows
from emf_lightning.files import json_line, replacing, to_json, write_atomic
from emf_lightning.text.plain import plain

SCORES = "scores.json"
LEFT_OUT = "left_out"
"""Key of the images that cannot be used: by reason in ``scores.json``, the reason in a row."""
RESULTS = "results.jsonl"
STATE, ROWS = ".progress-{}-of-{}.pt", ".results-{}-of-{}.jsonl"
"""Files of one rank while the scoring runs, by rank and number of ranks."""


def score_images(
    images: Sequence[GeneratedImage],
    metric: ImageMetric,
    directory: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    batch_size: int = 16,
    save_seconds: float = 30.0,
    report: Callable[[int, int], None] = lambda done, total: None,
    limits: ImageLimits = ImageLimits(),
) -> dict[str, Any]:
    """Scores ``images`` and writes ``scores.json`` and ``results.jsonl`` into ``directory``.

    Each rank scores every n-th image and saves the metric's state and its result rows in ``directory``: a repeated call
    resumes there. Rank 0 joins the rows in the order of ``images``, so that all ranks must share the file system.

    Args:
        images: all of them, the same on every rank.
        metric: in its initial state.
        directory: for results; made if missing.
        rank: of this process; rank 0 writes the results.
        ranks: number of processes; several need an initialised process group.
        batch_size: images in memory at once.
        save_seconds: time between two saves.
        report: called with (estimated images done by all ranks, images in all).
        limits: bounds beyond which an image is left out.

    Returns:
        The content of ``scores.json``, the same on every rank. Images that cannot be used are left out of all numbers;
        ``left_out`` lists their paths by reason.

    Raises:
        ValueError: if ``directory`` holds the progress of another scoring, or no image can be used.
    """
    metric.check_count(len(images))
    metric.check_requests([image.prompt for image in images])
    directory.mkdir(parents=True, exist_ok=True)
    progress = _Progress(directory, metric, images, rank, ranks, limits)
    mine = images[rank::ranks]
    began, saved, before = time.perf_counter(), time.perf_counter(), progress.done
    with progress.results.open("a", encoding="utf-8") as lines:
        report(min(progress.done * ranks, len(images)), len(images))
        while progress.done < len(mine):
            batch = mine[progress.done : progress.done + batch_size]
            read = [image.fault or usable_pixels(image.path, limits) for image in batch]
            usable = [(image, pixels) for image, pixels in zip(batch, read, strict=True) if not isinstance(pixels, str)]
            if usable:
                metric.update([pixels for _, pixels in usable], [image.prompt for image, _ in usable])
            scored = iter(image_rows([metric], len(usable)) if usable else [])
            for image, pixels in zip(batch, read, strict=True):
                row = {LEFT_OUT: pixels} if isinstance(pixels, str) else next(scored)
                lines.write(json_line({"filename": str(image.path), **row}))
            lines.flush()
            progress.done += len(batch)
            if time.perf_counter() - saved > save_seconds:
                progress.save()
                saved = time.perf_counter()
            report(min(progress.done * ranks, len(images)), len(images))
    progress.save()
    left_out = _left_out(progress.results, ranks)
    if (unusable := sum(map(len, left_out.values()))) == len(images):
        raise ValueError(f"folder: none of {len(images):,} images can be used: {left_out_text(left_out)}")
    values = {name: float(value) for name, value in metric.compute().items()}  # synchronises all ranks
    scores = {
        "metric": metric.name,
        "title": metric.title,
        "scores": values,
        "images": len(images) - unusable,
        LEFT_OUT: left_out,
        "settings": metric.settings(),
        "seconds": round(time.perf_counter() - began, 1),
        "resumed_at": before * ranks,
    }
    if ranks > 1:
        dist.barrier()
    if rank == 0:
        states, results = ([directory / name.format(n, ranks) for n in range(ranks)] for name in (STATE, ROWS))
        rows = [file.read_text(encoding="utf-8").splitlines() for file in results]
        in_order = (rows[n % ranks][n // ranks] + "\n" for n in range(len(images)))
        write_atomic(directory / RESULTS, "".join(row for row in in_order if LEFT_OUT not in json.loads(row)))
        write_atomic(directory / SCORES, to_json(scores))
        # last, for a run killed before this line finds its progress; a state without its rows could not be resumed
        for file in (*states, *results):
            file.unlink(missing_ok=True)
    if ranks > 1:
        dist.barrier()
    return scores


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of a file, which tell it from one that takes its place; zeros for one that is gone."""
    try:
        stat = file.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, weights_only=True)
        if saved.keys() >= {"key", "done", "state"}:
            return dict(saved)
        reason = "of another kind"
    except Exception as error:  # its type depends on which bytes are wrong
        reason = type(error).__name__
    raise ValueError(f"out: {path} is damaged ({reason}); delete it, and the scoring starts anew")


def left_out_text(left_out: Mapping[str, Sequence[str]]) -> str:
    """The number of images by reason, and the first of each."""
    return ", ".join(f"{len(paths):,} x {reason} ({plain(paths[0])} first)" for reason, paths in left_out.items())


def _left_out(results: Path, ranks: int) -> dict[str, list[str]]:
    """Paths of the images that all ranks left out, by reason."""
    rows = [row for line in results.read_text(encoding="utf-8").splitlines() if LEFT_OUT in (row := json.loads(line))]
    everyone: list[Any] = [rows]
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, rows)
    left_out: dict[str, list[str]] = {}
    for row in sorted((row for rows in everyone for row in rows), key=lambda row: row["filename"]):
        left_out.setdefault(row[LEFT_OUT], []).append(row["filename"])
    return left_out


class _Progress:
    """Progress of one rank on disk; the constructor restores the metric's state from it."""

    def __init__(
        self,
        directory: Path,
        metric: ImageMetric,
        images: Sequence[GeneratedImage],
        rank: int,
        ranks: int,
        limits: ImageLimits,
    ) -> None:
        self.metric = metric
        self.path = directory / STATE.format(rank, ranks)
        self.results = directory / ROWS.format(rank, ranks)
        self.done = 0
        files = [[str(image.path), image.prompt, *_stamp(image.path)] for image in images]
        identity = [metric.name, metric.settings(), repr(limits), files]
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        others = [p for p in directory.glob(".progress-*.pt") if not p.name.endswith(f"-of-{ranks}.pt")]
        if others:
            count = others[0].stem.rpartition("-")[2]
            raise ValueError(
                f"out: {directory} was begun by {count} processes, this is one of {ranks}: start as many as "
                "before, or give another directory"
            )
        if self.path.is_file():
            saved = _read_progress(self.path)
            if saved["key"] != self.key:
                raise ValueError(
                    f"out: {directory} holds the beginnings of other images, of images that have been replaced since, "
                    "or of another score than this; empty it or give another directory"
                )
            for name, value in saved["state"].items():
                setattr(metric, name, value)
            metric._update_count = 1
            self.done = saved["done"]
        # rows written after the last save: their images are scored again
        lines = self.results.read_text(encoding="utf-8").splitlines(keepends=True) if self.results.is_file() else []
        write_atomic(self.results, "".join(lines[: self.done]))

    def save(self) -> None:
        """Writes the progress file; a killed process leaves the old one or the new one."""
        with replacing(self.path) as partial:
            torch.save({"key": self.key, "done": self.done, "state": self.metric.metric_state}, partial)
