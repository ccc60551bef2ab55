"""Stopping a training by a signal without loss, and finishing one whose steps are all taken."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from emf_lightning.callbacks.loggers.run_directory import run_directory

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class SignalStop(Callback):
    """Saves the state of a ``fit`` that gets SIGTERM, SIGINT or SIGUSR1 at its next step boundary, and ends it.

    The boundary is after an optimiser step and all callbacks that follow it: a signal in sampling waits for its end,
    one in validation for its end and the step after it. The status is 128 + the signal's number, and the command that
    goes on is printed; a job of SLURM with ``auto_requeue`` is requeued by its signal. Before the first step and after
    the last one there is nothing to save, and the signal ends the run at once, as a second SIGINT does. Lightning's
    own handlers would save in the middle of a step, or not at all. Any rank's signal ends all ranks.

    Where a checkpoint of the last step is resumed, Lightning calls no hook of training: here ``on_train_start`` and
    ``on_train_end`` follow all the same, so that final scores, figures and exports are made.

    Args:
        command: the arguments of ``emf``, without those of going on.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._received = 0
        self._stepping = False  # whether a step boundary will come
        self._trained = False
        self._took_steps = False
        self._step = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._trainer: Trainer | None = None

    def install(self, trainer: Trainer) -> None:
        """Sets the handlers; data workers started from now on inherit them and leave signals to this process."""
        self._trainer, self._owner = trainer, os.getpid()
        for number in SIGNALS:
            before = signal.signal(number, self._receive)
            self._handlers.setdefault(number, before)

    def restore(self) -> None:
        """Sets the handlers that were there before ``install``."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        self._received = self._received or number
        if self._stepping:
            again = "; press Ctrl-C again to end at once, without saving" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: the run ends after this step{again}\n".encode())
        else:
            assert self._trainer is not None
            self._end(self._trainer, self._received)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.install(trainer)  # once more: Lightning has set its own handlers since
        self._step, self._trained = trainer.global_step, True

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._stepping = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # gradients are being accumulated, and no checkpoint holds them
        self._step, self._took_steps = trainer.global_step, True
        self._stop_if_received(trainer)

    def last_step_saved(self, trainer: Trainer) -> None:
        """Ends the run if a signal has come, in the last validation for example; from now on one ends it at once.

        ``SaveLastState`` calls it, before the final scores and exports, which may take long.
        """
        self._stop_if_received(trainer)
        self._stepping = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trained and trainer.global_step > 0 and trainer.limit_train_batches and trainer.fit_loop.done:
            trainer.fit_loop.on_run_start()
            trainer.fit_loop.on_run_end()

    # -- end ----------------------------------------------------------------------------------------------------------

    def _stop_if_received(self, trainer: Trainer) -> None:
        received = self._received
        if trainer.world_size > 1:  # all ranks save, or none
            flag = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(flag, reduce_op="max"))
        if received:
            path = self._path(trainer)
            trainer.save_checkpoint(path)  # a collective
            self._end(trainer, received, path)

    def _path(self, trainer: Trainer) -> Path:
        """Path of the newest state, which ``ModelCheckpoint`` would write."""
        for callback in _with_last(trainer):
            name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            path = Path(callback.last_model_path or os.path.join(str(callback.dirpath), name))
            callback.last_model_path = str(path)  # otherwise a resumed run writes last-v1.ckpt beside it
            return path
        return run_directory(trainer) / "checkpoints" / "last.ckpt"

    def _saved(self, trainer: Trainer) -> Path | None:
        """The state of the last step, where steps have been taken and ``SaveLastState`` has saved it."""
        paths = [Path(callback.last_model_path) for callback in _with_last(trainer) if callback.last_model_path]
        return next((path for path in paths if self._took_steps and path.exists()), None)

    def _end(self, trainer: Trainer, number: int, saved: Path | None = None) -> None:
        if trainer.is_global_zero:
            saved = saved or self._saved(trainer)
            resumed = "--run" not in self._command and trainer.ckpt_path
            options = ["--ckpt_path", str(saved or resumed)] if saved or resumed else []
            version = getattr(trainer.logger, "version", None) if saved and len(trainer.loggers) == 1 else None
            if isinstance(version, int):
                options += ["--trainer.logger.init_args.version", str(version)]
            elif saved:
                options += ["--run", str(saved.parent.parent)]
            said = f"state of step {trainer.global_step}: {saved}\n" if saved else ""
            line = shlex.join(["emf", *self._command, *options])
            sys.stdout.write(f"\n{signal.Signals(number).name}: the run has ended. {said}to go on: {line}\n")
            sys.stdout.flush()
            _requeue(trainer, number)
        # a launcher on rank 0 would take another rank's status for a failure and kill the rest
        raise SystemExit(128 + number if trainer.is_global_zero else 0)


def _with_last(trainer: Trainer) -> list[ModelCheckpoint]:
    """The callbacks that write last.ckpt."""
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [callback for callback in found if callback.save_last and callback.dirpath]


def _requeue(trainer: Trainer, number: int) -> None:
    """Requeues a job of SLURM whose signal this is."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return
    if number == (environment.requeue_signal or signal.SIGUSR1):
        job = os.environ["SLURM_JOB_ID"]
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:  # in a container there may be no scontrol
            sys.stdout.write(f"SLURM did not requeue job {job} ({error}): submit it again\n")
