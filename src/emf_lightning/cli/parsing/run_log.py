"""The configuration of a run, in its directory and in its loggers."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from emf_lightning.callbacks.loggers.run_directory import FileLogger, run_directory
from emf_lightning.cli.runs import CONFIG

log = logging.getLogger("lightning.pytorch")

AS_PARSED = {"skip_unset": False, "skip_validation": True}
"""How a parsed configuration is written: whole, and not checked again, which takes as long as parsing it."""


class RunLog(SaveConfigCallback):
    """Writes ``config.yaml`` and hands the configuration to all loggers; a resumed run's files go on.

    An evaluation keeps the configuration of the run that it evaluates.
    """

    _earlier: Sequence[dict[str, Any]] = ()

    def keep_rows(self, trainer: Trainer) -> None:
        """Keeps the rows of an earlier ``metrics.csv``, which Lightning deletes before any hook is called."""
        self._earlier = [row for logger in trainer.loggers if isinstance(logger, CSVLogger) for row in _rows(logger)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        directory = run_directory(trainer)  # a collective of all ranks
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        directory.mkdir(parents=True, exist_ok=True)
        if stage == "fit" or not (directory / CONFIG).is_file():
            self.parser.save(self.config, directory / CONFIG, overwrite=True, **AS_PARSED)
        settings: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, **AS_PARSED))
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                _write_rows(logger, self._earlier)
            if stage == "fit" or not isinstance(logger, FileLogger):
                logger.log_hyperparams(settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes what an interrupted run has logged after the checkpoint that is resumed."""
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                kept = [row for row in self._earlier if 0 < step >= int(row["step"])]
                _write_rows(logger, [*kept, *_rows(logger)[len(self._earlier) :]])
            elif isinstance(logger, TensorBoardLogger) and step > 0:
                restart = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
                logger.experiment._get_file_writer().add_event(restart)


class _WithoutEpoch(_LoggerConnector):
    """Lightning would log the number of the epoch with everything else; here a training is one of steps."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if step is None and "step" not in metrics:
            step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        super().log_metrics(metrics, step)


class _PartSizes(ModelSummary):
    """The parameters of each part in a line; Lightning's table counts FLOPs of networks with an example input only."""

    @staticmethod
    def summarize(summary_data: list[tuple[str, list[str]]], *_: Any, **__: Any) -> None:
        columns = dict(summary_data)
        for name, kind, size in zip(columns["Name"], columns["Type"], columns["Params"], strict=True):
            log.info("%s: %s, %s parameters", name, kind, size.strip())


def prepare_logging(trainer: Trainer) -> None:
    """Keeps the rows of earlier files, logs no epochs or FLOPs, and lets callbacks that need a logger do without."""
    connector = _WithoutEpoch(trainer)
    connector.on_trainer_init(trainer.loggers or [DummyLogger()], trainer.log_every_n_steps)  # type: ignore[attr-defined]
    trainer._logger_connector = connector
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for number, callback in enumerate(callbacks):
        if isinstance(callback, RunLog):
            callback.keep_rows(trainer)
        if type(callback) in (ModelSummary, RichModelSummary) and callback._max_depth == 1:
            callbacks[number] = _PartSizes()


def _rows(logger: CSVLogger) -> list[dict[str, Any]]:
    file = Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1].replace("\0", "").splitlines()  # a killed run may have torn the last line
    return [row for row in csv.DictReader(whole) if (row.get("step") or "").isdecimal()]


def _write_rows(logger: CSVLogger, rows: Sequence[dict[str, Any]]) -> None:
    """Makes ``rows`` the content of the logger's file, which it goes on with."""
    writer = logger.experiment  # deletes an earlier file
    Path(writer.metrics_file_path).unlink(missing_ok=True)
    writer.metrics[:0] = rows
    writer.save()
