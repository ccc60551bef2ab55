"""The base of the objectives, their terms, and the masked, weighted error that most of them end in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.guidance import ClassifierFreeGuidance, SamplingGuidance, TargetGuidance
from emf_lightning.flow.path import expand_like, interpolate
from emf_lightning.flow.sampling import FlowMapSampler, Sampler
from emf_lightning.flow.target_velocity import ConditionalVelocity, TargetVelocity
from emf_lightning.flow.times import LogitNormalTimes, Times, TimeSampler
from emf_lightning.flow.velocity import (
    AverageVelocity,
    Context,
    Velocity,
    check_batch,
    expand_context,
    map_context,
    no_grad_pass,
)
from emf_lightning.flow.weighting import AdaptiveWeighting, Weighting


@dataclass(frozen=True)
class FlowMapTerms:
    """Loss and diagnostics of one batch; N samples have r < t, the rest r = t.

    Attributes:
        loss: the weighted loss over the finite samples, a scalar with a graph.
        squared_error: ``[B]``, mean over dimensions of (u - u_tgt)^2, detached.
        finite: ``[B]``, False for samples whose error is not finite; the loss leaves them out.
        cosine: ``[B]``, of u and v over all dimensions, detached.
        derivative_norm: ``[N]``, root mean square over dimensions of du/dt; empty for objectives without it.
        times: the samples' (r, t).
        u: ``[B, C, H, W]``, the prediction, with a graph; None after ``detached``.
        metrics: further scalars to log, detached.
    """

    loss: Tensor
    squared_error: Tensor
    finite: Tensor
    cosine: Tensor
    derivative_norm: Tensor
    times: Times
    u: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> FlowMapTerms:
        """The same without a graph."""
        return replace(self, loss=self.loss.detach(), u=None)


@dataclass(frozen=True)
class LossTerm:
    """Weight of a term of the loss, 0 before the optimiser step ``start``."""

    weight: float = 0.1
    start: int = 0

    def __call__(self, step: int) -> float:
        """The weight at an optimiser step."""
        return self.weight if step >= self.start else 0.0


class Objective(ABC):
    """Base of the objectives that train one network u(z, r, t) by regression.

    A subclass computes the error of u in ``terms``, and says by its class attributes what it asks for.

    Attributes:
        needs_interval: whether u has to depend on r.
        needs_guidance_conditioning: whether the network has to take guidance as a condition and predict v beside u.
        needs_negative_times: whether the network has to know a second flow, at negative times.
        takes_derivative: whether the r < t samples take du/dt.
        takes_sampling_context: whether it draws samples from the network, whose captions may be others than the data's.
        sampler: the sampler of models that it trains.
        sampling_guidance: how a guidance scale acts when sampling from them.
        derivative: computes du/dt, where the objective takes it.

    Args:
        times: sampler of (r, t).
        weighting: from summed squared errors to losses.
        velocity: source of v in target and tangent.
        guidance: classifier-free guidance inside the target; sampling then needs none.
        clip_target: the target of the r < t samples is clipped to +- this, elementwise; None does not clip. The exact u
            averages velocities, so it never leaves their range; du/dt of an untrained u does, and feeds on itself.

    Raises:
        ValueError: for a ``clip_target`` that is not positive, and for ``guidance.kappa`` where v is no e - x.
    """

    needs_interval = True
    needs_guidance_conditioning = False
    needs_negative_times = False
    takes_derivative = False
    takes_sampling_context = False
    sampler: Sampler = FlowMapSampler()
    sampling_guidance: SamplingGuidance = ClassifierFreeGuidance()
    derivative: Derivative | None = None

    def __init__(
        self,
        *,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        velocity: TargetVelocity | None = None,
        guidance: TargetGuidance | None = None,
        clip_target: float | None = None,
    ) -> None:
        if clip_target is not None and clip_target <= 0:
            raise ValueError(f"{type(self).__name__}: clip_target must be positive, got {clip_target}")
        self.times = times or LogitNormalTimes()
        self.weighting = weighting or AdaptiveWeighting()
        self.velocity = velocity or ConditionalVelocity()
        self.guidance = guidance
        if not isinstance(self.velocity, ConditionalVelocity):
            refuse_kappa(guidance, f"{type(self).__name__}: guidance", type(self.velocity).__name__)
        self.clip_target = clip_target

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        context: Context = None,
        *,
        progress: float = 0.0,
        null_context: Context = None,
        dropped: Tensor | None = None,
    ) -> FlowMapTerms:
        """Loss and diagnostics of a batch, at random times and noise.

        Args:
            net: called as ``net(z, r, t, context)`` -> u, with z and u ``[B, C, H, W]`` and fp32 times ``[B]``.
            x: ``[B, C, H, W]``, data.
            context: conditioning: a tensor ``[B, ...]``, or a tuple or dictionary of such tensors, which become further
                positional or keyword arguments of ``net``.
            progress: of training, in [0, 1]; schedules read it.
            null_context: conditioning without a caption, of one sample or of all; guidance needs it.
            dropped: ``[B]``, bool, True for samples whose conditioning is already the null one.

        Raises:
            ValueError: for conditioning of another number of samples, or guidance without ``null_context``.
        """
        times = self.times(len(x), progress, x.device)
        e = torch.randn_like(x)
        x, context, finite = zero_non_finite_inputs(x, context)
        z = interpolate(x, e, times.t)
        v = self.target_velocity(net, e - x, z, times.t, context, null_context, dropped)
        v = torch.where(expand_like(finite, v), v, torch.nan)  # marks the samples that do not count
        return self.terms(AverageVelocity(net, context), z, v, times, self.weighting, progress)

    @abstractmethod
    def terms(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """Loss and diagnostics at given states, velocities and times: the lower layer of ``__call__``.

        Args:
            u: the average velocity of all B samples; an ``AverageVelocity`` where it depends on conditioning.
            z: ``[B, C, H, W]``, the state at t.
            v: like ``z``, dz/dt: conditional, guided, or a teacher's; without a graph.
            times: the samples' (r, t), r < t samples first.
            weighting: from squared errors to losses.
            progress: of training, in [0, 1].
        """

    def clip(self, target: Tensor) -> Tensor:
        """``target`` clipped to +- ``clip_target``, elementwise."""
        return target if self.clip_target is None else target.clamp(-self.clip_target, self.clip_target)

    def target_velocity(
        self,
        net: Callable[..., Tensor],
        v: Tensor,
        z: Tensor,
        t: Tensor,
        context: Context,
        null_context: Context,
        dropped: Tensor | None = None,
        guidance: TargetGuidance | None = None,
    ) -> Tensor:
        """v at the states ``z`` ``[B, C, H, W]`` and ``t`` ``[B]``: its source's, and guided where the target is.

        Args:
            net: the network that trains.
            v: like ``z``, the conditional velocity e - x.
            z: the states.
            t: their times.
            context: see ``__call__``.
            null_context: see ``__call__``.
            dropped: see ``__call__``.
            guidance: by default the objective's.
        """
        guidance = guidance or self.guidance
        if guidance is not None and not guidance.changes_velocity:
            guidance = None
        if guidance is None and isinstance(self.velocity, ConditionalVelocity):
            return v
        if guidance is not None and null_context is None:
            raise ValueError(f"{type(self).__name__}: guidance needs null_context, the conditioning without a caption")
        reference = self.velocity.reference(net)
        conditional = AverageVelocity(reference, context)
        with no_grad_pass():
            v = self.velocity(v, conditional, z, t)
            if guidance is not None:
                null = AverageVelocity(reference, expand_context(null_context, len(z)))
                v = guidance(v, z, t, conditional=conditional, unconditional=null, dropped=dropped)
        return v


def refuse_kappa(guidance: TargetGuidance | None, name: str, velocity: str) -> None:
    """Raises ``ValueError`` where ``kappa`` of the guidance ``name`` weighs what the guided velocity is already."""
    if guidance is not None and guidance.kappa:
        raise ValueError(
            f"{name}.kappa weighs u(z, t, t | text) beside v = e - x, and {velocity} is that u already: leave kappa at "
            f"0, and give scale={guidance.effective_scale:g} for the same guidance"
        )


def zero_non_finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` ``[B, ...]`` with zeros for the samples in which a value is not finite, and which are finite, ``[B]``.

    A sample that is not finite must not enter a network, even where its loss is left out: the zero gradient of its
    output becomes NaN on the way back through its activations, and with it the gradient of every weight.
    """
    finite = x.detach().isfinite().reshape(len(x), -1).all(1)
    return torch.where(expand_like(finite, x), x, 0), finite


