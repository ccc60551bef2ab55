"""Saves the state of the last step, before anything else that follows training."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


class SaveLastState(Callback):
    """Writes last.ckpt at the end of ``fit`` where its steps are no multiple of the saving interval.

    ``emf fit`` puts it before all other callbacks: their final scores and exports take time, and the averages have not
    replaced the weights yet. It concerns each ``ModelCheckpoint`` with ``save_last``.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback.save_last:
                continue
            if callback._last_global_step_saved != trainer.global_step:
                callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
