"""A context for sampling during training that leaves the training state unchanged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[bool]:
    """A context in which ``module`` holds its averaged weights; yields whether there are any.

    The averages of Lightning's ``WeightAveraging`` are copied into the live tensors; the live values come back also
    when the body raises. The averaged copy itself knows no trainer, and ``torch.compile`` did not compile it. Outside
    ``fit`` the module already holds the weights to sample with: a checkpoint's weights are the averages.
    """
    averages = _averages(trainer)
    if averages is None:
        yield False
        return
    live = list(chain(module.parameters(), module.buffers()))
    kept = [tensor.detach().clone() for tensor in live]
    try:
        _copy(list(chain(averages.parameters(), averages.buffers())), live)
        yield True
    finally:
        _copy(kept, live)


@contextmanager
def sampling_context(trainer: Trainer, module: LightningModule, averaged: bool = True) -> Iterator[None]:
    """A context for sampling: averaged weights, eval mode, the trainer's precision, no gradient.

    On exit, also when the body raises, it restores the weights, the train/eval modes and the random states of torch,
    CUDA, numpy and Python. With ``averaged`` false it leaves the live weights in the module.
    """
    modes = {part: part.training for part in module.modules()}
    weights = averaged_weights(trainer, module) if averaged else nullcontext()
    with weights, _preserve_random_states(), torch.no_grad():
        module.eval()
        try:
            with trainer.precision_plugin.forward_context():
                yield
        finally:
            for part, mode in modes.items():
                part.training = mode


@contextmanager
def _preserve_random_states() -> Iterator[None]:
    # Lightning's isolate_rng does not restore when its body raises
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  kept, not used
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _averages(trainer: Trainer) -> nn.Module | None:
    if trainer.state.fn != TrainerFn.FITTING:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            averages = callback._average_model.module
            assert isinstance(averages, nn.Module)
            return averages
    return None


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
