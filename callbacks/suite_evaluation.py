"""A suite's images drawn in several ways, judged, and brought together from all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer

from emf_lightning.callbacks.fixed_noise_sampling import Setting, datamodule_of, draw_images
from emf_lightning.callbacks.gathering import gathered
from emf_lightning.callbacks.results_file import JudgedImage
from emf_lightning.callbacks.undisturbed import undisturbed
from emf_lightning.evaluation.geneval.suite_score import SuiteScore
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.prompt_suite import PromptImage, PromptSuite
from emf_lightning.modules.flow_map import FlowMapModule


@dataclass(frozen=True)
class SuiteEvaluation:
    """What one way of drawing scored.

    Attributes:
        setting: the way of drawing.
        scores: of the images of all ranks.
        judged: these images, in the order in which they were asked for.
        seconds: that this rank drew and judged.
        also: name -> score of further metrics.
    """

    setting: Setting
    scores: TaskScores
    judged: list[JudgedImage]
    seconds: float
    also: dict[str, float]


def evaluate_suite(
    trainer: Trainer,
    module: FlowMapModule,
    suite: PromptSuite,
    settings: Sequence[Setting],
    *,
    images_per_task: int,
    shown_per_task: int,
    batch_size: int,
    seed: int,
    report: Callable[[int, int], None],
    also: Sequence[ImageMetric] = (),
) -> list[SuiteEvaluation]:
    """The evaluation of each of ``settings``, the same on every rank; all ranks must call it.

    Args:
        trainer: its ranks share the images.
        module: draws them, with averaged weights, and is afterwards as it was.
        suite: says what to draw and judges it.
        settings: the ways of drawing, all from the same noise.
        images_per_task: drawn for each setting.
        shown_per_task: of these, how many are kept to be looked at.
        batch_size: images drawn at once, on each rank.
        seed: of the noise.
        report: called now and then with (images done, images in all).
        also: metrics that are shown the same images.
    """
    data = datamodule_of(trainer)
    asked = suite.images(images_per_task)
    kept = _first_of_each_task(asked, shown_per_task)
    numbered = list(enumerate(asked))
    mine, share = numbered[trainer.global_rank :: trainer.world_size], math.ceil(len(asked) / trainer.world_size)
    metrics = [SuiteScore(suite).to(trainer.strategy.root_device) for _ in settings]
    further = [[metric.fresh_copy().to(trainer.strategy.root_device) for metric in also] for _ in settings]
    judged: list[list[JudgedImage]] = [[] for _ in settings]
    seconds = [0.0] * len(settings)
    done, total = 0, len(asked) * len(settings)
    with undisturbed(trainer, module):
        for first in range(0, share, batch_size):  # the same for all ranks: of a sharded network each has a part
            batch = mine[first : first + batch_size]
            drawing = batch or numbered[:1]  # a rank that has drawn its share keeps the others company
            prompts = [image.prompt for _, image in drawing]
            captions, indices = [prompt.prompt for prompt in prompts], [image.index for _, image in drawing]
            for k, drawn in enumerate(draw_images(module, data, captions, indices, settings, seed)):
                if not batch:
                    continue
                began = time.perf_counter()
                judgements = [suite.evaluate(*pair) for pair in zip(drawn.images, prompts, strict=True)]
                metrics[k].count(prompts, judgements)
                for metric in further[k]:
                    metric.update(list(drawn.images), captions)
                judged[k] += [
                    JudgedImage(image, judgement, picture if number in kept else None)
                    for (number, image), judgement, picture in zip(batch, judgements, drawn.images, strict=True)
                ]
                seconds[k] += drawn.seconds + time.perf_counter() - began
                done += len(batch) * trainer.world_size
                report(min(done, total), total)
    return [
        SuiteEvaluation(setting, metric.task_scores(), gathered(trainer, images), duration, _main_numbers(others))
        for setting, metric, images, duration, others in zip(settings, metrics, judged, seconds, further, strict=True)
    ]


def _main_numbers(metrics: Sequence[ImageMetric]) -> dict[str, float]:
    """Name -> score of each metric, over all ranks; all ranks must call it."""
    return {metric.name: float(metric.compute()["score"]) for metric in metrics}


def _first_of_each_task(asked: Sequence[PromptImage], count: int) -> set[int]:
    """The places in ``asked`` of the first ``count`` images of each task."""
    places: dict[str, list[int]] = {}
    for place, image in enumerate(asked):
        places.setdefault(image.prompt.tag, []).append(place)
    return {place for task in places.values() for place in task[:count]}
