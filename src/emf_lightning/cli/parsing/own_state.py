"""The state of a training, restored from a checkpoint of `emf fit` and from no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_warn

from emf_lightning.cli.parsing.errors import raised_in_package
from emf_lightning.cli.parsing.resumed_settings import ConfiguredSettings


class OwnStateOnly(_CheckpointConnector):
    """Restores what `emf fit` has saved.

    Lightning would restore any ``hpc_ckpt_N.ckpt`` in the working directory of a SLURM job, whoever wrote it, and ends
    in errors without a sentence where a checkpoint lacks something or holds it in another form.
    """

    _hpc_resume_path = None
    _configured: ConfiguredSettings | None = None

    def _restore_modules_and_callbacks(self, checkpoint_path: Any = None, *args: Any, **options: Any) -> None:
        # each rank has looked for the run's checkpoint by itself, and one may have seen another state of the disk
        self._ckpt_path = checkpoint_path = self.trainer.strategy.broadcast(checkpoint_path)
        self._configured = ConfiguredSettings(self.trainer)  # of a sharding strategy, which loads the optimisers here
        with _naming(checkpoint_path):
            super()._restore_modules_and_callbacks(checkpoint_path, *args, **options)

    def restore_training_state(self) -> None:
        configured = self._configured or ConfiguredSettings(self.trainer)
        with _naming(self._ckpt_path):
            super().restore_training_state()
        if changes := configured.put_back(self.trainer):
            rank_zero_warn(f"ckpt_path: training goes on with the settings of its configuration: {', '.join(changes)}")

    def restore_optimizers(self) -> None:
        saved, there = len(self._loaded_checkpoint["optimizer_states"]), len(self.trainer.optimizers)
        if saved != there:  # Lightning would leave the others as they began
            raise IndexError(f"the states of {saved} optimisers for {there}")
        super().restore_optimizers()


@contextmanager
def _naming(path: Any) -> Iterator[None]:
    """Raises a ``ValueError`` that names the checkpoint ``path`` for errors of what it holds."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, ValueError) and raised_in_package(error):
            raise
        raise ValueError(
            f"ckpt_path: {path} does not hold what a training saves ({type(error).__name__}: {error}); to start from "
            "its weights alone, give --model.init_args.init_from in place of it"
        ) from error
