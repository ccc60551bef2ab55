"""Distillation with two networks in turn: the one that draws, and a critic that follows or judges it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.guidance import guided
from emf_lightning.flow.path import Velocity
from emf_lightning.flow.weighting import UniformWeighting
from emf_lightning.modules.base import FlowMapModule
from emf_lightning.modules.frozen import FrozenNetwork
from emf_lightning.networks.base import FlowMapNetwork

CRITIC_STEPS = "critic_steps"
"""Where a checkpoint keeps the critic's count."""


class CriticModule(FlowMapModule):
    """Base of the modules that distil ``net`` as it starts, and train a second network beside it, in turn.

    A batch is one step: ``critic_updates`` of the critic, then one of the network, with the other's parameters frozen.
    ``trainer.global_step`` counts the network's steps alone, and with it ``max_steps``, ``progress``, averages, scores
    and checkpoints; ``critic_steps`` counts the critic's. Both optimisers' states are in the checkpoint, and both
    schedules move once a batch. A subclass sets ``critic`` and calls ``save_hyperparameters``.

    Args:
        net: see ``FlowMapModule``, as ``optimizer``, ``scheduler``, ``guidance``, ``initial``.
        critic_optimizer: called with the critic's parameters; by default ``optimizer``.
        critic_scheduler: called with the critic's optimiser; by default ``scheduler``.
        critic_updates: of the critic before each of the network, at least 1.
        gradient_clip_val: largest norm of either network's gradient; None does not clip.
        micro_batches: parts of a batch whose gradients are accumulated, one part's activations in memory at a time.
        teacher_guidance: scale of classifier-free guidance in the teacher's velocity; all but 1 double its passes.
    """

    critic: nn.Module

    def __init__(
        self,
        net: FlowMapNetwork,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        critic_optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        critic_updates: int = 1,
        gradient_clip_val: float | None = 1.0,
        micro_batches: int = 1,
        teacher_guidance: float = 1.0,
        guidance: float = 1.0,
        initial: str | None = None,
    ) -> None:
        super().__init__(net, UniformWeighting(), optimizer, scheduler, 0.0, guidance, initial)
        for name, value in (("critic_updates", critic_updates), ("micro_batches", micro_batches)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.automatic_optimization = False
        self.critic_optimizer = critic_optimizer or optimizer
        self.critic_scheduler = critic_scheduler or scheduler
        self.critic_updates = critic_updates
        self.gradient_clip_val = gradient_clip_val
        self.micro_batches = micro_batches
        self.teacher_guidance = teacher_guidance
        self.teacher = FrozenNetwork(self.net)
        self.critic_steps = 0
        self.last_finite: Tensor | None = None
        """``[B]``, which rows of the network's last loss were finite: a subclass sets it."""

    @abstractmethod
    def critic_objective(self, batch: CaptionImageBatch) -> Tensor:
        """The critic's loss of one batch, a scalar; logs what makes learning visible."""

    def teacher_velocity(self, batch: CaptionImageBatch) -> Velocity:
        """The frozen teacher's, of the batch's captions, with guidance where there is any."""
        net = self.teacher.on(batch.latents.device)
        text = self.velocity(batch.text, net)
        if self.teacher_guidance == 1:
            return text
        return guided(text, self.velocity(batch.null.expand(len(batch)), net), self.teacher_guidance)

    @property
    def critic_turns(self) -> int:
        """Updates of the critic in this step."""
        return self.critic_updates

    # -- what the trainer is told -------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """None; but this is the first that the module hears of a trainer, and Lightning's own errors name no remedy."""
        trainer, name = self.trainer, type(self).__name__
        if trainer.gradient_clip_val:
            raise ValueError(
                f"{name}: trainer.gradient_clip_val clips one optimiser, and here are two: set it to null, and "
                f"model.init_args.gradient_clip_val to {trainer.gradient_clip_val}"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"{name}: trainer.accumulate_grad_batches accumulates for one optimiser, and here are two: leave it at "
                f"1, give the whole batch as data.batch_size, and set model.init_args.micro_batches to "
                f"{trainer.accumulate_grad_batches}"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(f"{name}: ModelParallelStrategy shards one network, and here are several: set ddp")
        return []

    def setup(self, stage: str) -> None:
        """Tells DDP that a backward pass is one network's: it would wait for the gradients of the other."""
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True

    def configure_optimizers(self) -> Any:
        optimizers, schedulers = [], []
        for network, make, schedule in (
            (self.net, self.optimizer, self.scheduler),
            (self.critic, self.critic_optimizer, self.critic_scheduler),
        ):
            optimizers.append(make([p for p in network.parameters() if p.requires_grad]))
            schedulers += [] if schedule is None else [schedule(optimizers[-1])]
        return optimizers, schedulers

    # -- a step -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:  # type: ignore[override]
        own, critics = self.optimizers()  # type: ignore[attr-defined]
        assert isinstance(own, LightningOptimizer) and isinstance(critics, LightningOptimizer)
        # Lightning counts each step of each optimiser, and resets these at every batch
        critics._on_before_step = critics._on_after_step = do_nothing_closure
        for _ in range(self.critic_turns):
            self._update(critics, batch, self.critic_objective)
            self.critic_steps += 1
        self._update(own, batch, self.objective)
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()  # type: ignore[call-arg]

    def _update(
        self, optimizer: LightningOptimizer, batch: CaptionImageBatch, objective: Callable[[CaptionImageBatch], Tensor]
    ) -> None:
        parts = batch.parts(self.micro_batches)
        for k, part in enumerate(parts):
            with optimizer.toggle_model(sync_grad=k == len(parts) - 1):
                loss = objective(part) * (len(part) / len(batch))
                with torch.autocast(self.device.type, enabled=False):
                    self.manual_backward(loss)
            torch.clear_autocast_cache()  # weights cast for one pass have a graph that is gone
        with torch.autocast(self.device.type, enabled=False):
            optimizer.step()
        optimizer.zero_grad()
        torch.clear_autocast_cache()  # and are old now

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # after the callbacks, who log the norm before it is clipped
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, "norm")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.last_finite is not None:
            self._stop_where_rows_stay_bad(self.last_finite)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CRITIC_STEPS] = self.critic_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.critic_steps = checkpoint.get(CRITIC_STEPS, 0)
