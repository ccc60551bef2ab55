"""The step-count curves: the same prompts and noise at 1, 2 and 4 steps, judged while training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from emf_lightning.callbacks.charts import Layout, plot_charts
from emf_lightning.callbacks.experiment_progress_bar import ExperimentProgressBar
from emf_lightning.callbacks.fixed_noise_sampling import settings_of
from emf_lightning.callbacks.results_file import write_results
from emf_lightning.callbacks.score_board import Levels, ScoreBoard, Sheet, score_charts
from emf_lightning.callbacks.score_history import ScoreHistory, ScoreRecord
from emf_lightning.callbacks.step_sweep import StepSweep
from emf_lightning.callbacks.suite_evaluation import SuiteEvaluation, evaluate_suite
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.prompt_suite import PromptSuite
from emf_lightning.modules.flow_map import FlowMapModule

log = logging.getLogger(__name__)

SCORES = "scores.jsonl"
"""The history of a run, below its directory and the suite's name."""


class FewStepSampling(Callback):
    """Draws a suite's prompts at several step counts, judges the images, and keeps the curves.

    Runs before the first step, every ``every_n_steps`` optimiser steps, at the end of ``fit``, in ``emf validate`` and,
    where no ``StepSweep`` does it more thoroughly, in ``emf test``. Image i of a prompt starts from the same noise at
    every step count, checkpoint, rank and batch size; training goes on exactly as if nothing had been drawn. Put it
    behind the weight averaging in the list of callbacks, so that it sees the averages of the step just taken. All files
    are in ``<run directory>/<suite>/``.

    Args:
        suite: the prompts and their judge.
        steps: network steps from noise to data, each a curve.
        every_n_steps: optimiser steps between two evaluations.
        images_per_task: judged for each step count while training.
        final_images_per_task: the same at the end of ``fit``, in ``validate`` and in ``test``.
        batch_size: images drawn at once, on each rank.
        guidance: scale of classifier-free guidance, or several: the first one's curves bear the plain tags, the others
            are drawn in the final evaluations only. By default the module's own.
        seed: of the noise.
        at_start: whether to evaluate before the first optimiser step.
        shown_per_task: prompts of each task in the grid of images.
        figures: whether to draw the grid and the figures, which takes some seconds each time.
        reference: ``scores.jsonl`` of another run, e.g. the parent's, to show beside this one's scores.
        reference_name: what to call it.
        also: metrics that are shown the same images, e.g. ``ClipScore``, ``KernelDistance``; each a curve of its own.
    """

    def __init__(
        self,
        suite: PromptSuite,
        steps: Sequence[int] = (1, 2, 4),
        every_n_steps: int = 500,
        images_per_task: int = 20,
        final_images_per_task: int = 100,
        batch_size: int = 128,
        guidance: list[float] | float | None = None,
        seed: int = 0,
        at_start: bool = True,
        shown_per_task: int = 2,
        figures: bool = True,
        reference: Path | None = None,
        reference_name: str = "parent",
        also: list[ImageMetric] | None = None,
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("images_per_task", images_per_task),
            ("final_images_per_task", final_images_per_task),
            ("batch_size", batch_size),
            ("shown_per_task", shown_per_task),
        ):
            if value < 1:
                raise ValueError(f"FewStepSampling: {name} must be at least 1, got {value}")
        self.suite = suite
        self.also = also or []
        self.settings = settings_of(steps, guidance)
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
        """Time spent in here, for those who measure how fast training is."""
        self._last_step = 0
        self._loaded_step = 0

    @property
    def state_key(self) -> str:
        """A state for each suite: a run may watch several."""
        return self._generate_state_key(suite=self.suite.name)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.history.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = ScoreHistory.of(state_dict["records"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def charts(self) -> Layout:
        """Score by training step, a curve for each step count, for TensorBoard's custom scalars."""
        return score_charts(self.suite)

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer)
        self._last_step = trainer.global_step
        self._planned = trainer.estimated_stepping_batches
        if self.at_start and trainer.global_step == 0:
            self._evaluate(trainer, pl_module, "fit")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # stands still while gradients are accumulated
        crossed = step // self.every_n_steps > self._last_step // self.every_n_steps
        self._last_step = step
        if crossed and step != self._planned:  # there the final evaluation follows at once
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

    # -- what ---------------------------------------------------------------------------------------------------------

    def _evaluate(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        assert isinstance(module, FlowMapModule)
        began, name, final = time.perf_counter(), self.suite.name, stage != "fit"
        step = max(trainer.global_step, self._loaded_step)  # outside fit, Lightning counts no steps
        settings = [s for s in self.settings if final or s.guidance == self.settings[0].guidance]
        wanted = self.final_images_per_task if final else self.images_per_task
        evaluations = evaluate_suite(
            trainer,
            module,
            self.suite,
            settings,
            images_per_task=1 if trainer.fast_dev_run else wanted,  # type: ignore[attr-defined]
            shown_per_task=self.shown_per_task,
            batch_size=self.batch_size,
            seed=self.seed,
            report=lambda done, total: self._report(trainer, done, total),
            also=self.also,
        )
        records = [self._record(evaluation, module, stage, step) for evaluation in evaluations]
        self.history.add(records)
        for record in records:  # for ModelCheckpoint(monitor=...) and its like
            numbers = record.scores.values() | record.also
            values = {f"eval/{name}/{key}/{record.label}": value for key, value in numbers.items()}
            trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in values.items()})
        if trainer.is_global_zero:
            self._publish(trainer, evaluations, records, time.perf_counter() - began)
        self.seconds += time.perf_counter() - began

    def _record(self, evaluation: SuiteEvaluation, module: FlowMapModule, stage: str, step: int) -> ScoreRecord:
        setting = evaluation.setting
        return ScoreRecord(
            suite=self.suite.name,
            stage=stage,
            step=step,
            label=setting.label,
            steps=setting.steps,
            guidance=module.guidance_scale if setting.guidance is None else setting.guidance,
            nfe=module.nfe(setting.steps, setting.guidance),
            seconds=round(evaluation.seconds, 3),
            scores=evaluation.scores,
            also=evaluation.also,
        )

    # -- where --------------------------------------------------------------------------------------------------------

    def _open(self, trainer: Trainer) -> None:
        """Finds the curves of the run that this one carries on, and plots those that are not here yet."""
        name = self.suite.name
        directory = Path(trainer.log_dir or trainer.default_root_dir) / name  # asks all ranks
        levels = Levels(self.suite.ceiling(), self.suite.chance(), self.reference, self.reference_name)
        here = ScoreHistory.read_if_there(directory / SCORES)
        fitting = trainer.state.fn == TrainerFn.FITTING
        # what this run directory knows of the time after a resumed checkpoint is about to be done again
        known = [record for record in here.records if not fitting or record.step <= trainer.global_step]
        keys = {record.key for record in known}
        elsewhere = [record for record in self.history.records if record.key not in keys]
        self.history = ScoreHistory([*elsewhere, *known])
        writers = []
        if trainer.is_global_zero:
            writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self._board = ScoreBoard(directory, name, levels, writers)
        plot_charts(trainer)
        if fitting:
            self._board.plot(elsewhere)

    def _publish(
        self, trainer: Trainer, evaluations: Sequence[SuiteEvaluation], records: Sequence[ScoreRecord], seconds: float
    ) -> None:
        board, last = self._board, records[-1]
        for evaluation, record in zip(evaluations, records, strict=True):
            path = board.directory / "results" / f"{record.stage}-{record.step:07d}-{record.label}.jsonl"
            drawing = {"step": record.step, "steps": record.steps, "nfe": record.nfe, "guidance": record.guidance}
            write_results(path, evaluation.judged, drawing, self.suite.prompts())
        self.history.write(board.directory / SCORES)
        board.plot(records)
        if self.figures:
            board.show(records, _sheet(evaluations))
            if last.stage in ("fit", "final") and len(self.history.curve(last.label)) > 1:
                board.show_curves(self.history, records)
        scores = {record.label.replace("step", ""): record.scores.overall for record in records}
        shares, images = " / ".join(f"{score:.3f}" for score in scores.values()), sum(last.scores.images.values())
        counts = "/".join(scores)
        sentence = f"step {last.step}: {counts} network steps score {shares} ({images} images each, {seconds:.0f} s)"
        bar = trainer.progress_bar_callback
        if isinstance(bar, ExperimentProgressBar):
            bar.show_scores(scores, sentence)
        else:
            log.info(sentence)
        if last.stage == "fit":
            return
        table = f"{self.suite.name}, step {last.step}\n{board.table(records)}"
        if isinstance(bar, ExperimentProgressBar):
            bar.show_at_end(table)
        else:
            log.info(table)

    def _report(self, trainer: Trainer, done: int, total: int) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, ExperimentProgressBar):
            bar.show_sampling(f"{self.suite.name} images", done, total)


def _sheet(evaluations: Sequence[SuiteEvaluation]) -> Sheet:
    """The images that were kept, a column for each way of drawing."""
    columns = [(e.setting.heading, [image for image in e.judged if image.image is not None]) for e in evaluations]
    return Sheet(
        prompts=[image.asked.prompt.prompt for image in columns[0][1]],
        images={heading: np.stack([i.image for i in kept if i.image is not None]) for heading, kept in columns},
        correct={heading: [i.judgement.correct for i in kept] for heading, kept in columns},
    )
