"""Curves and pictures of evaluations in every logger of a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger

from emf_lightning.callbacks.loggers.run_directory import FileLogger

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.tensorboard import SummaryWriter

_writers: WeakKeyDictionary[TensorBoardLogger, dict[str, SummaryWriter]] = WeakKeyDictionary()
"""Logger -> curve -> its writer: TensorBoard follows one file of a directory at a time, so that callbacks share it."""


@dataclass(frozen=True)
class Points:
    """The scores of one evaluation: a point of a curve in the chart of each score.

    Attributes:
        curve: the curve's name in TensorBoard's legends, e.g. "4 steps".
        tag: last part of its tags in other loggers, e.g. "4step".
        step: optimiser steps taken.
        values: score by name.
    """

    curve: str
    tag: str
    step: int
    values: Mapping[str, float]


class ScoreLog:
    """Logs scores and pictures of a run; for the process of rank 0 only.

    TensorBoard gets a run of its own for each curve, below the run's directory, with the same tags: so each curve of a
    chart has its colour, name and filter. Every other logger gets the tags ``<group>/<score>/<curve>``.

    Args:
        trainer: whose loggers to use.
        first_step: of a training; later points that are in its directory already disappear. None outside of ``fit``.
    """

    def __init__(self, trainer: Trainer, first_step: int | None) -> None:
        self.loggers = trainer.loggers
        self.first_step = first_step

    def add(self, group: str, points: Sequence[Points], *, to_files: bool = True) -> None:
        """Adds ``points`` with tags that begin with ``group``; those in the run's directory only with ``to_files``."""
        for logger in self.loggers:
            if to_files or not isinstance(logger, FileLogger):
                self._add(logger, group, points)

    def go_on(self, group: str, known: Sequence[Points], here: Sequence[Points]) -> None:
        """Adds the ``known`` points of the run that goes on: in files, where those ``here`` are already, the others."""
        for logger in self.loggers:
            in_file, experiment = isinstance(logger, FileLogger), getattr(logger, "experiment", None)
            if in_file or not getattr(experiment, "resumed", False):  # a run of W&B that goes on has them
                self._add(logger, group, [point for point in known if not in_file or point not in here])

    def picture(self, group: str, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Adds an RGB picture ``[H, W, 3]`` where the logger takes pictures."""
        tag = f"{group}/{name}"
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"{group}/pictures/{name}", pixels, step, dataformats="HWC")
            elif hasattr(logger, "log_image"):  # W&B's, or a user's logger with the same method
                logger.log_image(tag, [pixels], step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, pixels, f"{tag}/{step:07d}.png")
            elif isinstance(logger, CometLogger):
                logger.experiment.log_image(pixels, name=tag, step=step)

    def _add(self, logger: Logger, group: str, points: Sequence[Points]) -> None:
        if isinstance(logger, TensorBoardLogger):
            for point in points:
                writer = self._writer(logger, point.curve)
                for name, value in point.values.items():
                    writer.add_scalar(f"{group}/{tensorboard_name(name)}", value, point.step)
            for writer in _writers.get(logger, {}).values():
                writer.flush()
            return
        for step in dict.fromkeys(point.step for point in points):
            now = [point for point in points if point.step == step]
            logger.log_metrics({f"{group}/{n}/{p.tag}": v for p in now for n, v in p.values.items()}, step)
        if points:
            logger.save()

    def _writer(self, logger: TensorBoardLogger, curve: str) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        writers = _writers.setdefault(logger, {})
        if curve not in writers:
            folder = Path(logger.log_dir, curve.replace("/", "-"))
            writers[curve] = SummaryWriter(str(folder), purge_step=self.first_step if folder.is_dir() else None)
        return writers[curve]


def tensorboard_name(name: str) -> str:
    """The last parts of a score's tag in TensorBoard, which sorts charts by tag: ``overall`` comes first."""
    if name == "overall":
        return name
    return f"sampling/{name}" if name in ("nfe", "seconds") else f"parts/{name}"