def zero_non_finite_inputs(x: Tensor, context: Context) -> tuple[Tensor, Context, Tensor]:
    """Data and conditioning of B samples with zeros for those that are not finite in either, and which are, ``[B]``.

    Raises:
        ValueError: for conditioning of another number of samples.
    """
    x, finite = zero_non_finite(x)
    whole = [finite]

    def zeroed(tensor: Tensor) -> Tensor:
        check_batch(tensor, len(x))
        if not tensor.is_floating_point():  # a mask, labels
            return tensor
        tensor, finite = zero_non_finite(tensor)
        whole.append(finite)
        return tensor

    context = map_context(context, zeroed)
    return x, context, torch.stack(whole).all(0)


def with_gradient_of(x: Tensor, counts: Callable[[], Tensor]) -> Tensor:
    """``x`` ``[B, ...]``, into whose samples no gradient flows but of those that ``counts``, ``[B]``, says.

    A loss that is left out because another network's output is not finite has a gradient of 0 times infinity, NaN.
    ``counts`` is called in the backward pass, when it is known.
    """
    if not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda g: torch.where(expand_like(counts(), g), g, 0))  # type: ignore[no-untyped-call]
    return x


def scaled_to(gradient: Tensor, norm: Tensor) -> Tensor:
    """``gradient`` scaled to ``norm``, a scalar; 0 stays 0."""
    length = gradient.detach().float().square().sum().sqrt()
    # divided before it is multiplied: norm / length would be infinite for a small length
    return gradient / length.clamp(min=torch.finfo(torch.float32).tiny) * norm


