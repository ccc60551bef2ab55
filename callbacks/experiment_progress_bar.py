"""Progress in the numbers that a person wants, in a terminal and in a log file alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.types import STEP_OUTPUT

SHOWN = {
    "train/images_per_second": "img/s",
    "train/mse_r_equals_t": "mse r=t",
    "train/mse_r_below_t": "mse r<t",
    "train/velocity_gap": "|u-v|^2",
    "train/online_flow_mse": "critic mse",
    "train/consistency": "consistency",
    "train/discriminator_accuracy": "judge",
}
"""Logged tag -> what it is called in the bar, where it is logged at all."""


class ExperimentProgressBar(TQDMProgressBar):
    """Optimiser steps done and planned, images/s, the two raw errors, the last scores; at the end, where everything is.

    A terminal gets Lightning's tqdm bars, anything else (a file, a pipe, a CI log) a line now and then.

    Args:
        refresh_rate: batches between two updates of a bar; 0 shows nothing.
        seconds_between_lines: how often a line appears where there is no terminal.
        leave: keeps a finished bar on the screen.
    """

    def __init__(self, refresh_rate: int = 5, seconds_between_lines: float = 20.0, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self.seconds_between_lines = seconds_between_lines
        self._terminal = sys.stdout.isatty()
        self._last_line = float("-inf")
        self._began = (0.0, 0)
        self._scores = ""
        self._closing: list[str] = []
        self._sampling: Tqdm | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether there are bars; without a terminal there are lines instead."""
        return super().is_enabled and self._terminal

    # -- what other callbacks tell ------------------------------------------------------------------------------------

    def show_sampling(self, what: str, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` images of an evaluation are judged."""
        if not self.is_enabled:
            self._line_now_and_then(f"{what}: {done}/{total} images", last=False)
            return
        if self._sampling is None:
            self._sampling = Tqdm(total=total, position=1, leave=False, file=sys.stdout, dynamic_ncols=True, unit="img")
        self._sampling.set_description(what, refresh=False)
        self._sampling.n = done
        self._sampling.refresh()
        if done >= total:
            self._sampling.close()
            self._sampling = None

    def show_scores(self, scores: Mapping[str, float], sentence: str) -> None:
        """Keeps ``scores`` (step count -> overall) in sight and writes ``sentence`` on a line of its own."""
        self._scores = f"scores {'/'.join(scores)} " + " ".join(_short(score) for score in scores.values())
        self._write(sentence)

    def show_sentence(self, sentence: str) -> None:
        """Writes ``sentence`` on a line of its own."""
        self._write(sentence)

    def show_at_end(self, text: str) -> None:
        """Keeps ``text`` for the end of the run, where it stands above the last line."""
        self._closing.append(text)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # type: ignore[override]
        self._began = (time.perf_counter(), trainer.global_step)
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # type: ignore[override]
        bar = self.train_progress_bar
        if bar.total is None:  # one bar for the whole run, in optimiser steps, whatever an epoch is
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
            self._line_now_and_then(self._training_line(trainer, step, planned), last=step == planned)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the bar goes on."""

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
        run = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        for text in self._closing:
            self._write(text)
        self._closing.clear()
        if places := _places(trainer, run):
            self._write(places)

    # -- lines --------------------------------------------------------------------------------------------------------

    def _write(self, text: str) -> None:
        if self._enabled and self.refresh_rate > 0:
            Tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _line_now_and_then(self, line: str, *, last: bool) -> None:
        if last or time.perf_counter() - self._last_line >= self.seconds_between_lines:
            self._last_line = time.perf_counter()
            self._write(line)

    def _batch_line(self, what: str, arguments: tuple[Any, ...], total: float) -> None:
        if not self.is_enabled:
            done = arguments[4] + 1
            self._line_now_and_then(f"{what}: {done}/{total} batches", last=done == total)

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
        return ", ".join([*shown, *filter(None, [self._scores])])


def _planned(trainer: Trainer) -> int | None:
    planned = trainer.estimated_stepping_batches
    return int(planned) if planned not in (-1, float("inf")) else None


def _short(score: float) -> str:
    """.42 rather than 0.42."""
    return f"{score:.2f}".removeprefix("0")


def _places(trainer: Trainer, run: Path) -> str:
    """Where the run's curves, images and checkpoint are, as far as there are any."""
    parts = []
    if any(run.glob("events.out.tfevents.*")):
        parts.append(f"curves: tensorboard --logdir {run}")
    if images := sorted(run.glob("*/*.png")):
        parts.append("images: " + ", ".join(str(image) for image in images))
    saver = trainer.checkpoint_callback
    if isinstance(saver, ModelCheckpoint) and (path := saver.last_model_path or saver.best_model_path):
        parts.append(f"checkpoint: {path}")
    return " | ".join(parts)
