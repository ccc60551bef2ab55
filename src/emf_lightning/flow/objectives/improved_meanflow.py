"""The Improved MeanFlow objective (arXiv 2512.02012): a true regression, with guidance as a condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.guidance import ConditionedGuidance, GuidanceCondition, GuidanceSampler
from emf_lightning.flow.objectives.base import FlowMapTerms, Objective, weighted_mse, zero_non_finite_inputs
from emf_lightning.flow.path import expand_like, interpolate
from emf_lightning.flow.target_velocity import ConditionalVelocity, TargetVelocity, TeacherVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule, Times, TimeSampler
from emf_lightning.flow.velocity import AverageVelocity, Context, Velocity, expand_context, no_grad_pass
from emf_lightning.flow.weighting import AdaptiveWeighting, Weighting


@dataclass(frozen=True)
class _Heads(AverageVelocity):
    """u and v of a network, side by side."""

    def __call__(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """``[B, 2 C, H, W]``: u(z, r, t) before v(z, r, t)."""
        return self.heads(z, r, t)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """v(z, t, t), like ``z`` and in its precision."""
        return self.heads(z, t, t)[:, z.shape[1] :].to(z.dtype)


def guided_velocity(v: Tensor, v_c: Tensor, v_u: Tensor, w: Tensor) -> Tensor:
    """v_g = v + (1 - 1 / w) (v_c - v_u), like ``v``: where v_c has learned v_g, it is w E[v | c] + (1 - w) v_u.

    Args:
        v: ``[B, C, H, W]``, conditional.
        v_c: like ``v``, prediction of the network with caption and guidance w.
        v_u: like ``v``, prediction without either.
        w: ``[B]``, the scale that acts at the samples' t.
    """
    return v + expand_like(1 - 1 / w, v) * (v_c - v_u)


class ImprovedMeanFlow(Objective):
    """Regression of V = u + (t - r) sg[du/dt] on v_g, with du/dt along the network's own velocity, and of v on v_g.

    MeanFlow's derivative along e - x makes its target depend on noise that u cannot see; along a function of z it is a
    regression, whose raw error falls while the network learns. V - v_g = u - u_tgt with u_tgt = v_g - (t - r) du/dt,
    the form used here. Gradients flow through u and v alone. The two losses are added, each with its own weight.

    Guidance is a condition of the network, random in training and set at sampling, so one model samples with any scale
    at one evaluation a step. Departures from the paper's release: u gets t as well as t - r, conditions are added to
    the time embedding rather than to the tokens, and samples without a caption take their tangent without it, too.

    Args:
        times: sampler of (r, t); by default LogitNormalTimes, sorted first, with half of the samples at r = t.
        weighting: from summed squared errors to losses, of u and of v.
        velocity: ``ConditionalVelocity`` (e - x, guided by the network's own v, which is the tangent, too) or
            ``TeacherVelocity`` (the teacher's guided velocity in both).
        guidance_sampler: of the guidance while training.
        sampling_interval: the (start, end) of t in which guidance acts at sampling.
        derivative: computes du/dt.
        clip_target: u_tgt of the r < t samples is clipped to +- this, elementwise; None does not clip.

    Example:
        >>> from emf_lightning.flow.guidance import GuidanceSampler
        >>> def net(z, r, t, c, conditions=None):  # u and v side by side
        ...     return torch.cat([z, z], dim=1)
        >>> objective = ImprovedMeanFlow(guidance_sampler=GuidanceSampler(largest=4.0))
        >>> objective(net, torch.randn(4, 2), torch.ones(4), null_context=torch.zeros(1)).finite.tolist()
        [True, True, True, True]
    """

    needs_guidance_conditioning = True
    takes_derivative = True

    def __init__(
        self,
        *,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        velocity: TargetVelocity | None = None,
        guidance_sampler: GuidanceSampler | None = None,
        sampling_interval: tuple[float, float] = (0.0, 1.0),
        derivative: Derivative | None = None,
        clip_target: float | None = None,
    ) -> None:
        super().__init__(
            times=times or LogitNormalTimes(flow_matching_ratio=Schedule(0.5), sort_first=True),
            weighting=weighting or AdaptiveWeighting(c=0.01),
            velocity=velocity,
            clip_target=clip_target,
        )
        if not isinstance(self.velocity, ConditionalVelocity | TeacherVelocity):
            raise ValueError(
                "ImprovedMeanFlow: velocity must be ConditionalVelocity or TeacherVelocity, got "
                f"{type(self.velocity).__name__}"
            )
        self.guidance_sampler = guidance_sampler or GuidanceSampler()
        self.sampling_guidance = ConditionedGuidance((sampling_interval[0], sampling_interval[1]))
        self.derivative: Derivative = derivative or ForwardMode()

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
        """Loss and diagnostics of a batch; see ``Objective.__call__``.

        ``net`` predicts ``[B, 2 C, H, W]``, u before v, and takes the guidance as ``conditions`` ``[B, 3]``.
        """
        if null_context is None:
            raise ValueError("ImprovedMeanFlow needs null_context, the conditioning without a caption")
        times = self.times(len(x), progress, x.device)
        guidance = self.guidance_sampler(times)
        e = torch.randn_like(x)
        x, context, finite = zero_non_finite_inputs(x, context)
        z = interpolate(x, e, times.t)
        null = expand_context(null_context, len(x))
        v_g, v_c = self._velocities(net, e - x, z, times.t, guidance.at(times.t), context, null, dropped)
        v_g = torch.where(expand_like(finite, v_g), v_g, torch.nan)  # marks the samples that do not count
        heads = _Heads(net, context, {"conditions": guidance.conditions})
        return self.head_terms(heads, z, v_g, v_c, times, self.weighting)

    def _velocities(
        self,
        net: Callable[..., Tensor],
        v: Tensor,
        z: Tensor,
        t: Tensor,
        w: Tensor,
        context: Context,
        null: Context,
        dropped: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The target v_g and the tangent, both like ``v``; ``dropped`` samples are not guided."""
        with no_grad_pass():
            if isinstance(self.velocity, TeacherVelocity):
                teacher = self.velocity.reference(net)
                v_u = AverageVelocity(teacher, null)(z, t, t).to(v.dtype)
                v_g = v_u + expand_like(w, v) * (AverageVelocity(teacher, context)(z, t, t).to(v.dtype) - v_u)
                return v_g, v_g
            conditions = {"conditions": GuidanceCondition.everywhere(w).conditions}
            v_c = _Heads(net, context, conditions).velocity(z, t)
            v_g = guided_velocity(v, v_c, _Heads(net, null).velocity(z, t), w)
            return (v_g if dropped is None else torch.where(expand_like(dropped, v), v, v_g)), v_c

    def terms(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """Both errors without guidance, ``v`` being target and tangent; ``u`` predicts ``[B, 2 C, H, W]``."""
        return self.head_terms(u, z, v, v, times, weighting)

    def head_terms(
        self, heads: Velocity, z: Tensor, v_g: Tensor, v_c: Tensor, times: Times, weighting: Weighting
    ) -> FlowMapTerms:
        """Both errors: the terms are u's, the loss is the sum, and a sample is finite where both errors are.

        Args:
            heads: u and v of all samples, side by side, ``[B, 2 C, H, W]``.
            z: ``[B, C, H, W]``, the state at t.
            v_g: like ``z``, the guided velocity, without a graph.
            v_c: like ``z``, the tangent: the network's own velocity, without a graph.
            times: the samples' (r, t), r < t samples first.
            weighting: from squared errors to losses, of u and of v.
        """
        n, r, t = times.n_interval, times.r, times.t
        both, derivatives = self.derivative(heads, z, r, t, v_c, n)
        (u, v), dudt = both.chunk(2, dim=1), derivatives[:, : z.shape[1]]
        u_tgt = self.clip(v_g[:n] - expand_like(t[:n] - r[:n], z) * dudt.to(v_g.dtype))
        of_u = weighted_mse(u, torch.cat([u_tgt, v_g[n:]]), v_g, times, weighting, dudt)
        of_v = weighted_mse(v, v_g, v_g, times, weighting)
        return replace(of_u, loss=of_u.loss + of_v.loss, finite=of_u.finite & of_v.finite)