def with_pull(loss: Tensor, samples: Tensor, pull: Tensor, finite: Tensor) -> Tensor:
    """``loss`` in value, with ``pull`` added to its gradient at the finite ones of ``samples``, ``[B, C, H, W]``.

    Args:
        loss: a scalar with a graph.
        samples: with a graph.
        pull: like ``samples``, without a graph.
        finite: ``[B]``, True for samples that count.
    """
    product = (torch.where(expand_like(finite, samples), samples, 0) * pull).sum()
    return loss + (product - product.detach())


def weighted_mse(
    u: Tensor, target: Tensor, v: Tensor, times: Times, weighting: Weighting, dudt: Tensor | None = None
) -> FlowMapTerms:
    """Terms of the weighted squared error of u against a target without a graph, all ``[B, C, H, W]``.

    Samples whose error or v is not finite are marked and left out of the loss, so that one cannot spoil the others.
    """
    error = (u.float() - target).flatten(1)
    squared_error = error.detach().square().mean(1)
    finite = squared_error.isfinite() & v.isfinite().flatten(1).all(1)
    losses = weighting(torch.where(finite[:, None], error, 0).square().sum(1), times)
    return FlowMapTerms(
        loss=losses.sum() / finite.sum().clamp(min=1),
        squared_error=squared_error,
        finite=finite,
        cosine=torch.cosine_similarity(u.detach().float().flatten(1), v.float().flatten(1)),
        derivative_norm=v.new_zeros(0) if dudt is None else dudt.float().square().flatten(1).mean(1).sqrt(),
        times=times,
        u=u,
    )
