"""Mean gradients over accumulated batches, also where a pass ends before ``accumulate_grad_batches`` of them."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch.optim import Optimizer


class MeanOfAccumulated(LightningModule):
    """Divides accumulated gradients by the number of batches that they come from.

    Lightning divides each batch's loss by ``accumulate_grad_batches``. The last step of a pass may follow fewer
    batches: its gradient would be too small by their share.
    """

    _accumulated = 0

    def on_train_start(self) -> None:
        """Counts batches from 0 where training resumes after a pass's last batch: the loader gives the next pass.

        Lightning does so where it knows the number of batches of a pass, or saved after a validation. Else the first
        step would take as many batches fewer as the pass had beyond whole steps.
        """
        loop = self.trainer.fit_loop.epoch_loop
        progress, current = loop.batch_progress, loop.batch_progress.current
        if loop.restarted_on_train_batch_end and progress.is_last_batch:
            progress.is_last_batch, last = False, current.ready
            for name in ("ready", "started", "processed", "completed"):
                setattr(current, name, getattr(current, name) - last)

    def on_after_backward(self) -> None:
        self._accumulated += 1

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        share = self.trainer.accumulate_grad_batches / max(self._accumulated, 1)
        self._accumulated = 0
        if self.automatic_optimization and share > 1:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], share)
