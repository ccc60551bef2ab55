"""TwinFlow (arXiv 2512.05150): distribution matching in one network, without a teacher or an online flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.base import FlowMapTerms, weighted_mse
from emf_lightning.flow.objectives.rcgm import RCGM
from emf_lightning.flow.path import interpolate
from emf_lightning.flow.sampling import flow_map_rollout
from emf_lightning.flow.target_velocity import TargetVelocity
from emf_lightning.flow.times import AnyStepTimes, Schedule, Times
from emf_lightning.flow.velocity import (
    AverageVelocity,
    Context,
    Velocity,
    expand_context,
    no_grad_pass,
    select_context,
    slice_velocity,
    stop_gradient,
)
from emf_lightning.flow.weighting import Weighting


class TwinFlow(RCGM):
    """RCGM; the flow of the network's own one-step samples, at negative times; and one step towards where they differ.

    The last ``fake_ratio`` of a batch is replaced by one-step samples x = sg[e' - u(e', 0, 1)], and trains the fake
    flow u(z_t, -t, -t) on e - x. The samples with t = 1 and r = 0 take a second target beside RCGM's,
    sg[u - clip(d, +-1)] with d = u(x_s, -s, -s) - u(x_s, s, s), where x_s is their own x = e - u(e, 0, 1), noised anew
    to s uniform on (0, 1). In velocities d is DMD's gradient, so x moves towards the real flow's denoised image.

    The release has d without guidance; where the real flow was trained with guidance, d contains it. The terms are
    RCGM's, and ``train/velocity_gap`` is the mean of d^2, ``train/fake_flow_mse`` the fake flow's error.

    Args:
        fake_ratio: share of a batch that trains the fake flow, in (0, 1); a quarter in the release.
        rectification: weight of the second target's loss, over training; .5 in the release.
        order: see ``RCGM``.
        step: see ``RCGM``.
        residual_bound: see ``RCGM``.
        times: sampler of the other samples' (r, t).
        weighting: see ``RCGM``; fake samples weigh as those with t = 1 and r = 0.
        velocity: see ``RCGM``.
        guidance: see ``RCGM``.

    Raises:
        ValueError: for values out of range, and for a batch too small to hold a sample of each kind.

    Example:
        >>> def net(z, r, t):
        ...     return torch.where(t[:, None] < 0, 2 * z, z)
        >>> terms = TwinFlow()(net, torch.randn(8, 4))
        >>> terms.times.n_interval, sorted(terms.metrics)
        (4, ['fake_flow_mse', 'velocity_gap'])
    """

    needs_negative_times = True
    times: AnyStepTimes

    def __init__(
        self,
        *,
        fake_ratio: float = 0.25,
        rectification: Schedule = Schedule(0.5),
        order: int = 2,
        step: float = 0.01,
        residual_bound: float = 1.0,
        times: AnyStepTimes | None = None,
        weighting: Weighting | None = None,
        velocity: TargetVelocity | None = None,
        guidance: TargetGuidance | None = None,
    ) -> None:
        super().__init__(
            order=order,
            step=step,
            residual_bound=residual_bound,
            times=times,
            weighting=weighting,
            velocity=velocity,
            guidance=guidance,
        )
        if not 0 < fake_ratio < 1:
            raise ValueError(f"TwinFlow: fake_ratio must lie in (0, 1), got {fake_ratio}")
        if min(rectification(0.0), rectification(1.0)) < 0:
            raise ValueError(f"TwinFlow: rectification must not be negative, got {rectification}")
        self.fake_ratio, self.rectification = fake_ratio, rectification

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
        """Loss and diagnostics of a batch; see ``Objective.__call__``. The terms leave out the fake samples."""
        n = len(x) - round(self.fake_ratio * len(x))
        real, fake = slice(n), slice(n, None)
        if n == len(x) or not self.times.one_step(n):
            raise ValueError(
                f"TwinFlow: of a batch of {len(x)} samples none is a fake one, or none has t = 1 and r = 0: give at "
                "least 4, or raise fake_ratio and times.one_step_ratio"
            )
        terms = super().__call__(
            net,
            x[real],
            select_context(context, real),
            progress=progress,
            null_context=select_context(expand_context(null_context, len(x)), real),
            dropped=None if dropped is None else dropped[real],
        )
        of_fakes = self.fake_flow_terms(AverageVelocity(net, select_context(context, fake)), x[fake])
        share = n / len(x)
        return replace(
            terms,
            loss=share * terms.loss + (1 - share) * of_fakes.loss,
            metrics=terms.metrics | {"fake_flow_mse": of_fakes.squared_error.nanmean()},
        )

    def terms(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """RCGM's terms with the second target's loss, over the first samples, which have t = 1 and r = 0."""
        base = super().terms(u, z, v, times, weighting, progress)
        assert base.u is not None
        k = self.times.one_step(len(z))
        first, u_k = slice_velocity(u, slice(k), len(z)), base.u[:k]
        d = self.difference(first, z[:k] - u_k.detach().to(z.dtype))
        one_step = Times(times.r[:k], times.t[:k], k)
        rectified = weighted_mse(u_k, u_k.detach() - d, v[:k], one_step, weighting)
        return replace(
            base,
            # the release takes a mean over the whole batch, fake samples included, and adds this one to it
            loss=base.loss + self.rectification(progress) / (1 - self.fake_ratio) * rectified.loss,
            metrics={"velocity_gap": d.square().nanmean()},
        )

    def difference(self, u: Velocity, x: Tensor) -> Tensor:
        """d of samples ``x``, at noise and times sampled here; like ``x``, fp32, without a graph."""
        s = torch.rand(len(x), dtype=torch.float32, device=x.device)
        x_s = interpolate(x, torch.randn_like(x), s)
        d = stop_gradient(u, x_s, -s, -s).float() - stop_gradient(u, x_s, s, s).float()
        return d.clamp(-1, 1)

    def fake_flow_terms(self, u: Velocity, like: Tensor) -> FlowMapTerms:
        """Flow-matching terms of u(z, -t, -t) on new one-step samples in the shape of ``like``."""
        with no_grad_pass():
            x = flow_map_rollout(u, torch.randn_like(like), 1, 0)
        e, t = torch.randn_like(x), torch.rand(len(x), dtype=torch.float32, device=x.device)
        zero = torch.zeros_like(t)
        weighed_as = Times(zero, zero + 1, len(t))
        return weighted_mse(u(interpolate(x, e, t), -t, -t), e - x, e - x, weighed_as, self.weighting)
