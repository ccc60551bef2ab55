"""Step-count curves: images of the same prompts and noise at 1, 2 and 4 steps, drawn and scored during training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from emf_lightning.callbacks.experiment_progress_bar import progress_bar, show_line, show_progress
from emf_lightning.callbacks.loggers.run_directory import run_directory
from emf_lightning.callbacks.loggers.score_log import ScoreLog
from emf_lightning.callbacks.sampling.image_generation import data_of
from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.callbacks.scores.score_board import ScoreBoard
from emf_lightning.callbacks.scores.scored_images import ScoredImages, sample_and_score
from emf_lightning.callbacks.step_sweep import StepSweep
from emf_lightning.evaluation.geneval.prompt_suite import PromptSuite
from emf_lightning.evaluation.geneval.suite_score import SuiteScore, sample_path
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.own_prompts import OwnPrompts, ValidationCaptions, chosen_benchmarks
from emf_lightning.evaluation.sampling_config import SamplingConfig, sampling_configs
from emf_lightning.evaluation.score_history import ScoreHistory, ScoreRecord
from emf_lightning.files import write_json_lines
from emf_lightning.flow.sampling import EulerSampler
from emf_lightning.modules.flow_map import FlowMapModule

SCORES = "scores.jsonl"
"""File of a run's score history, in ``<run directory>/<name of the benchmark>/``."""
DRAWN, DRAWN_FINALLY = 20, 100
"""Images of each task during training, and in the final evaluations."""


