"""Distillation that trains two networks in turn: a generator, and an online flow or a discriminator."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.velocity import fresh_casts
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.optimization import Optimization
from emf_lightning.modules.requirements import check_teacher
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.frozen import FrozenNetwork

_STEPS, _EARLIER_STEPS = "auxiliary_steps", "critic_steps"
"""Keys of a checkpoint under which it counts the auxiliary network's steps, today and in earlier versions."""


@dataclass(frozen=True)
class Alternation:
    """Turns of the two networks.

    Attributes:
        auxiliary_updates: of the online flow or discriminator before each of the network, at least 1.
        gradient_clip_val: largest norm of either network's gradient; None does not clip.
        micro_batches: parts of a batch whose gradients are accumulated, one part's activations in memory at a time.
    """

    auxiliary_updates: int = 1
    gradient_clip_val: float | None = 1.0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for name in ("auxiliary_updates", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"Alternation: {name} must be at least 1, got {getattr(self, name)}")


class AlternatingModule(FlowMapModule, ABC):
    """Base of the modules that distil ``net`` as it starts, and train an auxiliary network beside it, in turn.

    A batch is one step: ``auxiliary_updates`` of the auxiliary network, then one of the network, with the other's
    parameters frozen. ``trainer.global_step`` counts the network's steps alone, and with it ``max_steps``,
    ``progress``, averages, scores and checkpoints; ``auxiliary_steps`` counts the other's. Both optimisers' states are
    in the checkpoint, and both schedules move once a batch.

    Attributes:
        AUXILIARY: name of the attribute that holds the auxiliary network; a subclass sets both.

    Args:
        net: see ``FlowMapModule``.
        objective: losses of both networks.
        optimization: of the network.
        auxiliary_optimization: of the auxiliary network; by default as the network's.
        alternation: how the two take turns.
        guidance_scale: see ``FlowMapModule``.
        init_from: see ``FlowMapModule``.
    """

    AUXILIARY: str
    trained_networks = 2

    def __init__(
        self,
        net: FlowMapNetwork,
        objective: Any,
        *,
        optimization: Optimization,
        auxiliary_optimization: Optimization | None,
        alternation: Alternation,
        guidance_scale: float,
        init_from: str | None,
    ) -> None:
        super().__init__(
            net,
            objective,
            optimization=optimization,
            caption_dropout=0.0,
            guidance_scale=guidance_scale,
            init_from=init_from,
        )
        self.automatic_optimization = False
        self.auxiliary_optimization = auxiliary_optimization or optimization
        self.alternation = alternation
        check_teacher(self.net, init_from)
        self.teacher = FrozenNetwork(self.net)
        self.auxiliary_steps = 0
        self._of_parts: dict[str, list[tuple[Tensor, int]]] | None = None
        """In an update of several parts of a batch: name -> (value, number of samples) of each part."""
        self.last_finite: Tensor | None = None
        """``[B]``, False for samples of the network's last loss that were not finite; a subclass sets it."""

    def train(self, mode: bool = True) -> AlternatingModule:
        """As Lightning's, but dropout stays off.

        The other network reads the difference of two outputs, and samples have no dropout: with it, the difference
        would not be 0 at the optimum. A teacher's configuration may have it.
        """
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.training = False
        return self

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.train(self.training)  # Lightning keeps the modes of modules as they are

    @property
    def auxiliary(self) -> nn.Module:
        """The online flow or discriminator."""
        network: nn.Module = getattr(self, self.AUXILIARY)
        return network

    @abstractmethod
    def compute_auxiliary_loss(self, batch: CaptionImageBatch) -> Tensor:
        """The auxiliary network's loss of one batch, a scalar; logs diagnostics."""

    @property
    def auxiliary_updates(self) -> int:
        """Updates of the auxiliary network in this step."""
        return self.alternation.auxiliary_updates

    # -- Trainer ------------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Validates Trainer settings, whose own errors name no remedy; adds no callbacks."""
        super().configure_callbacks()
        trainer, name = self.trainer, type(self).__name__
        if trainer.gradient_clip_val:
            raise ValueError(
                f"{name}: trainer.gradient_clip_val clips one optimiser, and here are two: set it to null, and "
                f"model.init_args.alternation.gradient_clip_val to {trainer.gradient_clip_val}"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"{name}: trainer.accumulate_grad_batches accumulates for one optimiser, and here are two: leave it at "
                f"1, give the whole batch as data.batch_size, and set model.init_args.alternation.micro_batches to "
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
        pairs = (self.optimization, self.net), (self.auxiliary_optimization, self.auxiliary)
        optimizers, schedulers = zip(*(o.build(network.parameters()) for o, network in pairs), strict=True)
        return list(optimizers), [scheduler for scheduler in schedulers if scheduler is not None]

    # -- a step -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer, auxiliary = self.optimizers()  # type: ignore[attr-defined]
        assert isinstance(optimizer, LightningOptimizer) and isinstance(auxiliary, LightningOptimizer)
        # Lightning counts each step of each optimiser, and resets these at every batch
        auxiliary._on_before_step = auxiliary._on_after_step = do_nothing_closure
        batch = batch.without_bad_features()
        for _ in range(self.auxiliary_updates):
            self._update(auxiliary, batch, self.compute_auxiliary_loss)
            self.auxiliary_steps += 1
        self._update(optimizer, batch, self.compute_loss)
        if (finite := self.last_finite) is not None:
            self.log("train/nan_rows", (~finite).sum().float(), batch_size=len(finite), reduce_fx="sum")
        schedulers = self.lr_schedulers() or []
        with warnings.catch_warnings():
            # the schedule of an auxiliary network whose term does not count yet moves on, too
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()  # type: ignore[call-arg]

    def _update(
        self, optimizer: LightningOptimizer, batch: CaptionImageBatch, loss_of: Callable[[CaptionImageBatch], Tensor]
    ) -> None:
        parts = batch.parts(self.alternation.micro_batches)
        finite: list[Tensor] = []
        self._of_parts = {} if len(parts) > 1 else None
        self.last_finite = None
        for k, part in enumerate(parts):
            self._part_of_step = k / len(parts)
            with fresh_casts(), optimizer.toggle_model(sync_grad=k == len(parts) - 1):
                loss = loss_of(part) * (len(part) / len(batch))
                with torch.autocast(self.device.type, enabled=False):
                    self.manual_backward(loss)
            if self.last_finite is not None:
                finite.append(self.last_finite)
        self._part_of_step = 0.0
        self.last_finite = torch.cat(finite) if finite else None
        of_parts, self._of_parts = self._of_parts, None
        for name, logged in (of_parts or {}).items():
            values = torch.stack([value for value, _ in logged])
            sizes = torch.tensor([float(size) for _, size in logged], device=self.device)
            kept = ~values.isnan()
            mean = torch.where(kept, values * sizes, 0).sum() / (kept * sizes).sum()
            super().log(name, mean, batch_size=len(batch))
        with fresh_casts(), torch.autocast(self.device.type, enabled=False):
            optimizer.step()
            optimizer.zero_grad()

    def log(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **options: Any) -> None:  # type: ignore[override]
        """Logs the mean over the parts of a batch; Lightning would keep the last part's value."""
        if self._of_parts is None or args or options or batch_size is None:
            super().log(name, value, *args, **options, batch_size=batch_size)  # type: ignore[misc]
            return
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        self._of_parts.setdefault(name, []).append((value, batch_size))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        # after the callbacks, which log the norm before clipping
        if self.alternation.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.alternation.gradient_clip_val, "norm")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.last_finite is not None:
            self._check_finite(self.last_finite)

    def log_metrics(self, metrics: dict[str, Tensor], finite: Tensor) -> None:
        """Logs the network's loss and its diagnostics, and keeps which samples are finite."""
        self.last_finite = finite
        for name, value in metrics.items():
            self.log(f"train/{name}", value, batch_size=len(finite))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STEPS] = self.auxiliary_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.auxiliary_steps = checkpoint.get(_STEPS, checkpoint.get(_EARLIER_STEPS, 0))
        state = checkpoint.get("state_dict", {})
        for name in [name for name in state if name.startswith("critic.")]:  # the name in earlier versions
            state[f"{self.AUXILIARY}.{name.removeprefix('critic.')}"] = state.pop(name)
