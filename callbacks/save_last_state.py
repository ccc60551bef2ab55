"""Saves the state of the last step, before anything else that follows training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from emf_lightning.callbacks.signal_stop import SignalStop


class SaveLastState(Callback):
    """Writes last.ckpt at the end of ``fit`` where its steps are no multiple of the saving interval.

    ``emf fit`` puts it before all other callbacks: their final scores and exports take time, and the averages have not
    replaced the weights yet. It concerns each ``ModelCheckpoint`` with ``save_last``.

    Args:
        same_run: whether training goes on in the directory of the run that it resumes. That one may have been moved, or
            be named otherwise; Lightning would then write ``last-v1.ckpt`` beside the old ``last.ckpt``.
    """

    def __init__(self, same_run: bool = False) -> None:
        self._same_run = same_run

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for callback in trainer.checkpoint_callbacks if self._same_run else ():
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state and state.get("dirpath"):
                state.update(_moved(state, str(state["dirpath"]), str(callback.dirpath)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback.save_last:
                continue
            if callback._last_global_step_saved != trainer.global_step:
                kept, callback.save_last = callback.save_last, True  # a link would name an earlier state
                try:
                    callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
                finally:
                    callback.save_last = kept
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SignalStop):
                callback.last_step_saved(trainer)


def _moved(value: Any, before: str, now: str) -> Any:
    """``value`` with ``now`` in place of the folder ``before`` at the beginning of each path."""
    if isinstance(value, dict):
        return {_moved(key, before, now): _moved(item, before, now) for key, item in value.items()}
    return now + value.removeprefix(before) if isinstance(value, str) and value.startswith(before) else value
