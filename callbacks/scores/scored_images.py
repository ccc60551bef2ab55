"""Images sampled and scored by metrics; all ranks share the work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray

from emf_lightning.callbacks.sampling.all_gather import all_gather_list
from emf_lightning.callbacks.sampling.image_generation import generate_images
from emf_lightning.evaluation.distances.reference_images import resize
from emf_lightning.evaluation.fixed_noise import noise_indices
from emf_lightning.evaluation.image_metric import ImageMetric, image_rows
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.modules.flow_map import FlowMapModule

SHOWN_PIXELS = 256
"""Largest side of the images that a contact sheet keeps: many at full size would fill the memory of rank 0."""


@dataclass(frozen=True)
class ScoredImage:
    """The ``index``-th image of ``prompt``.

    Attributes:
        row: of ``results.jsonl``, see ``image_rows``.
        image: 8-bit RGB ``[H, W, 3]``, at most ``SHOWN_PIXELS`` wide; None unless it is kept.
    """

    prompt: str
    index: int
    row: Mapping[str, Any]
    image: NDArray[np.uint8] | None = None


@dataclass
class ScoredImages:
    """The images of one sampling config.

    Attributes:
        config: step count and guidance scale.
        metrics: the metrics, which have counted this rank's images; to compute them is a collective of all ranks.
        images: images of all ranks, in the order of the request.
        seconds: time that this rank sampled and scored.
    """

    config: SamplingConfig
    metrics: list[ImageMetric]
    images: list[ScoredImage] = field(default_factory=list)
    seconds: float = 0.0


def sample_and_score(
    trainer: Trainer,
    module: FlowMapModule,
    metrics: Sequence[ImageMetric],
    requested: Sequence[tuple[str, int]],
    configs: Sequence[SamplingConfig],
    *,
    batch_size: int,
    seed: int,
    on_progress: Callable[[int], None],
    kept: Container[tuple[str, int]] = (),
) -> list[ScoredImages]:
    """Samples the requested images with each of ``configs``, from the same noise, and scores them.

    The ranks share the images; all must call this function, inside ``sampling_context``.

    Args:
        trainer: its datamodule encodes captions and decodes latents.
        module: samples latents.
        metrics: fresh copies of these count the images of each config.
        requested: prompt and number of each image.
        configs: step counts and guidance scales.
        batch_size: images sampled at once, on each rank.
        seed: seed of the noise.
        on_progress: called after each batch with the number of images done, of all ranks and configs.
        kept: those of ``requested`` whose pixels are kept.
    """
    device, ranks = trainer.strategy.root_device, trainer.world_size
    numbered = list(zip(requested, noise_indices(requested), strict=True))
    mine, share = numbered[trainer.global_rank :: ranks], math.ceil(len(requested) / ranks)
    results = [ScoredImages(config, [metric.fresh_copy().to(device) for metric in metrics]) for config in configs]
    done, total = 0, len(requested) * len(configs)
    for first in range(0, share, batch_size):  # the same for all ranks: of a sharded network each has a part
        batch = mine[first : first + batch_size]
        # a rank without images left samples one, for the other ranks' collectives
        captions = [prompt for (prompt, _), _ in batch or numbered[:1]]
        indices = [index for _, index in batch or numbered[:1]]
        generated_images = generate_images(trainer, module, captions, indices, configs, seed)
        for result, generated in zip(results, generated_images, strict=True):
            if not batch:
                continue
            began = time.perf_counter()
            with torch.autocast(device.type, enabled=False):  # the trainer's precision is the sampling's alone
                for metric in result.metrics:
                    metric.update(list(generated.images), captions)
            rows = image_rows(result.metrics, len(batch))
            for (request, _), row, image in zip(batch, rows, generated.images, strict=True):
                shown = resize(image, min(SHOWN_PIXELS, min(image.shape[:2]))) if request in kept else None
                result.images.append(ScoredImage(*request, row, shown))
            result.seconds += generated.seconds + time.perf_counter() - began
            done += len(batch) * ranks
            on_progress(min(done, total))
    for result in results:
        result.images = all_gather_list(trainer, result.images)
    return results
