"""The trained network as a folder in diffusers' format, for the next experiment to start from."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from emf_lightning.callbacks.undisturbed import averaged_weights
from emf_lightning.modules.base import FlowMapModule


class SaveNetwork(Callback):
    """Writes the network, with averaged weights where there are any, at the end of ``fit``.

    A later experiment starts from it with ``pretrained: <run directory>/network``.

    Args:
        folder: below the run directory.
    """

    def __init__(self, folder: str = "network") -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FlowMapModule)
        run = trainer.log_dir or trainer.default_root_dir  # asks all ranks
        with averaged_weights(trainer, pl_module):
            if trainer.is_global_zero:
                pl_module.net.save_pretrained(str(Path(run) / self.folder))  # type: ignore[operator]
