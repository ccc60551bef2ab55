"""Export of the trained network in diffusers' format, for the next experiment to start from."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from emf_lightning.callbacks.loggers.run_directory import run_directory
from emf_lightning.callbacks.sampling.sampling_context import averaged_weights
from emf_lightning.digests import write_digests
from emf_lightning.files import replacing_folder
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.networks.base import FlowMapNetwork


class SaveNetwork(Callback):
    """Writes the network at the end of ``fit``, with averaged weights if there are any.

    A later experiment starts from it with ``pretrained: <run directory>/network``. Of a network with adapters the
    folder holds these alone, and names their parent.

    Args:
        folder: folder below the run directory.
        time_scale: scale to which the copy's time embedding is refitted (``SanaFlowMap.refit_time``): the time
            derivative of a parent trained at a large scale is rough, and MeanFlow diverges on it. None leaves it.
    """

    def __init__(self, folder: str = "network", time_scale: float | None = None) -> None:
        self.folder = folder
        self.time_scale = time_scale

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FlowMapModule)
        if self.time_scale is None:
            return
        if self.time_scale <= 0:
            raise ValueError(f"SaveNetwork: time_scale must be positive, got {self.time_scale}")
        if type(pl_module.net).refit_time is FlowMapNetwork.refit_time:  # which refuses, after the whole training
            kind = type(pl_module.net).__name__
            raise ValueError(
                f"SaveNetwork: time_scale is {self.time_scale:g}, but {kind} has no time embedding to fit; leave it out"
            )
        if pl_module.net.parent_weights:
            raise ValueError(
                f"SaveNetwork: time_scale is {self.time_scale:g}, but under adapters the time embedding is the "
                "parent's; leave it out"
            )
        if pl_module.objective.needs_interval:
            raise ValueError(
                f"SaveNetwork: time_scale is {self.time_scale:g}, but a refitted time embedding forgets the intervals "
                f"that {type(pl_module.objective).__name__} trains; leave it out"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FlowMapModule)
        run = run_directory(trainer)  # a collective of all ranks
        with averaged_weights(trainer, pl_module):
            net = pl_module.full_network()
        if net is None:  # rank 0 has it
            return
        if self.time_scale is not None and self.time_scale != net.time_scale:
            net.refit_time(self.time_scale)
        with replacing_folder(run / self.folder) as partial:
            net.save_pretrained(partial)
            write_digests(partial)
