"""A context for sampling during training that leaves the training state unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[bool]:
    """A context in which ``module`` holds its averaged weights; yields whether there are any.

    The averages of Lightning's ``WeightAveraging`` are swapped with the live tensors; the live values come back also
    when the body raises. The averaged copy itself knows no trainer, and ``torch.compile`` did not compile it. Outside
    ``fit`` the module already holds the weights to sample with: a checkpoint's weights are the averages.
    """
    callbacks = trainer.callbacks if trainer.state.fn == TrainerFn.FITTING else []  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            _swap(trainer, module, callback)
            try:
                yield True
            finally:
                _swap(trainer, module, callback)
            return
    yield False


def _swap(trainer: Trainer, module: LightningModule, averaging: WeightAveraging) -> None:
    averaging._swap_models(module)
    if getattr(module, "tunes_encoder", False):
        trainer.datamodule.forget_null()  # type: ignore[attr-defined]  # it is of the encoder's weights


@contextmanager
def sampling_context(trainer: Trainer, module: LightningModule, averaged: bool = True) -> Iterator[None]:
    """A context for sampling: averaged weights, eval mode, the trainer's precision, no gradient.

    On exit, also when the body raises, it restores the weights, the train/eval modes and the random states of torch,
    CUDA, numpy and Python. With ``averaged`` false it leaves the live weights in the module.
    """
    modes = {part: part.training for part in module.modules()}
    random_states = _collect_rng_states()  # Lightning's isolate_rng does not restore them when its body raises
    weights = averaged_weights(trainer, module) if averaged else nullcontext()
    with weights, torch.no_grad():
        module.eval()
        try:
            with trainer.precision_plugin.forward_context():
                yield
        finally:
            for part, mode in modes.items():
                part.training = mode
            _set_rng_states(random_states)
