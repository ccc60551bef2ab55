"""Cost of training: speed, gradient norm, skipped samples and cache hits."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from emf_lightning.callbacks.few_step_sampling import FewStepSampling
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.modules.non_finite import gradients_of, norm_of


class TrainingLog(Callback):
    """Logs images/s, seconds a step, the gradient norm before clipping, skipped samples and cache hits.

    Skipped samples and cache hits are the first rank's: to add up all would make the ranks wait for each other.

    Lightning's ``ThroughputMonitor`` counts validation and sampling as training time, logs nothing before its window
    is full, and waits for the GPU after every batch; this class measures time on its own. Lightning's
    ``LearningRateMonitor`` logs the learning rate.

    Args:
        window: number of optimiser steps that the speed is averaged over.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ValueError(f"TrainingLog: window must be at least 1, got {window}")
        # an entry at each end of the window's steps: (seconds of training, images of all ranks, optimiser steps)
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=window + 1)
        self._images = 0
        self._paused = 0.0
        self._pause_began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._marks.clear()
        self._marks.append((self.seconds(trainer), self._images, trainer.global_step))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused += time.perf_counter() - self._pause_began

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if gradients := gradients_of(optimizer):
            name = "gradient_norm" if optimizer is trainer.optimizers[0] else "auxiliary_gradient_norm"
            pl_module.log(f"train/{name}", norm_of(gradients))  # Lightning clips after this hook

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._images += len(batch) * trainer.world_size
        if trainer.global_step == self._marks[-1][2]:
            return  # gradients are being accumulated
        self._marks.append((self.seconds(trainer), self._images, trainer.global_step))
        (began, first, first_step), (ended, last, last_step) = self._marks[0], self._marks[-1]
        seconds = max(ended - began, 1e-9)
        pl_module.log("train/images_per_second", (last - first) / seconds)
        pl_module.log("train/step_seconds", seconds / (last_step - first_step))
        pl_module.log_dict(self._counts(trainer))

    def _counts(self, trainer: Trainer) -> dict[str, float]:
        """Skipped samples, cache hits and cache misses of this rank so far."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, CaptionImageData):
            return {}
        counts = {f"train/skipped/{reason}": number for reason, number in data.skipped.items()}
        counts["train/skipped_samples"] = sum(data.skipped.values())
        if data.cache is not None:
            counts |= {"train/cache_hits": data.cache.hits, "train/cache_misses": data.cache.misses}
        return {tag: float(count) for tag, count in counts.items()}

    def seconds(self, trainer: Trainer) -> float:
        """Seconds of training alone, without validation and sampling; only differences mean something."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        sampling: float = sum(callback.seconds for callback in callbacks if isinstance(callback, FewStepSampling))
        return time.perf_counter() - self._paused - sampling
