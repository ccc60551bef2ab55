"""Exponential moving average of the weights on the training device, also of sharded weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from emf_lightning.modules.sharding import LIVE, gathered, is_sharded, scattered
from emf_lightning.networks.adapter import parent_parameters


class WeightEMA(EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, on the training device unless ``device`` is given.

    Lightning (2.6) copies the module in ``setup``, before it is moved to the device: on a GPU, every step would then
    send all weights to the CPU. Lightning also copies the whole module, and one sharded by FSDP2 cannot be copied; here
    each rank averages its own shards, without communication.

    Args:
        warmup: Let the decay grow, ``min(decay, (1 + n) / (10 + n))`` at the n-th average, so that averages early in
            training are of a tenth of it and do not lag by ``1 / (1 - decay)`` steps.
    """

    averages_shards = True

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        warmup: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device,
            use_buffers,
            decay,
            update_every_n_steps,
            update_starting_at_step,
            update_starting_at_epoch,
            **kwargs,
        )
        self._kwargs["avg_fn"] = partial(_averaged, decay, warmup)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            if any(getattr(one, "save_weights_only", False) for one in trainer.checkpoint_callbacks):
                raise ValueError(
                    "ModelCheckpoint: save_weights_only would save the last step's weights, and not the averages of "
                    "WeightEMA, whose scores are logged; leave it out, and take the weights from `emf export`"
                )
            pl_module.configure_model()  # shards the module, where it is sharded, before its weights are copied
            super().setup(trainer, _Weights(pl_module), stage)
            if self._average_model is not None and self._device is None:
                self._average_model.to(trainer.strategy.root_device)
        else:
            self._average_model = None  # of an earlier `fit`: a checkpoint would load its live weights

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **options: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args, **options)
        average = self._average_model
        if average is not None and not average.n_averaged:  # before update_starting_at_step: the live weights
            ours = itertools.chain(average.module.parameters(), average.module.buffers())
            for value, live in zip(ours, itertools.chain(pl_module.parameters(), pl_module.buffers()), strict=True):
                value.data.copy_(live.data)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is None or not is_sharded(pl_module):
            return
        if any(isinstance(value, DTensor) for value in checkpoint["current_model_state"].values()):
            # a sharded checkpoint: the strategy writes the shards in "state_dict" and the optimiser's, no others
            live = checkpoint.pop("current_model_state")
            checkpoint["state_dict"] |= {LIVE + name: value for name, value in live.items()}
        else:  # a checkpoint in one file: the strategy has gathered the live weights
            checkpoint["state_dict"] = gathered(checkpoint["state_dict"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None and is_sharded(pl_module):
            # the strategy has loaded "state_dict", the averages, into the module and removed it from the checkpoint
            averages = checkpoint["state_dict"] = pl_module.state_dict()
            if "current_model_state" in checkpoint:
                checkpoint["current_model_state"] = scattered(checkpoint["current_model_state"], like=averages)
            elif "averaging_state" in checkpoint:
                checkpoint["current_model_state"] = _read_live(trainer, like=averages)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _averaged(decay: float, warmup: bool, average: Tensor, live: Tensor, averaged: Tensor | int) -> Tensor:
    """The next average; integers, such as positions, are the live ones, and what never changes keeps its bits."""
    if not average.is_floating_point():
        return live
    kept = min(decay, (1 + int(averaged)) / (10 + int(averaged))) if warmup else decay
    return average.lerp(live, 1 - kept)


def _read_live(trainer: Trainer, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Live weights of the sharded checkpoint that ``trainer`` resumes from."""
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {LIVE + name: torch.empty_like(tensor) for name, tensor in like.items()}
    load({"state_dict": state}, checkpoint_id=trainer.ckpt_path)
    return {name.removeprefix(LIVE): tensor for name, tensor in state.items()}


class _Weights(LightningModule):
    """A module's parameters and buffers under their names, without its other attributes, for averaging to copy.

    A copy has the weights under adapters in common with the module: they never change.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self._device = module.device
        self._parents = parent_parameters(module)
        _mirror(module, self, lambda tensor: tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Weights:
        memo.update(self._parents)
        copied = _Weights.__new__(_Weights)
        LightningModule.__init__(copied)
        copied._device, copied._parents = self._device, self._parents
        _mirror(self, copied, partial(copy.deepcopy, memo=memo))
        return copied


def _mirror(source: nn.Module, target: nn.Module, of: Callable[[Any], Any]) -> nn.Module:
    for name, parameter in source._parameters.items():
        target.register_parameter(name, of(parameter))
    for name, buffer in source._buffers.items():
        target.register_buffer(name, of(buffer), persistent=name not in source._non_persistent_buffers_set)
    for name, child in source.named_children():
        target.add_module(name, _mirror(child, nn.Module(), of))
    return target
