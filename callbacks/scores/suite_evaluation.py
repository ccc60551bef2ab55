"""Images of a suite with several sampling configs, evaluated and gathered from all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer

from emf_lightning.callbacks.sampling.all_gather import all_gather_list
from emf_lightning.callbacks.sampling.image_generation import datamodule_of, generate_images
from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.callbacks.scores.results_file import EvaluatedImage
from emf_lightning.evaluation.geneval.prompt_suite import PromptImage, PromptSuite
from emf_lightning.evaluation.geneval.suite_score import SuiteScore
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.modules.flow_map import FlowMapModule


@dataclass(frozen=True)
class SuiteEvaluation:
    """The scores of one sampling config.

    Attributes:
        config: step count and guidance scale.
        scores: scores of the images of all ranks.
        images: these images, in the order of the suite.
        seconds: time that this rank sampled and evaluated.
        extra_metrics: name -> score of further metrics of the same images.
    """

    config: SamplingConfig
    scores: TaskScores
    images: list[EvaluatedImage]
    seconds: float
    extra_metrics: dict[str, float]


def evaluate_suite(
    trainer: Trainer,
    module: FlowMapModule,
    suite: PromptSuite,
    configs: Sequence[SamplingConfig],
    *,
    images_per_task: int,
    shown_per_task: int,
    batch_size: int,
    seed: int,
    on_progress: Callable[[int, int], None],
    extra_metrics: Sequence[ImageMetric] = (),
) -> list[SuiteEvaluation]:
    """The evaluation of each of ``configs``, the same on every rank; all ranks must call it.

    Args:
        trainer: its ranks share the images.
        module: samples with averaged weights; its state is restored afterwards.
        suite: gives the prompts and evaluates the images.
        configs: step counts and guidance scales, which all start from the same noise.
        images_per_task: images for each config.
        shown_per_task: images of each task that are kept for the contact sheet.
        batch_size: images sampled at once, on each rank.
        seed: seed of the noise.
        on_progress: called after each batch with (images done, images in all).
        extra_metrics: further metrics of the same images.
    """
    data = datamodule_of(trainer)
    requested = suite.images(images_per_task)
    kept = _first_of_each_task(requested, shown_per_task)
    numbered = list(enumerate(requested))
    mine, share = numbered[trainer.global_rank :: trainer.world_size], math.ceil(len(requested) / trainer.world_size)
    device = trainer.strategy.root_device
    suite_scores = [SuiteScore(suite).to(device) for _ in configs]
    metrics = [[metric.fresh_copy().to(device) for metric in extra_metrics] for _ in configs]
    evaluated: list[list[EvaluatedImage]] = [[] for _ in configs]
    seconds = [0.0] * len(configs)
    done, total = 0, len(requested) * len(configs)
    with sampling_context(trainer, module):
        for first in range(0, share, batch_size):  # the same for all ranks: of a sharded network each has a part
            batch = mine[first : first + batch_size]
            sampled = batch or numbered[:1]  # a rank without images left samples one, for the other ranks' collectives
            prompts = [image.prompt for _, image in sampled]
            captions, indices = [prompt.prompt for prompt in prompts], [image.index for _, image in sampled]
            for k, generated in enumerate(generate_images(module, data, captions, indices, configs, seed)):
                if not batch:
                    continue
                began = time.perf_counter()
                verdicts = [suite.evaluate(*pair) for pair in zip(generated.images, prompts, strict=True)]
                suite_scores[k].count(prompts, verdicts)
                for metric in metrics[k]:
                    metric.update(list(generated.images), captions)
                evaluated[k] += [
                    EvaluatedImage(request, verdict, image if number in kept else None)
                    for (number, request), verdict, image in zip(batch, verdicts, generated.images, strict=True)
                ]
                seconds[k] += generated.seconds + time.perf_counter() - began
                done += len(batch) * trainer.world_size
                on_progress(min(done, total), total)
    return [
        SuiteEvaluation(
            config,
            suite_scores[k].task_scores(),
            all_gather_list(trainer, evaluated[k]),
            seconds[k],
            {metric.name: float(metric.compute()["score"]) for metric in metrics[k]},  # a collective of all ranks
        )
        for k, config in enumerate(configs)
    ]


def _first_of_each_task(requested: Sequence[PromptImage], count: int) -> set[int]:
    """The positions in ``requested`` of the first ``count`` images of each task."""
    positions: dict[str, list[int]] = {}
    for position, image in enumerate(requested):
        positions.setdefault(image.prompt.tag, []).append(position)
    return {position for task in positions.values() for position in task[:count]}
