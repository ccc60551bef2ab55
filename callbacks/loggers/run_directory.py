"""A run's own directory, the same with every logger and with none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

UNNAMED = "lightning_logs"
"""Lightning's name of a ``TensorBoardLogger`` or ``CSVLogger`` that gets none."""

FileLogger: TypeAlias = TensorBoardLogger | CSVLogger


def run_directory(trainer: Trainer) -> Path:
    """The directory of all files of a run: checkpoints, scores, exports; a collective of all ranks."""
    files = file_loggers(trainer.loggers)
    return Path(trainer.strategy.broadcast(files[0].log_dir if files else trainer.default_root_dir))


def file_loggers(loggers: Sequence[Logger]) -> list[FileLogger]:
    """The loggers that write into the run's directory: the first one with a name, then those without one."""
    files = [logger for logger in loggers if isinstance(logger, TensorBoardLogger | CSVLogger)]
    named = [logger for logger in files if logger.name != UNNAMED]
    places = {(logger.root_dir, logger._version) for logger in named[:1]}
    rest = [logger for logger in files if logger.name == UNNAMED or (logger.root_dir, logger._version) in places]
    return [*named[:1], *(logger for logger in rest if logger not in named[:1])]


def place(trainer: Trainer, directory: Path) -> None:
    """Makes ``directory`` the run's own: that of its loggers which write files, and of its checkpoints."""
    number = directory.name.removeprefix("version_")
    for logger in file_loggers(trainer.loggers):
        logger._root_dir = str(directory.parent)
        logger._save_dir = str(directory.parent)  # type: ignore[union-attr]
        logger._name = ""
        logger._version = int(number) if number.isdecimal() and number != directory.name else directory.name
    earlier, checkpoints = (str(Path(path, "checkpoints")) for path in (trainer.default_root_dir, directory))
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath in (None, earlier):
            callback.dirpath = checkpoints
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if profiler.dirpath in (None, trainer.default_root_dir):
        profiler.dirpath = str(directory)
    trainer._default_root_dir = str(directory)  # type: ignore[attr-defined]
