"""Averages of the weights, on the device of the weights."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class WeightEMA(EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, kept where the module trains unless ``device`` is given.

    Lightning (2.6) makes the copy in ``setup``, when the module has not been moved yet: on a GPU, every step would send
    all weights to the CPU.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None and self._device is None:
            self._average_model.to(trainer.strategy.root_device)
