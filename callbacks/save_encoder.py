"""Export of the trained text encoder in transformers' format, for the next experiment to start from."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from emf_lightning.callbacks.loggers.run_directory import run_directory
from emf_lightning.callbacks.sampling.sampling_context import averaged_weights
from emf_lightning.digests import write_digests
from emf_lightning.files import replacing_folder
from emf_lightning.modules.encoder_tuning import EncoderTuning
from emf_lightning.text.pretrained import PretrainedTextEncoder, save_tower


class SaveEncoder(Callback):
    """Writes the encoder that ``EncoderTuning`` trained at the end of ``fit``, with averaged weights if there are any.

    A later experiment reads it as ``data.text``: ``model: <run directory>/encoder``.

    Args:
        folder: folder below the run directory.
    """

    def __init__(self, folder: str = "encoder") -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, EncoderTuning):
            raise ValueError("SaveEncoder: only EncoderTuning trains an encoder; take it out of trainer.callbacks")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, EncoderTuning)
        run = run_directory(trainer)  # a collective of all ranks
        with averaged_weights(trainer, pl_module):
            if trainer.is_global_zero:
                encoder = pl_module.encoder
                assert isinstance(encoder, PretrainedTextEncoder)
                with replacing_folder(run / self.folder) as partial:
                    save_tower(encoder, partial)
                    write_digests(partial)
