"""`emf score`: scores of a folder of images."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from emf_lightning.cli.parsing import import_classes
from emf_lightning.cli.run_lock import lock, process
from emf_lightning.data.reading.pixels import ImageLimits
from emf_lightning.evaluation.folders.image_folder import generated_images
from emf_lightning.evaluation.folders.scoring import LEFT_OUT, left_out_text, score_images
from emf_lightning.evaluation.image_metric import ImageMetric

import_classes("evaluation")


def score(
    folder: Path,
    metric: ImageMetric,
    out: Path | None = None,
    files: str = "*",
    partial: bool = False,
    batch_size: int = 16,
    image_limits: ImageLimits = ImageLimits(),
) -> None:
    """Score a folder of images: GenEval, GenEval 2, DPG-Bench, HPS, CLIP score, FID, KID, CMMD, or shapes' tasks.

    The folder may stand first: `emf score FOLDER --metric ...`. Several processes share the work:
    `torchrun --nproc_per_node 2 -m emf_lightning score ...`. A call that was interrupted is repeated; it goes on where
    it stopped.

    Args:
        folder: with the images; prompts in prompts.jsonl, as `emf predict` writes it, in GenEval's layout, or in a
            text file beside each image.
        metric: what to score with, e.g. SuiteScore with a suite, ClipScore, HpsScore, DpgBench, FrechetDistance.
        out: directory for scores.json and results.jsonl; by default FOLDER-scores/METRIC beside the folder, or
            FOLDER-scores/METRIC-4step where `files` selects those.
        files: pattern that an image's path below the folder must match; '*-4step[-.]*' are `emf predict`'s images of
            four steps, '*-4step_cfg2[-.]*' those with guidance 2 beside the main one.
        partial: score a folder that lacks images which prompts.jsonl or the benchmark has.
        batch_size: images in memory at once.
        image_limits: bounds beyond which an image is left out and counted.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    images = generated_images(folder, metric, files, partial)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and not dist.is_initialized():
        # gloo: ranks sum a few numbers on the CPU; one with simple images may wait hours for the others
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    selected = re.sub(r"\[[^]]*\]|[^\w.]+", "-", files).strip("-.")  # words of the pattern
    name = f"{metric.name}-{selected}" if selected else metric.name
    directory = out or folder.resolve().with_name(f"{folder.resolve().name}-scores") / name
    held = lock(directory, process()) if rank == 0 else nullcontext()
    with held, tqdm(desc=metric.title, total=len(images), unit="image", disable=rank > 0) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.n)

        where = {"rank": rank, "ranks": ranks}
        found = score_images(
            images, metric, directory, **where, batch_size=batch_size, report=show, limits=image_limits
        )
    if rank == 0:
        print(f"{found['title']}, {found['images']:,} images: {directory}")
        for name, value in found["scores"].items():
            print(f"  {name:<14} {value:.4f}")
        if found[LEFT_OUT]:
            print(f"left out, so that the score compares with no complete one: {left_out_text(found[LEFT_OUT])}")
    if ranks > 1:
        dist.destroy_process_group()
