"""What the training of every flow map shares: the optimiser, progress, captions dropped, logging, sampling."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.guidance import guided
from emf_lightning.flow.path import Velocity
from emf_lightning.flow.weighting import Weighting
from emf_lightning.modules.sharding import LIVE, data_parallel, is_sharded, shard, whole_network
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.text.base import TextFeatures

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The times at which the validation error is taken."""


@dataclass(frozen=True)
class CaptionedVelocity:
    """u(z, r, t) of a network, bound to the rows' captions.

    Attributes:
        net: the network.
        text: B captions' features.
    """

    net: FlowMapNetwork
    text: TextFeatures

    def __call__(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """u of the B rows, like ``z`` ``[B, C, H, W]``."""
        u: Tensor = self.net(z, r, t, self.text.context, self.text.mask)
        return u

    def rows(self, part: slice) -> CaptionedVelocity:
        """The same for a part of the rows."""
        return CaptionedVelocity(self.net, self.text[part])


class FlowMapModule(LightningModule):
    """Base of the LightningModules: one network, one objective, drawn from in few steps.

    Args:
        net: the network, ``net(z, r, t, context, mask)`` -> u.
        optimizer: called with the network's trainable parameters.
        scheduler: called with the optimiser, stepped once an optimiser step.
        weighting: from summed squared errors to losses.
        caption_dropout: share of the training captions replaced by the null caption, in [0, 1).
        guidance: scale of classifier-free guidance at sampling; 1 is none, anything else doubles the evaluations.
        initial: a Lightning checkpoint (``.ckpt``) whose network weights to start from, its EMA's where it has one.
        gather_once: where the weights are sharded, keep them whole from a step's first pass to its last: one
            gathering instead of one a pass, for the memory of the whole network.
    """

    def __init__(
        self,
        net: FlowMapNetwork,
        weighting: Weighting,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.1,
        guidance: float = 1.0,
        initial: str | None = None,
        gather_once: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), got {caption_dropout}")
        self.net = net
        self.weighting = weighting
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.caption_dropout = caption_dropout
        self.guidance = guidance
        self.gather_once = gather_once
        self._planned_steps = 0
        self._template: tuple[FlowMapNetwork] | None = None  # a tuple, so that it is no part of the module
        if initial is not None:
            self._start_from(initial)

    def _start_from(self, checkpoint: str) -> None:
        if not Path(checkpoint).is_file():
            raise ValueError(
                f"initial: no checkpoint at {checkpoint}; give the path of a .ckpt file that `emf fit` wrote"
            )
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        weights = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
        try:
            self.net.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"initial: {checkpoint} holds a network of another configuration than model.net: {str(error)[:300]}"
            ) from error

    @abstractmethod
    def objective(self, batch: CaptionImageBatch) -> Tensor:
        """The training loss of one batch, a scalar; logs what makes learning visible."""

    @abstractmethod
    def draw(self, u: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Latents from noise with this model's sampler."""

    def configure_model(self) -> None:
        """Shards the network where the strategy is ``ModelParallelStrategy``."""
        if self.device_mesh is None or is_sharded(self.net):
            return
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        for callback in self.trainer.callbacks if fitting else ():  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and not getattr(callback, "averages_shards", False):
                raise ValueError(
                    f"{type(callback).__name__} copies the whole module, which a sharded one does not allow: name "
                    "EMAWeights in trainer.callbacks instead, with the same arguments"
                )
        self._template = (shard(self.net, data_parallel(self.device_mesh)),)

    def whole_network(self) -> FlowMapNetwork | None:
        """A plain copy of the network with all its weights, on rank 0; None on the others. Every rank must call it."""
        return whole_network(self.net, self._template[0] if self._template else None)

    @property
    def progress(self) -> float:
        """Optimiser steps taken over optimiser steps planned, in [0, 1]."""
        return min(self.trainer.global_step / self._planned_steps, 1.0)

    def on_fit_start(self) -> None:
        if str(self.trainer.precision).endswith("16-true"):
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}: 16-bit weights lose the small updates of fine-tuning; "
                "set bf16-mixed, with ModelParallelStrategy where memory is short"
            )
        planned = self.trainer.estimated_stepping_batches
        if not 0 < planned < float("inf"):
            raise ValueError("the schedules need to know how long training is: set trainer.max_steps")
        self._planned_steps = int(planned)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.net.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Noise, times and dropped captions are a function of (seed, rank, step): a resumed run draws what the
        # uninterrupted one does, and nothing that callbacks draw in between can change it.
        trainer = self.trainer
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        key = (int(os.environ.get("PL_GLOBAL_SEED", 0)), trainer.global_rank, trainer.global_step, micro_batch)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # From a configuration they are plain values that rebuild the module; from Python they are the objects
        # themselves, and pickling the network once more would double the file and need trust to load.
        if any(isinstance(value, torch.nn.Module) for value in self.hparams.values()):
            checkpoint.pop("hyper_parameters", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # a sharded checkpoint that was made one file holds the live weights beside the averages
        state = checkpoint.get("state_dict", {})
        checkpoint |= {"state_dict": {k: v for k, v in state.items() if not k.startswith(LIVE)}} if state else {}

    def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> Tensor:
        with self._gathered():
            loss = self.objective(batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        if not (self.gather_once and is_sharded(self.net)):
            yield
            return
        assert isinstance(self.net, FSDPModule)
        self.net.set_reshard_after_forward(False)
        try:
            yield
        finally:
            self.net.set_reshard_after_forward(True)  # the backward pass shards each block again in any case

    def drop_captions(self, batch: CaptionImageBatch) -> tuple[TextFeatures, Tensor]:
        """The batch's features with a share of the rows made null, and which rows, ``[B]``."""
        dropped = torch.rand(len(batch), device=batch.latents.device) < self.caption_dropout
        return batch.text.where(~dropped, batch.null), dropped

    def velocity(self, text: TextFeatures, net: FlowMapNetwork | None = None) -> CaptionedVelocity:
        """u(z, r, t) of ``net``, or of this module's, given the rows' ``text``."""
        return CaptionedVelocity(net or self.net, text)

    def validation_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:
        self._log_error(batch, batch_idx, "validation")

    def test_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:
        self._log_error(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the ``SampleWriter`` callback draws, so that all step counts start from the same noise."""

    def _log_error(self, batch: CaptionImageBatch, batch_idx: int, stage: str) -> None:
        """Logs the mean squared error of u(z, t, t) against v at fixed times, with noise fixed by the batch's index."""
        x, u = batch.latents, self.velocity(batch.text)
        noise = torch.Generator().manual_seed(batch_idx)
        e = torch.randn(x.shape, generator=noise).to(x)
        for time in VALIDATION_TIMES:
            t = torch.full((len(batch),), time, device=x.device)
            error = (u((1 - time) * x + time * e, t, t).float() - (e - x)).square().mean()
            self.log(f"{stage}/mse_v_at_{time}", error, batch_size=len(batch), sync_dist=True)

    @torch.no_grad()
    def sample(
        self, text: TextFeatures, null: TextFeatures, noise: Tensor, steps: int, guidance: float | None = None
    ) -> Tensor:
        """Latents ``[B, C, H, W]`` of B captions.

        Args:
            text: their features.
            null: the null caption's, one row.
            noise: ``[B, C, H, W]``, unit normal.
            steps: how many.
            guidance: scale of classifier-free guidance; ``self.guidance`` where it is None.
        """
        scale = self.guidance if guidance is None else guidance
        u: Velocity = self.velocity(text)
        if scale != 1:
            u = guided(u, self.velocity(null.expand(len(text))), scale)
        return self.draw(u, noise, steps)

    def nfe(self, steps: int, guidance: float | None = None) -> int:
        """Network evaluations per image: twice the steps where guidance is on."""
        return steps if (self.guidance if guidance is None else guidance) == 1 else 2 * steps
