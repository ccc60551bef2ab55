"""Sampling in the middle of training that leaves training as it was."""

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

    The averages of Lightning's ``WeightAveraging`` are copied into the live tensors and the live values back, whatever
    happens in between. Sampling from the averaged copy itself would need no way back, but that copy knows no trainer
    and is not what ``torch.compile`` compiled. Outside ``fit`` the module already holds what is to be judged: a
    checkpoint's weights are the averages.
    """
    averages = _averages(trainer)
    if averages is None:
        yield False
        return
    live = list(chain(module.parameters(), module.buffers()))
    kept = [tensor.detach().clone() for tensor in live]
    try:
        _fill(live, list(chain(averages.parameters(), averages.buffers())))
        yield True
    finally:
        _fill(live, kept)


@contextmanager
def undisturbed(trainer: Trainer, module: LightningModule, averaged: bool = True) -> Iterator[None]:
    """A context for sampling: averaged weights, eval mode, the trainer's precision, no gradient.

    Weights, modes and the random states of torch, CUDA, numpy and Python are afterwards what they were before, also
    when sampling raises.

    Args:
        trainer: of ``module``.
        module: what is looked at.
        averaged: whether to fill in the averaged weights where there are any, or to leave those that are trained.
    """
    modes = {part: part.training for part in module.modules()}
    weights = averaged_weights(trainer, module) if averaged else nullcontext()
    with weights, _random_states_kept(), torch.no_grad():
        module.eval()
        try:
            with trainer.precision_plugin.forward_context():
                yield
        finally:
            for part, mode in modes.items():
                part.training = mode


@contextmanager
def _random_states_kept() -> Iterator[None]:
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
def _fill(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
