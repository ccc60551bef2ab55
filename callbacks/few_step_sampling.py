"""Step-count curves: images of the same prompts and noise at 1, 2 and 4 steps, scored during training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from emf_lightning.callbacks.experiment_progress_bar import progress_bar, show_line, show_progress
from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.callbacks.scores.custom_scalars import Layout, write_custom_scalars
from emf_lightning.callbacks.scores.score_board import ScoreBoard, score_charts
from emf_lightning.callbacks.scores.score_history import ScoreHistory, ScoreRecord
from emf_lightning.callbacks.scores.scored_images import ScoredImages, sample_and_score
from emf_lightning.callbacks.step_sweep import StepSweep
from emf_lightning.evaluation.geneval.prompt_suite import PromptImage, PromptSuite
from emf_lightning.evaluation.geneval.suite_score import SuiteScore, sample_path
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.sampling_config import sampling_configs
from emf_lightning.files import write_json_lines
from emf_lightning.modules.flow_map import FlowMapModule

SCORES = "scores.jsonl"
"""File of a run's score history, in ``<run directory>/<suite>/``."""


class FewStepSampling(Callback):
    """Samples a suite's prompts at several step counts, evaluates the images, and logs the scores as curves.

    It runs before the first step, every ``every_n_steps`` optimiser steps, at the end of ``fit``, in ``emf validate``
    and, without a ``StepSweep``, in ``emf test``. Image i of a prompt starts from the same noise at every step count,
    checkpoint, rank and batch size. Training is the same with and without this callback. List it after the weight
    averaging, so that it samples with the averages of the step just taken. All files are in
    ``<run directory>/<suite>/``.

    Args:
        suite: prompts and their evaluation.
        steps: network steps from noise to data, each a curve.
        every_n_steps: optimiser steps between two evaluations.
        images_per_task: images of each task and step count during training.
        final_images_per_task: the same at the end of ``fit``, in ``validate`` and in ``test``.
        batch_size: images sampled at once, on each rank.
        guidance_scale: scale of classifier-free guidance, or several: the first is the main one, whose tags leave out
            the scale; the others are sampled in the final evaluations only. By default the module's own.
        seed: seed of the noise.
        at_start: whether to evaluate before the first optimiser step.
        shown_per_task: prompts of each task in the contact sheet.
        figures: whether to plot the contact sheet and the figures, which takes some seconds each time.
        reference: ``scores.jsonl`` of another run, e.g. the parent's, to show beside this one's scores.
        reference_name: name of that run in figures and tables.
        extra_metrics: further metrics of the same images, e.g. ``ClipScore``, ``KernelDistance``; each gets a curve.
    """

    def __init__(
        self,
        suite: PromptSuite,
        steps: Sequence[int] = (1, 2, 4),
        every_n_steps: int = 500,
        images_per_task: int = 20,
        final_images_per_task: int = 100,
        batch_size: int = 128,
        guidance_scale: list[float] | float | None = None,
        seed: int = 0,
        at_start: bool = True,
        shown_per_task: int = 2,
        figures: bool = True,
        reference: Path | None = None,
        reference_name: str = "parent",
        extra_metrics: list[ImageMetric] | None = None,
    ) -> None:
        counts = {"every_n_steps": every_n_steps, "images_per_task": images_per_task, "batch_size": batch_size}
        counts |= {"final_images_per_task": final_images_per_task, "shown_per_task": shown_per_task}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"FewStepSampling: {name} must be at least 1, got {value}")
        self.suite = suite
        self.extra_metrics = extra_metrics or []
        self.configs = sampling_configs(steps, guidance_scale)
        self.every_n_steps = every_n_steps
        self.images_per_task = images_per_task
        self.final_images_per_task = final_images_per_task
        self.batch_size = batch_size
        self.seed = seed
        self.at_start = at_start
        self.shown_per_task = shown_per_task
        self.figures = figures
        self.reference_name = reference_name
        self.reference: tuple[ScoreRecord, ...] = ()
        if reference is not None:
            self.reference = tuple(ScoreHistory.read(reference, "FewStepSampling: reference").latest())
        self.history = ScoreHistory()
        self.seconds = 0.0
        """Time spent in this callback, which ``TrainingLog`` subtracts from the training time."""
        self._last_step = 0
        self._loaded_step = 0

    @property
    def state_key(self) -> str:
        """One state for each suite: a run may have several of these callbacks."""
        return self._generate_state_key(suite=self.suite.name)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.history.to_rows()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = ScoreHistory.from_rows(state_dict["records"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def custom_scalars(self) -> Layout:
        """Charts of the score by training step, a curve for each step count."""
        return score_charts(self.suite)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer)
        self._last_step = trainer.global_step
        self._planned = trainer.estimated_stepping_batches
        if self.at_start and trainer.global_step == 0:
            self._evaluate(trainer, pl_module, "fit")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step  # constant while gradients accumulate
        crossed = step // self.every_n_steps > self._last_step // self.every_n_steps
        self._last_step = step
        if crossed and step != self._planned:  # on_train_end evaluates the last step
            self._evaluate(trainer, pl_module, "fit")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module, "final")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._open(trainer)
            self._evaluate(trainer, pl_module, "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(isinstance(callback, StepSweep) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._open(trainer)
            self._evaluate(trainer, pl_module, "test")

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def _evaluate(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        assert isinstance(module, FlowMapModule)
        began, name, final = time.perf_counter(), self.suite.name, stage != "fit"
        step = max(trainer.global_step, self._loaded_step)  # outside fit, Lightning counts no steps
        configs = [config for config in self.configs if final or config.is_main]
        count = self.final_images_per_task if final else self.images_per_task
        asked = self.suite.images(1 if trainer.fast_dev_run else count)  # type: ignore[attr-defined]
        requested = _requests(asked)
        with sampling_context(trainer, module):
            results = sample_and_score(
                trainer,
                module,
                [SuiteScore(self.suite), *self.extra_metrics],
                requested,
                configs,
                batch_size=self.batch_size,
                seed=self.seed,
                on_progress=lambda done: show_progress(trainer, f"{name} images", done, len(requested) * len(configs)),
                kept=_requests(self.suite.images(self.shown_per_task)),
            )
        records = [self._record(result, module, stage, step) for result in results]
        self.history.add(records)
        for record in records:  # ModelCheckpoint(monitor=...) reads them
            tag = record.sampling.tag
            values = {f"eval/{name}/{key}/{tag}": value for key, value in record.values().items()}
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        if trainer.is_global_zero:
            self._publish(trainer, asked, results, records, time.perf_counter() - began)
        self.seconds += time.perf_counter() - began

    def _record(self, result: ScoredImages, module: FlowMapModule, stage: str, step: int) -> ScoreRecord:
        sampling, seconds = result.config.resolve(module.guidance_scale), round(result.seconds, 3)
        nfe = module.nfe(sampling.steps, sampling.guidance_scale)
        suite_score, *extra = result.metrics
        assert isinstance(suite_score, SuiteScore)
        scores = suite_score.task_scores()  # a collective of all ranks, as are the further metrics
        extra_scores = {metric.name: float(metric.compute()["score"]) for metric in extra}
        return ScoreRecord(self.suite.name, stage, step, sampling, nfe, seconds, scores, extra_scores)

    # -- output -------------------------------------------------------------------------------------------------------

    def _open(self, trainer: Trainer) -> None:
        """Joins the scores of a resumed run with those in the run directory, and logs those that are missing there."""
        directory = Path(trainer.log_dir or trainer.default_root_dir) / self.suite.name  # a collective of all ranks
        here = ScoreHistory.read_if_there(directory / SCORES)
        fitting = trainer.state.fn == TrainerFn.FITTING
        # evaluations after the step of a resumed checkpoint are about to be repeated
        known = [record for record in here.records if not fitting or record.step <= trainer.global_step]
        keys = {record.key for record in known}
        elsewhere = [record for record in self.history.records if record.key not in keys]
        self.history = ScoreHistory([*elsewhere, *known])
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self._board = ScoreBoard(directory, self.suite, self.reference, self.reference_name, writers)
        write_custom_scalars(trainer)
        if fitting:
            self._board.add_scalars(elsewhere)

    def _publish(
        self,
        trainer: Trainer,
        asked: Sequence[PromptImage],
        results: Sequence[ScoredImages],
        records: Sequence[ScoreRecord],
        seconds: float,
    ) -> None:
        board, last = self._board, records[-1]
        for result, record in zip(results, records, strict=True):
            path = board.directory / "results" / f"{record.stage}-{record.step:07d}-{record.sampling.tag}.jsonl"
            sampling = json.dumps({"step": record.step, "nfe": record.nfe, **asdict(record.sampling)})
            files = [sample_path(image.number, image.index) for image in asked]
            rows = zip(files, result.images, strict=True)
            write_json_lines(path, [{"filename": file, **image.row, "sampling": sampling} for file, image in rows])
        self.history.write(board.directory / SCORES)
        board.add_scalars(records)
        if self.figures:
            board.add_images(records, results)
            if last.stage in ("fit", "final") and len(self.history.curve(last.sampling)) > 1:
                board.add_training_curves(self.history, records)
        scores = {record.sampling.short_title: record.scores.overall for record in records}
        shares, images = " / ".join(f"{score:.3f}" for score in scores.values()), sum(last.scores.images.values())
        if bar := progress_bar(trainer):
            bar.show_scores(scores)
        found = f"{'/'.join(scores)} network steps score {shares} ({images} images each, {seconds:.0f} s)"
        show_line(trainer, f"step {last.step}: {found}")
        if last.stage != "fit":
            show_line(trainer, f"{self.suite.name}, step {last.step}\n{board.table(records)}", at_end=True)


def _requests(images: Sequence[PromptImage]) -> list[tuple[str, int]]:
    """Prompt and number of each image; those for a smaller number of images are among those for a larger one."""
    return [(image.prompt.prompt, image.index) for image in images]
