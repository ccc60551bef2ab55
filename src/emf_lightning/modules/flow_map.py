"""The LightningModule that trains a network by one objective, and the base of those that train two."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, WeightAveraging
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.objectives.base import FlowMapTerms, Objective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.sampling import Sampler, sample
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.modules import checkpoint as checkpoints
from emf_lightning.modules.accumulation import MeanOfAccumulated
from emf_lightning.modules.non_finite import NonFiniteGuard
from emf_lightning.modules.optimization import Optimization, lightning_optimizers
from emf_lightning.modules.requirements import check_network, check_teacher, reads_own_null
from emf_lightning.modules.sharding import LIVE, ShardableModule
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.frozen import FrozenNetwork
from emf_lightning.text.base import TextFeatures

if TYPE_CHECKING:
    from PIL.Image import Image

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The times at which the validation error is taken."""


class FlowMapModule(MeanOfAccumulated, ShardableModule):
    """Trains a network u(z, r, t) by an objective, and samples from it in few steps.

    Attributes:
        trained_networks: how many networks train.
        tunes_encoder: whether the text encoder trains, too.
        needs_images: whether it learns from images, and not from captions alone.
        last_terms: terms of the last training step, without a graph, for callbacks.
        pipeline: the pipeline of a loaded run, which ``sample`` uses.

    Args:
        net: the network, called as ``net(z, r, t, context, mask)`` -> u.
        objective: e.g. ``MeanFlow`` (the default), ``FlowMatching``, ``AlphaFlow``.
        optimization: optimiser and schedule of the network's trainable parameters.
        caption_dropout: share of the training captions replaced by the null caption, in [0, 1).
        guidance_scale: of classifier-free guidance at sampling; 1 is none, anything else doubles the evaluations,
            unless the network takes guidance as a condition.
        init_from: a Lightning checkpoint (``.ckpt``) whose network weights to start from, its EMA's where it has one.
        nan_patience: consecutive batches with more than half of their samples, or the gradient, not finite after which
            training stops. A step whose gradient is not finite changes no weights but by the optimiser's momentum.
            Single samples that are not finite are left out of the loss.
        gather_once: where the weights are sharded, gather them once a step instead of once a pass, for the memory of
            the whole network.

    Raises:
        ValueError: for a network that lacks what the objective needs, and for values out of range.

    Example:
        >>> from emf_lightning.networks.sana import SanaArchitecture
        >>> size = SanaArchitecture(1, 2, 8, 2, 8, patch_size=12)
        >>> net = SanaFlowMap(size)
        >>> module = FlowMapModule(net, MeanFlow(), optimization=Optimization(torch.optim.AdamW))
        >>> module.nfe(4), module.nfe(4, guidance_scale=2.0)
        (4, 8)
    """

    trained_networks = 1
    tunes_encoder = False
    needs_images = True

    def __init__(
        self,
        net: FlowMapNetwork,
        objective: Objective | None = None,
        *,
        optimization: Optimization = Optimization(),
        caption_dropout: float = 0.1,
        guidance_scale: float = 1.0,
        init_from: str | None = None,
        nan_patience: int = 10,
        gather_once: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), got {caption_dropout}")
        self.net = net
        self.objective: Any = MeanFlow() if objective is None else objective
        self.optimization = optimization
        self.caption_dropout = caption_dropout
        self.guidance_scale = guidance_scale
        self.gather_once = gather_once
        self.last_terms: FlowMapTerms | None = None
        self.pipeline: Any = None
        self._non_finite = NonFiniteGuard(nan_patience)
        self._planned_steps = 0
        self._part_of_step = 0.0  # of the samples whose gradients an optimiser step sums, how many are done
        self._sampler: Sampler | None = None
        self._sampled: FlowMapNetwork | None = None
        self._loaded: dict[str, Any] = {}  # the parametrization of the checkpoint that training resumes from
        check_network(self.net, self.objective)
        if init_from is not None:
            checkpoints.load_network(self.net, init_from)
        velocity = getattr(self.objective, "velocity", None)
        if isinstance(velocity, TeacherVelocity) and not velocity.given:
            check_teacher(self.net, init_from)
            velocity.teacher = FrozenNetwork(self.net)
        if _given_hyperparameters.get() is not None:
            # from a configuration: plain values that rebuild the module. Of one built in Python, Lightning would copy
            # the network and its teacher, and keep the copies.
            self.save_hyperparameters(logger=False)

    def sample(
        self,
        prompts: str | Sequence[str],
        steps: int = 4,
        *,
        guidance_scale: float | None = None,
        images_per_prompt: int = 1,
        seed: int = 0,
    ) -> list[Image]:
        """PIL images of one prompt or several, as ``EMFPipeline`` generates them, in one batch.

        Args:
            prompts: images of one prompt are beside each other.
            steps: from noise to data.
            guidance_scale: by default the module's own.
            images_per_prompt: each from its own noise.
            seed: of the noise, a function of (seed, prompt, image index).

        Raises:
            ValueError: for a module without a datamodule, for no prompts, steps or images, and for a prompt that is no
                text.
        """
        from emf_lightning.modules.generation import attached_pipeline  # imports diffusers

        pipeline, modes = attached_pipeline(self), {part: part.training for part in self.modules()}
        self.eval()
        try:
            (images,) = pipeline(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=images_per_prompt,
                seed=seed,
                return_dict=False,
            )
        finally:
            for part, mode in modes.items():
                part.training = mode
        return list(images)

    @torch.no_grad()
    def sample_latents(
        self, text: TextFeatures, null: TextFeatures, noise: Tensor, steps: int, guidance_scale: float | None = None
    ) -> Tensor:
        """Latents ``[B, C, H, W]`` of B captions.

        Args:
            text: features of the captions.
            null: features of the null caption, one sample.
            noise: ``[B, C, H, W]``, unit normal.
            steps: from noise to data.
            guidance_scale: by default the module's own.
        """
        return sample(
            self._sampled or self.net,
            noise,
            text.conditioning,
            steps=steps,
            sampler=self._sampler or self.objective.sampler,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            null_context=null.conditioning,
            guidance=self.objective.sampling_guidance,
        )

    @contextmanager
    def sampling_with(self, sampler: Sampler, net: FlowMapNetwork | None = None) -> Iterator[None]:
        """A context in which ``sample_latents`` takes ``sampler``, and ``net`` in place of this module's."""
        self._sampler = sampler
        object.__setattr__(self, "_sampled", net)  # not a part of this module
        try:
            yield
        finally:
            self._sampler = self._sampled = None

    def nfe(self, steps: int, guidance_scale: float | None = None) -> int:
        """Network evaluations per image."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return steps * int(self.objective.sampling_guidance.evaluations(scale))

    def compute_loss(self, batch: CaptionImageBatch) -> Tensor:
        """The training loss of one batch, a scalar; logs diagnostics."""
        text, dropped = self.drop_captions(batch)
        sampling = {} if batch.sampling is None else {"sampling_context": batch.sampling.conditioning}
        terms = self.objective(
            self.net,
            batch.latents,
            text.conditioning,
            progress=self.progress_of_batch,
            null_context=batch.null.conditioning,
            dropped=dropped,
            **sampling,
        )
        self.log_terms(terms)
        return terms.loss

    def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> Tensor:
        with self.gathered():
            loss = self.compute_loss(batch.without_bad_features())
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    def drop_captions(self, batch: CaptionImageBatch) -> tuple[TextFeatures, Tensor]:
        """The batch's features with a share of the captions made null, and which, ``[B]``."""
        dropped = torch.rand(len(batch), device=batch.latents.device) < self.caption_dropout
        return batch.text.where(~dropped, batch.null), dropped

    def average_velocity(self, text: TextFeatures, net: FlowMapNetwork | None = None) -> AverageVelocity:
        """u(z, r, t) of ``net``, or of this module's, given the samples' ``text``."""
        return AverageVelocity(net or self.net, text.conditioning)

    @property
    def derivative(self) -> Derivative | None:
        """The objective's method for du/dt, if it takes it."""
        derivative: Derivative | None = getattr(self.objective, "derivative", None)
        return derivative

    @property
    def progress(self) -> float:
        """Optimiser steps taken over optimiser steps planned, in [0, 1]."""
        return min(self.trainer.global_step / self._planned_steps, 1.0)

    @property
    def progress_of_batch(self) -> float:
        """``progress`` as objectives read it: a batch whose gradient is a part of a step's is a part of that step."""
        return min(self.progress + self._part_of_step / max(self._planned_steps, 1), 1.0)

    def log_terms(self, terms: FlowMapTerms) -> None:
        """Keeps the terms and logs their means, without waiting for the device."""
        self.last_terms = terms.detached()
        batch, n = len(terms.finite), terms.times.n_interval
        self.log("train/nan_rows", (~terms.finite).sum().float(), batch_size=batch, reduce_fx="sum")
        for name, part in (("r_equals_t", slice(n, None)), ("r_below_t", slice(n))):
            error, finite = terms.squared_error[part], terms.finite[part]
            if len(error):
                mean = torch.where(finite, error, 0).sum() / finite.sum()
                self.log(f"train/mse_{name}", mean, batch_size=batch)
        for name, value in terms.metrics.items():
            self.log(f"train/{name}", value, batch_size=batch)
        if len(terms.derivative_norm):
            self.log("train/derivative_norm", terms.derivative_norm.nanmedian(), batch_size=batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Noise, times and dropped captions are a function of (seed, rank, step): a resumed run repeats the
        # uninterrupted one, and no random number that a callback takes in between changes it.
        trainer = self.trainer
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        self._part_of_step = micro_batch / trainer.accumulate_grad_batches
        key = (int(os.environ.get("PL_GLOBAL_SEED", 0)), trainer.global_rank, trainer.global_step, micro_batch)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # float16's scaler leaves such steps out
            self._non_finite.zero_gradient(optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.last_terms is not None:
            self._check_finite(self.last_terms.finite)

    def _check_finite(self, finite: Tensor) -> None:
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._non_finite.check(finite, self.trainer.global_step, interval)

    def validation_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:
        self._log_error(batch, batch_idx, "validation")

    def test_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:
        self._log_error(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: the ``SampleWriter`` callback samples, so that all step counts start from the same noise."""

    def _log_error(self, batch: CaptionImageBatch, batch_idx: int, stage: str) -> None:
        """Logs the mean squared error of u(z, t, t) against v at fixed times, with noise fixed by rank and batch."""
        x, u = batch.latents, self.average_velocity(batch.text)
        noise = torch.Generator().manual_seed(batch_idx + (self.global_rank << 20))
        e = torch.randn(x.shape, generator=noise).to(x)
        for time in VALIDATION_TIMES:
            t = torch.full((len(batch),), time, device=x.device)
            error = (u((1 - time) * x + time * e, t, t).float() - (e - x)).square().mean()
            self.log(f"{stage}/mse_v_at_{time}", error, batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return lightning_optimizers(*self.optimization.build(self.net.parameters()))

    def configure_callbacks(self) -> list[Callback]:
        """Refuses callbacks that cannot work with this module; adds none."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
                raise ValueError(
                    f"{type(callback).__name__} changes an attribute of the module or the data, and these read theirs "
                    "once; set data.batch_size by `emf plan`, and compare learning rates with `emf compare`"
                )
        return []

    def on_fit_start(self) -> None:
        if not self.caption_dropout and reads_own_null(self.objective):
            rank_zero_warn(
                f"{type(self).__name__}: guidance reads the network's own velocity without a caption, which no sample "
                "trains (caption_dropout is 0 here): give TeacherVelocity, whose teacher knows it, or no guidance"
            )
        if str(self.trainer.precision).startswith("64"):
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}: latents and features are fp32; set 32-true"
            )
        if str(self.trainer.precision).endswith("16-true"):
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}: 16-bit weights lose the small updates of fine-tuning; "
                "set bf16-mixed, with ModelParallelStrategy where memory is short"
            )
        data = getattr(self.trainer, "datamodule", None)
        if self.needs_images and not getattr(data, "images", True):
            raise ValueError(
                f"data.images: false gives no images, and {type(self).__name__} learns from them; leave it out, or "
                "take FGM, which learns from captions alone"
            )
        captions = getattr(data, "sampling_captions", None)
        if captions is not None and not getattr(self.objective, "takes_sampling_context", False):
            raise ValueError(
                f"data.sampling_captions: {type(self.objective).__name__} draws no samples of captions of their own; "
                "leave it out, or take RefinedMeanFlow or JointObjective"
            )
        planned = self.trainer.estimated_stepping_batches
        if not 0 < planned < float("inf"):
            raise ValueError("the schedules need to know how long training is: set trainer.max_steps")
        self._planned_steps = int(planned)
        if self.trainer.max_epochs not in (None, -1) and math.isinf(self.trainer.num_training_batches):
            rank_zero_warn(
                f"trainer.max_epochs={self.trainer.max_epochs} may end training before step {planned}, which all "
                "schedules run to: leave it at -1, and set trainer.max_steps to the steps of that many passes"
            )
        # Lightning loads the optimiser's state after this, whichever optimiser it came from
        checkpoints.check_parametrization(self._loaded, _trained(self.trainer.optimizers))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not getattr(self.trainer.strategy, "_save_distributed_checkpoint", False):  # its parts are read whole
            checkpoints.leave_out_parents(checkpoint, self)
        saved = (getattr(callback, "_last_checkpoint_saved", "") for callback in self.trainer.checkpoint_callbacks)
        checkpoints.check_finite(checkpoint, self.trainer.global_step, next(filter(None, saved), None))
        # A module of one's own may save hyperparameters that are objects: pickling the network once more would double
        # the file and need trust to load.
        if any(isinstance(value, torch.nn.Module) for value in self.hparams.values()):
            checkpoint.pop("hyper_parameters", None)
        names = {"model": type(self).__name__, "objective": type(self.objective).__name__}
        checkpoint[checkpoints.PARAMETRIZATION] = names | self.net.parametrization | _trained(self.trainer.optimizers)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], optimizers: Sequence[Any] = ()) -> None:
        """Raises a ``ValueError`` where training cannot go on from ``checkpoint``.

        Weights of the same shapes but another parametrization would load, and sample nonsense.
        """
        self._loaded = checkpoints.parametrization_of(checkpoint)
        checkpoints.check_kinds(self._loaded, model=self, objective=self.objective)
        checkpoints.check_parametrization(self._loaded, checkpoints.described(self.net) | _trained(optimizers))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        checkpoints.put_parents_back(checkpoint, self)
        trainer: Any = self._trainer
        if trainer is not None and trainer.training and "current_model_state" in checkpoint:
            averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
            if not averaged:  # the optimiser's state belongs to the last step's weights
                checkpoint["state_dict"] = checkpoint["current_model_state"]
        # a sharded checkpoint that was made one file holds the live weights beside the averages
        state = checkpoint.get("state_dict", {})
        for name in [name for name in state if name.startswith(LIVE)]:
            del state[name]


def _trained(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """What the state of the network's optimiser, the first, belongs to."""
    if not optimizers:
        return {}
    tensors = sum(len(group["params"]) for group in optimizers[0].param_groups)
    return {"optimizer": type(optimizers[0]).__name__, "number of tensors that train": tensors}