class FewStepSampling(Callback):
    """Samples prompts at several step counts, and logs what metrics find in the images as curves.

    It runs before the first step, every ``every_n_steps`` optimiser steps, at the end of ``fit``, in ``emf validate``
    and, without a ``StepSweep``, in ``emf test``. Image i of a prompt starts from the same noise at every step count,
    checkpoint, rank and batch size. Training is the same with and without this callback. List it after the weight
    averaging, so that it samples with the averages of the step just taken. All files are in
    ``<run directory>/<name of the benchmark>/``.

    The prompts are those of ``benchmarks``, as in ``StepSweep``, and of ``prompts``. Where neither is given, they are
    captions of the first validation samples. Prompts alone have no verdicts: there is a contact sheet, and a curve for
    each of ``extra_metrics``, if any.

    Args:
        suite: short for one ``SuiteScore`` among ``benchmarks``.
        steps: network steps from noise to data, each a curve.
        every_n_steps: optimiser steps between two evaluations.
        images_per_task: images of each task and step count during training; a benchmark without tasks is one task. By
            default 20, and of ``prompts`` one image each.
        final_images_per_task: the same at the end of ``fit``, in ``validate`` and in ``test``. By default 100, and of
            ``prompts`` one image each.
        batch_size: images sampled at once, on each rank.
        guidance_scale: scale of classifier-free guidance, or several: the first is the main one, whose tags leave out
            the scale; the others are sampled in the final evaluations only. By default the module's own.
        seed: seed of the noise.
        at_start: whether to evaluate before the first optimiser step.
        shown_per_task: images of each task in the contact sheet; by default 2 of each where there are several tasks,
            else 40.
        figures: whether to plot the contact sheet and the figures, which takes some seconds each time.
        reference: ``scores.jsonl`` of another run, e.g. the parent's, to show beside this one's scores.
        reference_name: name of that run in figures and tables.
        extra_metrics: further metrics of the same images, e.g. ``ClipScore``, ``KernelDistance``; each gets a curve.
        benchmarks: metrics with prompts of their own, e.g. ``SuiteScore`` with a suite, ``DpgBench``, ``HpsScore``.
        prompts: text file in UTF-8 with one prompt a line, or a list of prompts.
        parent_steps: adds a column to the contact sheet: the same noise in that many steps of the weights that the run
            starts from, sampled once before the first step, with the guidance scale of ``reference`` where it has that
            step count. For runs that start from a flow-matching model; 0 adds none.

    Raises:
        ValueError: for numbers below 1, two benchmarks of one name, or unusable prompts; at the start, where the
            captions of validation samples are wanted and there are none.
    """

    def __init__(
        self,
        suite: PromptSuite | None = None,
        steps: Sequence[int] = (1, 2, 4),
        every_n_steps: int = 500,
        images_per_task: int | None = None,
        final_images_per_task: int | None = None,
        batch_size: int = 128,
        guidance_scale: list[float] | float | None = None,
        seed: int = 0,
        at_start: bool = True,
        shown_per_task: int | None = None,
        figures: bool = True,
        reference: Path | None = None,
        reference_name: str = "parent",
        extra_metrics: list[ImageMetric] | None = None,
        benchmarks: list[ImageMetric] | None = None,
        prompts: Path | list[str] | None = None,
        parent_steps: int = 0,
    ) -> None:
        counts = {"every_n_steps": every_n_steps, "images_per_task": images_per_task, "batch_size": batch_size}
        counts |= {"final_images_per_task": final_images_per_task, "shown_per_task": shown_per_task}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"FewStepSampling: {name} must be at least 1, got {value}")
        if parent_steps < 0:
            raise ValueError(f"FewStepSampling: parent_steps must be at least 1, or 0 for none, got {parent_steps}")
        of_suite = [] if suite is None else [SuiteScore(suite)]
        self.benchmarks = chosen_benchmarks(
            "FewStepSampling", [*of_suite, *(benchmarks or [])], prompts, extra_metrics or []
        )
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
        self.reference = ScoreHistory()
        if reference is not None:
            self.reference = ScoreHistory.read(reference, "FewStepSampling: reference")
        self.parent_steps = parent_steps
        self.history = ScoreHistory()
        self.seconds = 0.0
        """Time spent in this callback, which ``TrainingLog`` subtracts from the training time."""
        self._key = "+".join(benchmark.name for benchmark in self.benchmarks) or ValidationCaptions.name
        self._last_step = 0
        self._loaded_step = 0

    @property
    def state_key(self) -> str:
        """One state for each choice of benchmarks: a run may have several of these callbacks."""
        return self._generate_state_key(suite=self._key)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.history.to_rows()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = ScoreHistory.from_rows(state_dict["records"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._planned = trainer.estimated_stepping_batches
        self._open(trainer)
        if self.parent_steps and self.figures and trainer.global_step == 0:
            self._draw_parent(trainer, pl_module)
        self._last_step = trainer.global_step
        if self.at_start and trainer.global_step == 0:
            self._evaluate(trainer, pl_module, "fit")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, before = trainer.global_step, self._last_step  # constant while gradients accumulate
        due = step // self.every_n_steps > before // self.every_n_steps
        self._last_step = step
        if step == self._planned:  # on_train_end evaluates it, after a checkpoint that monitors a score has been saved
            due = step > before and _monitored(trainer)
        if due:
            self._evaluate(trainer, pl_module, "fit")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module, "final")
        self._loaded_step = trainer.global_step  # of the weights that the module has now

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
        fitting = trainer.state.fn == TrainerFn.FITTING  # Lightning counts steps there alone
        step = trainer.global_step if fitting else self._loaded_step or trainer.global_step
        for benchmark in self.benchmarks:
            began = time.perf_counter()
            results = self._sample(trainer, module, benchmark, stage)
            records = [self._record(result, module, stage, step) for result in results]
            self.history.add(records)
            _offer(trainer, records)
            if trainer.is_global_zero:
                self._publish(trainer, benchmark, results, records, time.perf_counter() - began)
            self.seconds += time.perf_counter() - began

    def _sample(
        self, trainer: Trainer, module: FlowMapModule, benchmark: ImageMetric, stage: str
    ) -> list[ScoredImages]:
        final, requested = stage != "fit", _requests(benchmark, self._asked(trainer, benchmark, stage))
        configs, total = [config for config in self.configs if final or config.is_main], len(requested)
        with sampling_context(trainer, module):
            return sample_and_score(
                trainer,
                module,
                [benchmark, *self.extra_metrics],
                requested,
                configs,
                batch_size=self.batch_size,
                seed=self.seed,
                on_progress=lambda n: show_progress(trainer, f"{benchmark.name} images", n, total * len(configs)),
                kept=self._shown(benchmark),
            )

    def _asked(self, trainer: Trainer, benchmark: ImageMetric, stage: str) -> list[tuple[int, int]]:
        """The prompt's place and the number of each image; those of training are among those of the end."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return benchmark.requests(2)  # the least number that has a distance or a spread
        count = self.images_per_task if stage == "fit" else self.final_images_per_task
        usual = len(benchmark.prompts()) if benchmark.draws_all else DRAWN if stage == "fit" else DRAWN_FINALLY
        return benchmark.requests(count or usual)

    def _shown(self, benchmark: ImageMetric) -> list[tuple[str, int]]:
        """The images in the contact sheet, if they are sampled."""
        shown = self.shown_per_task or (2 if len(benchmark.tasks()) > 1 else 40)
        return _requests(benchmark, benchmark.requests(shown))

    def _record(self, result: ScoredImages, module: FlowMapModule, stage: str, step: int) -> ScoreRecord:
        sampling, seconds = result.config.resolve(module.guidance_scale), round(result.seconds, 3)
        nfe = module.nfe(sampling.steps, sampling.guidance_scale)
        benchmark, *extra = result.metrics
        # collectives of all ranks
        verdicts = benchmark.task_scores() if isinstance(benchmark, SuiteScore) else None
        scored = extra if isinstance(benchmark, (SuiteScore, OwnPrompts)) else [benchmark, *extra]
        metrics = {metric.name: MetricScores.compute(metric) for metric in scored}
        count = len(result.images)
        return ScoreRecord(benchmark.name, stage, step, sampling, nfe, seconds, verdicts, metrics, count)

    # -- output -------------------------------------------------------------------------------------------------------

    def _open(self, trainer: Trainer) -> None:
        """Joins the scores of a resumed run with those in the run directory, and logs those that are missing there."""
        began, data = time.perf_counter(), data_of(trainer)
        run = run_directory(trainer)  # a collective of all ranks
        if not self.benchmarks:
            count = max(self.images_per_task or DRAWN, self.final_images_per_task or DRAWN_FINALLY)
            self.benchmarks = [ValidationCaptions(data, count)]
        for metric in (*self.benchmarks, *self.extra_metrics):
            metric.use_data(data)
        fitting = trainer.state.fn == TrainerFn.FITTING
        for benchmark in self.benchmarks if not trainer.fast_dev_run else []:  # type: ignore[attr-defined]
            for stage in ("fit", "final") if fitting else ("final",):
                prompts = [prompt for prompt, _ in _requests(benchmark, self._asked(trainer, benchmark, stage))]
                for metric in (benchmark, *self.extra_metrics):
                    metric.check_requests(prompts)
                    if stage == "final":  # during training fewer images are enough for a curve
                        metric.check_count(len(prompts))
        histories = [ScoreHistory.read_if_there(run / benchmark.name / SCORES) for benchmark in self.benchmarks]
        # evaluations after the step of a resumed checkpoint are about to be repeated
        here = [record for history in histories for record in history.records]
        known = [record for record in here if not fitting or record.step <= trainer.global_step]
        keys = {record.key for record in known}
        elsewhere = sorted([*self._of_resumed_run(trainer), *self.history.records], key=lambda record: record.step)
        self.history = ScoreHistory([*(record for record in elsewhere if record.key not in keys), *known])
        # the scores of the step that a checkpoint was saved at are there, unless they are about to be repeated
        first = trainer.global_step + (0 < trainer.global_step < self._planned) if fitting else None
        log, self._boards = ScoreLog(trainer, first), {}
        for benchmark in self.benchmarks:
            reference, title = self.reference.of(benchmark.name).latest(), "/".join(run.parts[-3:])
            board = ScoreBoard(run / benchmark.name, benchmark, reference, self.reference_name, log, title)
            self._boards[benchmark.name] = board
            if fitting:  # a checkpoint may be due before the next evaluation
                _offer(trainer, self.history.of(benchmark.name).latest())
            if fitting and trainer.is_global_zero:
                board.go_on(self.history.of(benchmark.name).records, ScoreHistory(known).of(benchmark.name).records)
        self.seconds += time.perf_counter() - began

    def _of_resumed_run(self, trainer: Trainer) -> list[ScoreRecord]:
        """Records beside the checkpoint that ``fit`` resumes: a run's last step is scored after it was saved."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.ckpt_path:
            return []
        run = Path(trainer.ckpt_path).parent.parent
        histories = [ScoreHistory.read_if_there(run / benchmark.name / SCORES) for benchmark in self.benchmarks]
        records = [record for history in histories for record in history.records]
        return [record for record in records if record.step <= trainer.global_step]

    def _draw_parent(self, trainer: Trainer, module: LightningModule) -> None:
        """Samples the contact sheet's images with the parent's weights, and keeps them in files."""
        assert isinstance(module, FlowMapModule)
        began = time.perf_counter()
        for benchmark in self.benchmarks:
            known = [r.sampling for r in self.reference.of(benchmark.name).latest() if r.sampling.is_main]
            scale = next((config.guidance_scale for config in known if config.steps == self.parent_steps), None)
            config = SamplingConfig(self.parent_steps, scale).resolve(module.guidance_scale)
            shown = self._shown(benchmark)
            requested = [one for one in _requests(benchmark, self._asked(trainer, benchmark, "final")) if one in shown]
            total = len(requested)
            teacher = getattr(module, "teacher", None)  # where there is one, the network itself may start further on
            start = None if teacher is None else teacher.on(module.device)
            with sampling_context(trainer, module), module.sampling_with(EulerSampler(), start):
                (result,) = sample_and_score(
                    trainer,
                    module,
                    [OwnPrompts([prompt or "-" for prompt, _ in requested])],
                    requested,
                    [config],
                    batch_size=self.batch_size,
                    seed=self.seed,
                    on_progress=partial(show_progress, trainer, f"{self.reference_name}'s images", total=total),
                    kept=shown,
                )
            if trainer.is_global_zero:
                self._boards[benchmark.name].keep_parent(result)
        self.seconds += time.perf_counter() - began

    def _publish(
        self,
        trainer: Trainer,
        benchmark: ImageMetric,
        results: Sequence[ScoredImages],
        records: Sequence[ScoreRecord],
        seconds: float,
    ) -> None:
        board, last, history = self._boards[benchmark.name], records[-1], self.history.of(benchmark.name)
        asked = self._asked(trainer, benchmark, last.stage)
        for result, record in zip(results, records, strict=True):
            path = board.directory / "results" / f"{record.stage}-{record.step:07d}-{record.sampling.tag}.jsonl"
            sampling = json.dumps({"step": record.step, "nfe": record.nfe, **asdict(record.sampling)})
            files = [sample_path(place, index) for place, index in asked]
            rows = zip(files, result.images, strict=True)
            write_json_lines(path, [{"filename": file, **image.row, "sampling": sampling} for file, image in rows])
        history.write(board.directory / SCORES)
        # an evaluation of a trained run makes no second point at its step
        of_training = last.stage in ("fit", "final")
        board.add_scalars(records, to_files=of_training or not history.curve(last.sampling))
        if self.figures:
            board.add_contact_sheet(records, results)
            board.add_step_counts(records)
            if of_training and len(history.curve(last.sampling)) > 1:
                board.add_training_curves(history, records)
        if last.results and (bar := progress_bar(trainer)):
            main = next(iter(last.results))
            scores = {record.sampling.short_title: record.results[main].score for record in records}
            bar.show_scores(scores, "scores" if last.scores else main, benchmark.name)
        show_line(trainer, f"step {last.step}: {_summary(records)} ({last.images} images each, {seconds:.0f} s)")
        if last.stage != "fit" and (table := board.table(records)):
            show_line(trainer, f"{benchmark.name}, step {last.step}\n{table}", at_end=True)


def _summary(records: Sequence[ScoreRecord]) -> str:
    """Every metric's main numbers in one line."""
    parts: list[str] = []
    for name, found in records[-1].results.items():
        numbers = " / ".join(record.results[name].text() for record in records)
        parts.append(f"score {numbers}" if records[-1].scores and not parts else f"{found.title} {numbers}")
    titles = "/".join(record.sampling.short_title for record in records)
    return f"{titles} network steps {', '.join(parts) or 'drawn'}"


def _requests(benchmark: ImageMetric, asked: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
    """Prompt and number of each image."""
    prompts = benchmark.prompts()
    return [(prompts[place], index) for place, index in asked]


def _offer(trainer: Trainer, records: Sequence[ScoreRecord]) -> None:
    """Gives scores to ``ModelCheckpoint(monitor=...)``."""
    for record in records:
        values = {f"eval/{record.suite}/{key}/{record.sampling.tag}": value for key, value in record.values().items()}
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def _monitored(trainer: Trainer) -> bool:
    """Whether a ``ModelCheckpoint`` keeps the checkpoints of the best scores."""
    return any(str(getattr(callback, "monitor", None)).startswith("eval/") for callback in trainer.checkpoint_callbacks)
