"""`emf test`: every step count, guidance scale and weights of a checkpoint, scored into one report."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray

from emf_lightning.callbacks.experiment_progress_bar import ExperimentProgressBar
from emf_lightning.callbacks.fixed_noise_sampling import Setting, datamodule_of, draw_images, settings_of
from emf_lightning.callbacks.gathering import gathered
from emf_lightning.callbacks.undisturbed import undisturbed
from emf_lightning.evaluation.geneval.suite_score import SuiteScore
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.reports.report import Report, ReportRow
from emf_lightning.evaluation.reports.report_figures import steps_figure
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.sharding import is_sharded

log = logging.getLogger(__name__)


@dataclass
class _Tally:
    """What one way of drawing has earned so far with one benchmark."""

    benchmark: ImageMetric
    setting: Setting
    metrics: list[ImageMetric]  # of all seeds
    of_seeds: list[list[float]]  # metric -> score of each seed
    seconds: float = 0.0
    images: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


class StepSweep(Callback):
    """In `emf test`: draws benchmarks at each step count and guidance scale, averaged and not, and writes one report.

    The images of a benchmark may be scored by further metrics as well. Noise is that of ``FewStepSampling`` with the
    same seed. ``report.json`` and ``report.md`` are written into the run's directory after each way of drawing, so that
    a sweep that is ended early leaves what it has found, and ``report.png`` at the end; a line for each image of the
    checkpoint's main weights goes into ``results/<metric>-<steps>step.jsonl``, which GenEval's own summary reads.

    Args:
        benchmarks: metrics that know their prompts, e.g. ``SuiteScore`` with a suite, ``DpgBench``, ``HpsScore``.
        also: metrics of any images, e.g. ``ClipScore``, ``FrechetDistance``.
        steps: network steps from noise to data.
        guidance: scales of classifier-free guidance; by default the module's own.
        images_per_prompt: published GenEval scores take four.
        seeds: of the noise; each draws all images anew.
        batch_size: images drawn at once, on each rank.
        trained: whether to score, beside the averaged weights, those that the optimiser left, where the checkpoint has
            both.
        run: what to call the checkpoint; by default the run's directory.

    Raises:
        ValueError: for no benchmark, one without prompts, two of one name, or senseless numbers; at the start of the
            test, for a number of images that a metric's protocol does not know.
    """

    def __init__(
        self,
        benchmarks: list[ImageMetric],
        also: list[ImageMetric] | None = None,
        steps: Sequence[int] = (1, 2, 4, 8, 30),
        guidance: list[float] | float | None = None,
        images_per_prompt: int = 4,
        seeds: Sequence[int] = (0,),
        batch_size: int = 64,
        trained: bool = True,
        run: str | None = None,
    ) -> None:
        if not benchmarks:
            raise ValueError("StepSweep: benchmarks is empty; give SuiteScore with a suite, DpgBench or HpsScore")
        for benchmark in benchmarks:
            if not benchmark.prompts():
                raise ValueError(f"StepSweep: {type(benchmark).__name__} has no prompts of its own; put it into `also`")
        names = [benchmark.name for benchmark in benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"StepSweep: benchmarks of one name ({', '.join(names)}); test them one after the other")
        for name, value in (
            ("images_per_prompt", images_per_prompt),
            ("batch_size", batch_size),
            ("seeds", len(seeds)),
        ):
            if value < 1:
                raise ValueError(f"StepSweep: {name} must be at least 1, got {value}")
        self.benchmarks = benchmarks
        self.also = also or []
        self.settings = settings_of(steps, guidance)
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
        for benchmark in self.benchmarks:  # all of them before the first image
            for metric in (benchmark, *self.also):
                metric.check_count(len(self._asked(trainer, benchmark)) * len(self.seeds))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FlowMapModule)
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        name = self.run or str(directory)
        levels = _levels(self.benchmarks) if trainer.is_global_zero else {}
        variants = ["averaged" if self._averaged else "trained"]
        if self.trained and self._averaged and self._trained_weights is not None:
            variants.append("trained")
        rows: list[ReportRow] = []
        done, total = 0, len(variants) * len(self.benchmarks) * len(self.settings)
        for weights in variants:
            with undisturbed(trainer, pl_module), self._weights(pl_module, weights):
                for benchmark in self.benchmarks:
                    for number in range(len(self.settings)):
                        tally = self._draw(trainer, pl_module, benchmark, number)
                        rows += [self._row(tally, i, pl_module, name, weights) for i in range(len(tally.metrics))]
                        images = gathered(trainer, tally.rows)
                        done += 1
                        if not trainer.is_global_zero:
                            continue
                        if weights == variants[0]:
                            _write_lines(directory / f"results/{benchmark.name}-{tally.setting.label}.jsonl", images)
                        about = self._about(trainer) | ({"so far": f"{done} of {total} ways"} if done < total else {})
                        Report(tuple(rows), about, levels).write(directory)
        if trainer.is_global_zero:
            self._publish(trainer, directory, Report(tuple(rows), self._about(trainer), levels))

    @contextmanager
    def _weights(self, module: FlowMapModule, which: str) -> Iterator[None]:
        """The module with the weights that the optimiser left, or as the checkpoint filled it."""
        if which == "averaged" or not self._averaged or self._trained_weights is None:
            yield
            return
        kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self._trained_weights)
        try:
            yield
        finally:
            module.load_state_dict(kept)

    def _asked(self, trainer: Trainer, benchmark: ImageMetric) -> list[tuple[str, int]]:
        """The images of one seed, each a prompt and its number."""
        per_prompt = 1 if trainer.fast_dev_run else self.images_per_prompt  # type: ignore[attr-defined]
        return [(prompt, index) for index in range(per_prompt) for prompt in benchmark.prompts()]

    def _draw(self, trainer: Trainer, module: FlowMapModule, benchmark: ImageMetric, number: int) -> _Tally:
        """What the ``number``-th setting earns with one benchmark; all ranks share its images."""
        data, device = datamodule_of(trainer), trainer.strategy.root_device
        asked, setting = self._asked(trainer, benchmark), self.settings[number]
        mine = asked[trainer.global_rank :: trainer.world_size]
        share = math.ceil(len(asked) / trainer.world_size)
        metrics = [benchmark, *self.also]
        tally = _Tally(benchmark, setting, [m.fresh_copy().to(device) for m in metrics], [[] for _ in metrics])
        drawn_before, total = number * len(asked) * len(self.seeds), len(self.settings) * len(asked) * len(self.seeds)
        done = 0
        for seed in self.seeds:
            fresh = [metric.fresh_copy().to(device) for metric in metrics]
            # as many batches on all ranks: of a sharded network each has a part
            for first in range(0, share, self.batch_size):
                batch = mine[first : first + self.batch_size]
                captions, indices = zip(*(batch or asked[:1]), strict=True)
                (drawn,) = draw_images(module, data, captions, indices, [setting], seed)
                if not batch:
                    continue
                self._count(tally, fresh, list(drawn.images), captions, indices, seed)
                tally.seconds += drawn.seconds
                done += len(batch) * trainer.world_size
                _show(trainer, benchmark.title, min(drawn_before + done, total), total)
            tally.images += len(asked)
            for i, part in enumerate(fresh):
                tally.metrics[i].merge(part)
                if len(self.seeds) > 1:
                    tally.of_seeds[i].append(float(part.compute()["score"]))  # asks all ranks
        return tally

    def _count(
        self,
        tally: _Tally,
        metrics: Sequence[ImageMetric],
        images: Sequence[NDArray[np.uint8]],
        prompts: Sequence[str],
        indices: Sequence[int],
        seed: int,
    ) -> None:
        began = time.perf_counter()
        for metric in metrics:
            metric.update(images, prompts)
        tally.seconds += time.perf_counter() - began
        names, before = metrics[0].prompts(), self.seeds.index(seed) * self.images_per_prompt
        for row, prompt, index in zip(metrics[0].rows, prompts, indices, strict=True):
            file = f"{names.index(prompt):05d}/samples/{before + index:04d}.png"
            tally.rows.append({"filename": file, **row, "seed": seed})

    def _row(self, tally: _Tally, index: int, module: FlowMapModule, run: str, weights: str) -> ReportRow:
        metric, setting, seeds = tally.metrics[index], tally.setting, tally.of_seeds[index]
        return ReportRow(
            run=run,
            metric=metric.name,
            title=metric.title if index == 0 else f"{metric.title}, images of {tally.benchmark.title}",
            weights=weights,
            step=self._step,
            steps=setting.steps,
            guidance=module.guidance_scale if setting.guidance is None else setting.guidance,
            nfe=module.nfe(setting.steps, setting.guidance),
            images=tally.images,
            seeds=self.seeds,
            scores={name: float(value) for name, value in metric.compute().items()},  # asks all ranks
            seed_spread=float(np.std(seeds, ddof=1)) if len(seeds) > 1 else math.nan,
            seconds=round(tally.seconds, 3),
            settings=metric.settings() | {"images_per_prompt": self.images_per_prompt},
            benchmark=tally.benchmark.name,
        )

    def _about(self, trainer: Trainer) -> dict[str, Any]:
        libraries = {name: version(name) for name in ("torch", "lightning", "diffusers", "transformers")}
        return {
            "checkpoint": str(trainer.ckpt_path or "none"),
            "optimiser steps": self._step,
            "libraries": ", ".join(f"{name} {number}" for name, number in libraries.items()),
        }

    def _publish(self, trainer: Trainer, directory: Path, report: Report) -> None:
        steps_figure(report).savefig(directory / "report.png")
        text = report.markdown() + f"\nreport.md, report.json and report.png: {directory}"
        bar = trainer.progress_bar_callback
        if isinstance(bar, ExperimentProgressBar):
            bar.show_at_end(text)
        else:
            log.info(text)


def _levels(benchmarks: Sequence[ImageMetric]) -> dict[str, dict[str, dict[str, float]]]:
    """Between what a suite's scores lie, where that is known: benchmark -> ceiling or chance -> scores."""
    levels: dict[str, dict[str, dict[str, float]]] = {}
    for benchmark in benchmarks:
        if isinstance(benchmark, SuiteScore):
            known = {"ceiling": benchmark.suite.ceiling(), "chance": benchmark.suite.chance()}
            levels[benchmark.name] = {
                level: scores.values() | {"score": scores.overall} for level, scores in known.items() if scores
            }
    return levels


def _show(trainer: Trainer, title: str, done: int, total: int) -> None:
    bar = trainer.progress_bar_callback
    if isinstance(bar, ExperimentProgressBar):
        bar.show_sampling(f"{title} images", done, total)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
