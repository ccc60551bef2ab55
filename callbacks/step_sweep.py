"""`emf test`: one report of a checkpoint's scores at every step count and guidance scale, averaged weights or not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from emf_lightning.callbacks.experiment_progress_bar import show_line, show_progress
from emf_lightning.callbacks.loggers.run_directory import run_directory
from emf_lightning.callbacks.sampling.image_generation import data_of
from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.callbacks.scores.scored_images import sample_and_score
from emf_lightning.evaluation.geneval.suite_score import sample_path
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.own_prompts import OwnPrompts, ValidationCaptions, chosen_benchmarks
from emf_lightning.evaluation.reports.figures import save_figure
from emf_lightning.evaluation.reports.report import Report, ReportRow
from emf_lightning.evaluation.reports.report_figures import steps_figure
from emf_lightning.evaluation.sampling_config import sampling_configs
from emf_lightning.files import write_json_lines
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.sharding import is_sharded

CAPTIONS = 100
"""Captions of validation samples where no prompts are given."""


class StepSweep(Callback):
    """In `emf test`: samples benchmarks at each step count and guidance scale, averaged and not, and writes one report.

    Further metrics may score the images of a benchmark as well. Noise is that of ``FewStepSampling`` with the same
    seed. ``report.json`` and ``report.md`` are written into the run's directory after each sampling config, so that an
    interrupted sweep keeps its scores, and ``report.png`` at the end. A line for each image of the checkpoint's main
    weights goes into ``results/<metric>-<steps>step.jsonl``, which GenEval's own summary reads.

    Args:
        benchmarks: metrics with prompts of their own, e.g. ``SuiteScore`` with a suite, ``DpgBench``, ``HpsScore``.
        extra_metrics: metrics of any images, e.g. ``ClipScore``, ``FrechetDistance``.
        prompts: further prompts, which ``extra_metrics`` alone score: a text file in UTF-8 with one prompt a line, or a
            list. Where neither these nor ``benchmarks`` are given, the captions of the first 100 validation samples.
        steps: network steps from noise to data.
        guidance_scale: scales of classifier-free guidance; by default the module's own.
        images_per_prompt: images of each prompt; published GenEval scores take four.
        seeds: seeds of the noise; each samples all images anew.
        batch_size: images sampled at once, on each rank.
        trained: whether to score the live weights of the last optimiser step, too, where the checkpoint has both.
        run: name of the checkpoint in the report; by default the run's directory.

    Raises:
        ValueError: for no metric, a benchmark without prompts, two of one name, or numbers below 1; at the start of
            the test, for a number of images that a metric's protocol does not know.
    """

    def __init__(
        self,
        benchmarks: list[ImageMetric] | None = None,
        extra_metrics: list[ImageMetric] | None = None,
        steps: Sequence[int] = (1, 2, 4, 8, 30),
        guidance_scale: list[float] | float | None = None,
        images_per_prompt: int = 4,
        seeds: Sequence[int] = (0,),
        batch_size: int = 64,
        trained: bool = True,
        run: str | None = None,
        prompts: Path | list[str] | None = None,
    ) -> None:
        if not benchmarks and not extra_metrics:
            raise ValueError(
                "StepSweep: benchmarks is empty; give SuiteScore with a suite, DpgBench or HpsScore, or extra_metrics"
            )
        counts = {"images_per_prompt": images_per_prompt, "batch_size": batch_size, "seeds": len(seeds)}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"StepSweep: {name} must be at least 1, got {value}")
        self.benchmarks = chosen_benchmarks("StepSweep", benchmarks, prompts, extra_metrics or [])
        self.extra_metrics = extra_metrics or []
        self.configs = sampling_configs(steps, guidance_scale)
        self.images_per_prompt = images_per_prompt
        self.seeds = tuple(seeds)
        self.batch_size = batch_size
        self.trained = trained
        self.run = run
        self._step = 0
        self._averaged = False
        self._trained_weights: dict[str, torch.Tensor] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.TESTING:
            self._step = checkpoint["global_step"]
            self._averaged = "averaging_state" in checkpoint
            self._trained_weights = None if is_sharded(pl_module) else checkpoint.get("current_model_state")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_of(trainer)
        if not self.benchmarks:
            self.benchmarks = [ValidationCaptions(data, CAPTIONS)]
        for metric in (*self.benchmarks, *self.extra_metrics):
            metric.use_data(data)
        for benchmark in self.benchmarks:  # before the first image is sampled
            prompts = [prompt for prompt, _ in self._requested(trainer, benchmark)] * len(self.seeds)
            for metric in (benchmark, *self.extra_metrics):
                metric.check_count(len(prompts))
                if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                    metric.check_requests(prompts)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FlowMapModule)
        directory = run_directory(trainer)  # a collective of all ranks
        name = self.run or str(directory)
        levels = {b.name: known for b in self.benchmarks if trainer.is_global_zero and (known := b.levels())}
        variants = ["averaged" if self._averaged else "trained"]
        if self.trained and self._averaged and self._trained_weights is not None:
            variants.append("trained")
        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "diffusers", "transformers"))
        checkpoint = str(trainer.ckpt_path or "none")
        about = {"checkpoint": checkpoint, "optimiser steps": self._step, "libraries": libraries}
        rows: list[ReportRow] = []
        done, total = 0, len(variants) * len(self.benchmarks) * len(self.configs)
        for weights in variants:
            with sampling_context(trainer, pl_module), self._weights(pl_module, weights):
                for benchmark in self.benchmarks:
                    for number in range(len(self.configs)):
                        found, images = self._evaluate(trainer, pl_module, benchmark, number, name, weights)
                        rows += found
                        done += 1
                        if not trainer.is_global_zero:
                            continue
                        if weights == variants[0]:
                            path = directory / f"results/{benchmark.name}-{self.configs[number].tag}.jsonl"
                            write_json_lines(path, images)
                        so_far = {"so far": f"{done} of {total} ways"} if done < total else {}
                        Report(tuple(rows), about | so_far, levels).write(directory)
        if trainer.is_global_zero:
            report = Report(tuple(rows), about, levels)
            save_figure(steps_figure(report), directory / "report.png")
            text = f"{report.markdown()}\nreport.md, report.json and report.png: {directory}"
            show_line(trainer, text, at_end=True)

    @contextmanager
    def _weights(self, module: FlowMapModule, which: str) -> Iterator[None]:
        """A context in which the module holds the live weights, or those that the checkpoint loaded."""
        if which == "averaged" or not self._averaged or self._trained_weights is None:
            yield
            return
        kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self._trained_weights)
        try:
            yield
        finally:
            module.load_state_dict(kept)

    def _requested(self, trainer: Trainer, benchmark: ImageMetric) -> list[tuple[str, int]]:
        """The images of one seed, each a prompt and the image's number."""
        per_prompt = 1 if trainer.fast_dev_run else self.images_per_prompt  # type: ignore[attr-defined]
        return [(prompt, index) for index in range(per_prompt) for prompt in benchmark.prompts()]

    def _evaluate(
        self, trainer: Trainer, module: FlowMapModule, benchmark: ImageMetric, number: int, run: str, weights: str
    ) -> tuple[list[ReportRow], list[dict[str, Any]]]:
        """Scores of one benchmark's images with the ``number``-th sampling config; all ranks share the images.

        Returns:
            The report's row of each metric, and a row for each image, with GenEval's file names.
        """
        requested, config = self._requested(trainer, benchmark), self.configs[number]
        metrics = [benchmark, *self.extra_metrics]
        of_all_seeds = [metric.fresh_copy().to(trainer.strategy.root_device) for metric in metrics]
        seed_scores: list[list[float]] = [[] for _ in metrics]
        seconds, image_rows = 0.0, []
        prompts = len(benchmark.prompts())  # of which several may be equal: their place tells them apart
        total = len(self.configs) * len(self.seeds) * len(requested)
        for i, seed in enumerate(self.seeds):
            before = (number * len(self.seeds) + i) * len(requested)

            def show(done: int, before: int = before) -> None:
                show_progress(trainer, f"{benchmark.title} images", before + done, total)

            (scored,) = sample_and_score(
                trainer, module, metrics, requested, [config], batch_size=self.batch_size, seed=seed, on_progress=show
            )
            seconds += scored.seconds
            for place, image in enumerate(scored.images):
                file = sample_path(place % prompts, i * self.images_per_prompt + image.index)
                image_rows.append({"filename": file, **image.row, "seed": seed})
            for whole, metric, scores in zip(of_all_seeds, scored.metrics, seed_scores, strict=True):
                whole.merge(metric)
                if len(self.seeds) > 1 and not isinstance(metric, OwnPrompts):
                    scores.append(float(metric.compute()["score"]))  # a collective of all ranks
        rows = [
            ReportRow(
                run=run,
                metric=metric.name,
                title=metric.title + (f", images of {benchmark.title}" if k > 0 else ""),
                weights=weights,
                step=self._step,
                steps=config.steps,
                guidance_scale=module.guidance_scale if config.guidance_scale is None else config.guidance_scale,
                nfe=module.nfe(config.steps, config.guidance_scale),
                images=len(image_rows),
                seeds=self.seeds,
                scores={name: float(value) for name, value in metric.compute().items()},  # a collective of all ranks
                seed_spread=float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan,
                seconds=round(seconds, 3),
                settings=metric.settings() | {"images_per_prompt": self.images_per_prompt},
                benchmark=benchmark.name,
            )
            for k, (metric, scores) in enumerate(zip(of_all_seeds, seed_scores, strict=True))
            if not isinstance(metric, OwnPrompts)
        ]
        return rows, image_rows
