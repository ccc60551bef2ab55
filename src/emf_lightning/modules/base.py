"""What the training of every flow map shares: the optimiser, progress, captions dropped, logging, sampling."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.derivative.derivative import Derivative
from emf_lightning.flow.guidance import guided
from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.path import Velocity
from emf_lightning.flow.weighting import Weighting
from emf_lightning.modules.checkpoint import disagreement, first_difference, read_checkpoint
from emf_lightning.modules.sharding import LIVE, data_parallel, is_sharded, shard, whole_network
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.text.base import TextFeatures

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The times at which the validation error is taken."""

MEANING = "flow_map"
"""Where a checkpoint says what its weights mean."""

NAN_ROWS_LIMIT = 0.5
"""Share of non-finite rows above which a batch is bad: nothing is learned from the rest."""

Captioned = TypeVar("Captioned", bound="CaptionedVelocity")


@dataclass(frozen=True)
class CaptionedVelocity:
    """u(z, r, t) of a network, bound to the rows' captions.

    Attributes:
        net: the network.
        text: B captions' features.
        conditions: ``[B, K]``, what else a network is told that was built for it.
    """

    net: FlowMapNetwork
    text: TextFeatures
    conditions: Tensor | None = None

    def __call__(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """u of the B rows, like ``z`` ``[B, C, H, W]``; a velocity beside it is left out."""
        return self.heads(z, r, t)[:, : z.shape[1]]

    def heads(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """All that the network gives of the B rows."""
        heads: Tensor = self.net(z, r, t, self.text.context, self.text.mask, self.conditions)
        return heads

    def rows(self: Captioned, part: slice) -> Captioned:
        """The same for a part of the rows."""
        conditions = None if self.conditions is None else self.conditions[part]
        return replace(self, text=self.text[part], conditions=conditions)


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
        self.last_terms: FlowMapTerms | None = None
        """What the last training step computed, without a graph: for callbacks that look closer."""
        self.nan_patience = 10
        self._bad_batches = torch.zeros((), dtype=torch.long)
        self._suspicious = False
        self._planned_steps = 0
        self._loaded: dict[str, Any] = {}  # what a checkpoint that is gone on from says of itself
        self._template: tuple[FlowMapNetwork] | None = None  # a tuple, so that it is no part of the module
        if initial is not None:
            self._start_from(initial)

    def _start_from(self, checkpoint: str) -> None:
        saved = read_checkpoint(checkpoint, "initial")
        weights = {n.removeprefix("net."): value for n, value in saved["state_dict"].items() if n.startswith("net.")}
        what = f"initial: {checkpoint} holds a network of another configuration than model.net"
        if clash := disagreement(saved.get(MEANING, {}), self.net.parametrization):
            raise ValueError(f"{what}: {clash}; make them agree")
        try:
            self.net.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{what}: {first_difference(error)}") from error

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
                    "WeightEMA in trainer.callbacks instead, with the same arguments"
                )
        self._template = (shard(self.net, data_parallel(self.device_mesh)),)

    def whole_network(self) -> FlowMapNetwork | None:
        """A plain copy of the network with all its weights, on rank 0; None on the others. Every rank must call it."""
        return whole_network(self.net, self._template[0] if self._template else None)

    @property
    def derivative(self) -> Derivative | None:
        """How this model's objective takes du/dt, where it does."""
        return None

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
        # its state is loaded after this, as long as it looks alike
        if clash := disagreement(self._loaded, {"optimizer": type(self.trainer.optimizers[0]).__name__}):
            raise _other_configuration(clash)

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
        checkpoint[MEANING] = {"model": type(self).__name__, **self.net.parametrization}
        for optimizer in self.trainer.optimizers[:1]:  # none outside `fit`
            checkpoint[MEANING]["optimizer"] = type(optimizer).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # weights of the same shapes that mean something else would be taken, and draw nonsense
        self._loaded = checkpoint.get(MEANING, {})
        related = self._loaded.get("model") in {kind.__name__ for kind in type(self).__mro__}
        ours = ({} if related else {"model": type(self).__name__}) | self.net.parametrization
        if clash := disagreement(self._loaded, ours):
            raise _other_configuration(clash)
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

    def log_terms(self, terms: FlowMapTerms) -> None:
        """Keeps and logs what makes learning visible, without asking the device for a number."""
        self.last_terms = terms.detached()
        rows, n = len(terms.finite), terms.times.n_interval
        self.log("train/nan_rows", (~terms.finite).sum().float(), batch_size=rows, reduce_fx="sum")
        for name, part in (("r_equals_t", slice(n, None)), ("r_below_t", slice(n))):
            error, finite = terms.squared_error[part], terms.finite[part]
            if len(error):
                mean = torch.where(finite, error, 0).sum() / finite.sum()
                self.log(f"train/mse_{name}", mean, batch_size=rows)
        if len(terms.derivative_norm):
            self.log("train/derivative_norm", terms.derivative_norm.nanmedian(), batch_size=rows)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.last_terms is not None:
            self._stop_where_rows_stay_bad(self.last_terms.finite)

    def _stop_where_rows_stay_bad(self, finite: Tensor) -> None:
        """Counts bad batches on the device, and asks for the count at the logging interval or while it is not 0.

        Raises:
            ValueError: where the last ``nan_patience`` batches were bad.
        """
        bad = (~finite).float().mean() > NAN_ROWS_LIMIT
        self._bad_batches = torch.where(bad, self._bad_batches.to(finite.device) + 1, 0)
        step, interval = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._suspicious and step % max(interval, 1):
            return
        count = int(self._bad_batches)
        self._suspicious = count > 0
        if count >= self.nan_patience:
            raise ValueError(
                f"at step {step} more than half of the rows of the error are not finite, {count} batches in a "
                "row: lower the learning rate or net.time_scale, or train in fp32; resume from the last "
                "checkpoint whose errors are finite"
            )

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


def _other_configuration(clash: str) -> ValueError:
    return ValueError(
        f"ckpt_path: the checkpoint belongs to another configuration: {clash}; give the config.yaml that lies beside "
        "it in its run directory, or start from its weights alone with --model.init_args.initial"
    )
