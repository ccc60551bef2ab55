"""MeanFlow joined with the teacher's refinement of the network's own few-step samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.base import (
    FlowMapTerms,
    refuse_kappa,
    scaled_to,
    with_pull,
    zero_non_finite,
    zero_non_finite_inputs,
)
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.path import expand_like, interpolate
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.times import TimeSampler
from emf_lightning.flow.velocity import (
    AverageVelocity,
    Context,
    Velocity,
    expand_context,
    no_grad_pass,
    select_context,
)
from emf_lightning.flow.weighting import Weighting


@dataclass(frozen=True)
class Refinement:
    """Settings of the refinement.

    Attributes:
        weight: norm of its gradient at the samples over that of the regression's at the network's output.
        start: progress of training, in [0, 1), from which it counts: before, samples show little to refine.
        starts: times s from which a sample's last jump starts, each as often as the others: 1 is a one-step sample, 1/2
            the second step of two. The state at s < 1 is the network's own, by one jump from the noise.
        times: the least and greatest t to which a sample is moved back, each in (0, 1).
        solver_steps: Euler steps of the teacher from there.
        softness: c of the loss sqrt(d^2 + c^2), which is |d| for larger differences d.
        guidance: the teacher's in the refinement; None is that of MeanFlow's target.
        share: of the batch's captions, in (0, 1], the first ones, rounded up: samples of these alone are drawn and
            refined. The weight holds for their gradient as a whole.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> Refinement(starts=(1.0, 0.5)).times
        (0.4, 0.7)
    """

    weight: float = 8.0
    start: float = 0.5
    starts: tuple[float, ...] = (1.0,)
    times: tuple[float, float] = (0.4, 0.7)
    solver_steps: int = 4
    softness: float = 0.02
    guidance: TargetGuidance | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.starts or not all(0 < s <= 1 for s in self.starts):
            raise ValueError(f"Refinement: starts must be one or more times in (0, 1], got {list(self.starts)}")
        least, greatest = self.times
        if not 0 < least <= greatest < 1:
            raise ValueError(f"Refinement: times must be 0 < least <= greatest < 1, got ({least}, {greatest})")
        if not self.weight > 0 or not 0 <= self.start < 1:
            raise ValueError(
                f"Refinement: needs a weight above 0 and start in [0, 1), got {self.weight} and {self.start}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"Refinement: share must lie in (0, 1], got {self.share}")
        if self.solver_steps < 1 or not self.softness > 0:
            raise ValueError(
                f"Refinement: needs solver_steps of at least 1 and softness above 0, got {self.solver_steps} and "
                f"{self.softness}"
            )


class RefinedMeanFlow(MeanFlow):
    """MeanFlow, and from ``refinement.start`` on a loss of the network's own samples of one or two steps.

    Where two images are equally near to a noise, a one-step sample shows both, one of them faint. The squared error of
    a faint object is small, and no target of MeanFlow depends on the sample. Here x = e - u(e, 0, 1) is moved back
    along its own noise to z = (1 - t) x + t e, and the teacher's solver, guided as MeanFlow's target is, draws y from
    z: a clean image, which decides for what x shows best. The loss is the mean of |x - sg(y)| over dimensions, whose
    gradient does not vanish with the opacity of what is wrong. y stays near x, so that the network keeps the variety
    that MeanFlow gave it. No network is trained beside it, and no data are read but captions.

    The target is SDEdit's (arXiv 2108.01073) image of the sample, with the sample's own noise. Imagine Flash
    (arXiv 2405.05224) is a relative: it takes the teacher's step from states that the student has reached itself.

    Args:
        refinement: its settings.
        times: see ``MeanFlow``.
        weighting: see ``MeanFlow``.
        velocity: holds the teacher; by default that of ``FlowMapModule``, its network as training starts.
        guidance: see ``MeanFlow``.
        derivative: see ``MeanFlow``.
        clip_target: see ``MeanFlow``.

    Example:
        >>> net = torch.nn.Linear(4, 4)
        >>> objective = RefinedMeanFlow(velocity=TeacherVelocity(lambda z, r, t: z))
        >>> terms = objective(lambda z, r, t: net(z), torch.randn(8, 4), progress=0.5)
        >>> sorted(terms.metrics)
        ['refinement_error', 'sample_std']
    """

    takes_sampling_context = True

    def __init__(
        self,
        *,
        refinement: Refinement = Refinement(),
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        velocity: TeacherVelocity | None = None,
        guidance: TargetGuidance | None = None,
        derivative: Derivative | None = None,
        clip_target: float | None = None,
    ) -> None:
        super().__init__(
            times=times,
            weighting=weighting,
            velocity=velocity or TeacherVelocity(),
            guidance=guidance,
            derivative=derivative,
            clip_target=clip_target,
        )
        refuse_kappa(refinement.guidance, f"{type(self).__name__}: refinement.guidance", type(self.velocity).__name__)
        self.refinement = refinement

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        context: Context = None,
        *,
        progress: float = 0.0,
        null_context: Context = None,
        dropped: Tensor | None = None,
        sampling_context: Context = None,
    ) -> FlowMapTerms:
        """Loss and diagnostics of a batch; see ``Objective.__call__``. The loss's value is the regression's.

        ``sampling_context`` is the conditioning of the samples, by default ``context``.
        """
        terms = super().__call__(net, x, context, progress=progress, null_context=null_context, dropped=dropped)
        if progress < self.refinement.start or not terms.loss.requires_grad:  # as in validation
            return terms
        assert terms.u is not None
        reference = torch.autograd.grad(terms.loss, terms.u, retain_graph=True)[0].float().norm()
        if sampling_context is not None:
            context, dropped = sampling_context, None
        rows = slice(math.ceil(self.refinement.share * len(x)))
        e, context, usable = zero_non_finite_inputs(torch.randn_like(x[rows]), select_context(context, rows, len(x)))
        null_context = select_context(expand_context(null_context, len(x)), rows, len(x))
        dropped = None if dropped is None else dropped[rows]
        sample = self.sample(AverageVelocity(net, context), e)
        error = sample.detach() - self.refined(net, sample.detach(), e, context, null_context, dropped)
        error, finite = zero_non_finite(error.float())
        finite &= usable
        pull = error / (error.square() + self.refinement.softness**2).sqrt()
        pull = scaled_to(pull, self.refinement.weight * reference)
        all_finite = terms.finite.clone()
        all_finite[rows] &= finite
        return replace(
            terms,
            loss=with_pull(terms.loss, sample, pull, finite),
            finite=all_finite,
            metrics=terms.metrics
            | {"refinement_error": error.abs().mean()}
            | ({"sample_std": sample.detach().std(0).mean()} if len(sample) > 1 else {}),
        )

    def sample(self, u: Velocity, noise: Tensor) -> Tensor:
        """Samples of the network, like ``noise`` ``[B, C, H, W]``, with the graph of the last jump, from ``starts``."""
        one = torch.ones(len(noise), device=noise.device, dtype=torch.float32)
        z, s = noise, one
        if self.refinement.starts != (1.0,):
            starts = torch.tensor(self.refinement.starts, device=noise.device, dtype=torch.float32)
            s = starts[torch.randint(len(starts), (len(noise),), device=noise.device)]
            with no_grad_pass():
                z = z - expand_like(one - s, z).to(z.dtype) * u(z, s, one).to(z.dtype)
        return z - expand_like(s, z).to(z.dtype) * u(z, torch.zeros_like(s), s).to(z.dtype)

    def refined(
        self,
        net: Callable[..., Tensor],
        sample: Tensor,
        noise: Tensor,
        context: Context = None,
        null_context: Context = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """The teacher's images of samples that are moved back along their own noise, all ``[B, C, H, W]``."""
        settings = self.refinement
        least, greatest = settings.times
        t = least + (greatest - least) * torch.rand(len(sample), device=sample.device, dtype=torch.float32)
        z = interpolate(sample, noise, t)
        with no_grad_pass():
            for k in range(settings.solver_steps, 0, -1):
                time = t * (k / settings.solver_steps)
                v = self.target_velocity(net, z, z, time, context, null_context, dropped, settings.guidance)
                z = z - expand_like(t / settings.solver_steps, z).to(z.dtype) * v.to(z.dtype)
        return z
