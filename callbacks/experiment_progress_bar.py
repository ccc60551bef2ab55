"""Progress of a run: bars in a terminal, lines in a log file."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.types import STEP_OUTPUT

from emf_lightning.callbacks.loggers.run_directory import run_directory

log = logging.getLogger(__name__)

SHOWN = {
    "train/images_per_second": "img/s",
    "train/mse_r_equals_t": "mse r=t",
    "train/mse_r_below_t": "mse r<t",
    "train/velocity_gap": "|u-v|^2",
    "train/online_flow_mse": "online flow mse",
    "train/consistency": "consistency",
    "train/discriminator_accuracy": "discriminator",
}
"""Logged tag -> name in the bar; tags that a run does not log are left out."""


class ExperimentProgressBar(TQDMProgressBar):
    """Shows optimiser steps, images/s, the two raw errors and the last scores; at the end, the paths of all outputs.

    A terminal gets Lightning's tqdm bars, a file, a pipe or a CI log gets a line every ``seconds_between_lines``.

    Args:
        refresh_rate: batches between two updates of a bar; 0 shows nothing.
        seconds_between_lines: seconds between two lines without a terminal.
        leave: whether a finished bar stays on the screen.
    """

    def __init__(self, refresh_rate: int = 5, seconds_between_lines: float = 20.0, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self.seconds_between_lines = seconds_between_lines
        self._terminal = sys.stdout.isatty()
        self._last_line = float("-inf")
        self._began = (0.0, 0)
        self._scores: dict[str, tuple[str, str]] = {}
        self._closing: list[str] = []
        self._sampling: Tqdm | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether bars are shown; without a terminal there are lines instead."""
        return super().is_enabled and self._terminal

    # -- called by other callbacks ------------------------------------------------------------------------------------

    def show_sampling(self, title: str, done: int, total: int) -> None:
        """Shows the progress of an evaluation: ``done`` of ``total`` images."""
        if not self.is_enabled:
            self._write_line_at_interval(f"{title}: {done}/{total} images", last=False)
            return
        if self._sampling is None:
            self._sampling = Tqdm(total=total, position=1, leave=False, file=sys.stdout, dynamic_ncols=True, unit="img")
        self._sampling.set_description(title, refresh=False)
        self._sampling.n = done
        self._sampling.refresh()
        if done >= total:
            self._sampling.close()
            self._sampling = None

    def show_scores(self, scores: Mapping[str, float], name: str = "scores", benchmark: str = "") -> None:
        """Shows ``scores`` (step count -> main number of the metric ``name``) in the bar, in place of the last ones."""
        numbers = " ".join(f"{score:.2f}".removeprefix("0") for score in scores.values())  # .42 rather than 0.42
        self._scores[benchmark] = name, f"{'/'.join(scores)} {numbers}"

    def show_at_end(self, text: str) -> None:
        """Writes ``text`` at the end of the run, above the last line."""
        self._closing.append(text)

    def write_line(self, text: str) -> None:
        """Writes ``text`` on lines of its own."""
        if self._enabled and self.refresh_rate > 0:
            Tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # type: ignore[override]
        self._began = (time.perf_counter(), trainer.global_step)
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # type: ignore[override]
        bar = self.train_progress_bar
        if bar.total is None:  # one bar for all epochs, in optimiser steps
            bar.initial = bar.n = trainer.global_step
            bar.total = _planned(trainer)
            bar.set_description("train")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        step, planned = trainer.global_step, _planned(trainer)
        if self._should_update(batch_idx + 1, self.total_train_batches):  # type: ignore[arg-type]
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix_str(self._numbers(trainer))
        elif not self.is_enabled:
            self._write_line_at_interval(self._training_line(trainer, step, planned), last=step == planned)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the bar, which counts the steps of all epochs."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_validation_batch_end(*args, **kwargs)
        self._batch_line("validation", args, self.total_val_batches_current_dataloader)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_test_batch_end(*args, **kwargs)
        self._batch_line("test", args, self.total_test_batches_current_dataloader)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_predict_batch_end(*args, **kwargs)
        self._batch_line("predict", args, self.total_predict_batches_current_dataloader)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run = run_directory(trainer)  # a collective of all ranks
        for text in [*self._closing, *_outputs(trainer, run)]:
            self.write_line(text)
        self._closing.clear()

    # -- lines --------------------------------------------------------------------------------------------------------

    def _write_line_at_interval(self, line: str, *, last: bool) -> None:
        if last or time.perf_counter() - self._last_line >= self.seconds_between_lines:
            self._last_line = time.perf_counter()
            self.write_line(line)

    def _batch_line(self, stage: str, arguments: tuple[Any, ...], total: float) -> None:
        if not self.is_enabled:
            done = arguments[4] + 1
            of_all = f"{done}/{total:g} batches" if math.isfinite(total) else f"{done} batches"
            self._write_line_at_interval(f"{stage}: {of_all}", last=done == total)

    def _training_line(self, trainer: Trainer, step: int, planned: int | None) -> str:
        began, first = self._began
        parts = [f"step {step}" if planned is None else f"step {step}/{planned} ({100 * step // planned} %)"]
        if planned is not None and step > first:
            left = (time.perf_counter() - began) / (step - first) * (planned - step)
            parts.append(f"{Tqdm.format_interval(left)} left")
        return ", ".join([*parts, *filter(None, [self._numbers(trainer)])])

    def _numbers(self, trainer: Trainer) -> str:
        logged = trainer.callback_metrics
        shown = [f"{name} {float(logged[tag]):.3g}" for tag, name in SHOWN.items() if tag in logged]
        several = len(self._scores) > 1  # benchmarks: each is named
        for benchmark, (name, numbers) in self._scores.items():
            title = name if benchmark in ("", name) or not several else f"{benchmark} {name}"
            shown.append(f"{title} {numbers}")
        return ", ".join(shown)


def progress_bar(trainer: Trainer) -> ExperimentProgressBar | None:
    """The trainer's progress bar, if it is one of this class."""
    bar = trainer.progress_bar_callback
    return bar if isinstance(bar, ExperimentProgressBar) else None


def show_progress(trainer: Trainer, title: str, done: int, total: int) -> None:
    """Shows that ``done`` of ``total`` images are sampled, if there is a bar."""
    if bar := progress_bar(trainer):
        bar.show_sampling(title, done, total)


def show_line(trainer: Trainer, text: str, *, at_end: bool = False) -> None:
    """Writes ``text`` above the progress bar, or at the end of the run; to the log where there is no bar."""
    bar = progress_bar(trainer)
    write = log.info if bar is None else bar.show_at_end if at_end else bar.write_line
    write(text)


def _planned(trainer: Trainer) -> int | None:
    planned = trainer.estimated_stepping_batches
    return int(planned) if planned not in (-1, float("inf")) else None


def _outputs(trainer: Trainer, run: Path) -> list[str]:
    """Paths of the run, of its curves, its pictures and the checkpoint to use, a line each, where they exist."""
    lines = [f"run: {run}"]
    if any(run.rglob("events.out.tfevents.*")):
        lines.append(f"curves: {shlex.join(['tensorboard', '--logdir', str(run)])}")
    lines += [f"pictures: {folder}" for folder in sorted({picture.parent for picture in run.glob("*/*.png")})]
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    monitored = [saver.best_model_path for saver in savers if saver.monitor]
    newest = [saver.last_model_path or saver.best_model_path for saver in savers if not saver.monitor]
    lines += [f"checkpoint: {path}" for path in filter(None, [*monitored, *newest])]
    return lines
