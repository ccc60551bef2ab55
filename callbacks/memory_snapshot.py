"""Records which lines of code hold the GPU's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from emf_lightning.callbacks.loggers.run_directory import run_directory


class MemorySnapshot(Callback):
    """Writes ``memory-rank<n>.pickle`` into the run directory: CUDA's allocations, each with its stack.

    https://pytorch.org/memory_viz shows the file, in the browser alone. It covers ``steps`` optimiser steps from the
    first of this ``fit``, or what came before an error, such as memory that runs out. Elsewhere than on CUDA it warns
    and does nothing.

    Args:
        steps: optimiser steps to record.
        max_entries: last events that are kept; each takes some KB of the CPU's memory.
    """

    def __init__(self, steps: int = 3, max_entries: int = 100_000) -> None:
        if steps < 1 or max_entries < 1:
            raise ValueError(f"MemorySnapshot: steps and max_entries must be at least 1, got {steps}, {max_entries}")
        self.steps, self.max_entries = steps, max_entries
        self._path: Path | None = None
        self._end = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = run_directory(trainer)  # a collective of all ranks
        if pl_module.device.type != "cuda":
            rank_zero_warn(f"MemorySnapshot records CUDA's memory, and this run is on {pl_module.device.type}")
            return
        self._path = run / f"memory-rank{trainer.global_rank}.pickle"
        self._end = trainer.global_step + self.steps
        torch.cuda.memory._record_memory_history(max_entries=self.max_entries)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step >= self._end:
            self._write()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
            self._path = None
