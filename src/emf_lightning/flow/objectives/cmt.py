"""Consistency mid-training (CMT, arXiv 2509.24526): a flow map learns a teacher's solver paths before its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.base import FlowMapTerms, weighted_mse
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.path import expand_like
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.times import Times, TimeSampler
from emf_lightning.flow.velocity import AverageVelocity, Context, expand_context, select_context
from emf_lightning.flow.weighting import Weighting


class CMT(MeanFlow):
    """MeanFlow after a warm start on (z_t - z_r) / (t - r) of the teacher's solver paths z from noise to data.

    A path has K Euler steps of the teacher's velocity, guided as in ``MeanFlow``; t and r are sampled and moved to its
    grid, outwards, and where r = t the target is the teacher's velocity there. The warm start is supervised: it takes
    no derivative and no data but their captions, and covers t = 1 and r = 0. It ends with the solver's error,
    O(1 / K), which MeanFlow, the paper's post-training, then removes. Several samples of a batch share a path, as in
    the release, where each point of a path is one.

    Args:
        share: of the training that is warm start, in (0, 1]; 1 never takes MeanFlow.
        solver_steps: K, at least 2.
        samples_per_path: at least 1; a batch of B samples takes the first B / ``samples_per_path`` captions.
        times: see ``MeanFlow``.
        weighting: see ``MeanFlow``.
        velocity: holds the teacher; by default that of ``FlowMapModule``, its network as training starts.
        guidance: see ``MeanFlow``.
        derivative: see ``MeanFlow``.
        clip_target: see ``MeanFlow``.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> teacher = lambda z, r, t: torch.ones_like(z)
        >>> objective = CMT(velocity=TeacherVelocity(teacher))
        >>> objective(lambda z, r, t: torch.ones_like(z), torch.randn(32, 4)).squared_error.max() < 1e-9
        tensor(True)
    """

    def __init__(
        self,
        *,
        share: float = 0.5,
        solver_steps: int = 16,
        samples_per_path: int = 16,
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
        if not 0 < share <= 1:
            raise ValueError(f"CMT: share must lie in (0, 1], got {share}: without a warm start take MeanFlow")
        if solver_steps < 2 or samples_per_path < 1:
            raise ValueError(
                "CMT: needs solver_steps of at least 2 and samples_per_path of at least 1, "
                f"got {solver_steps} and {samples_per_path}"
            )
        self.share, self.solver_steps, self.samples_per_path = share, solver_steps, samples_per_path

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
        """Loss and diagnostics of a batch; see ``Objective.__call__``. The warm start reads only the shape of ``x``."""
        if self.share < 1 and progress >= self.share:
            return super().__call__(net, x, context, progress=progress, null_context=null_context, dropped=dropped)
        paths = -(-len(x) // self.samples_per_path)
        owners = torch.arange(len(x), device=x.device) % paths
        z = self.path(
            net,
            torch.randn_like(x[:paths]),
            select_context(context, slice(paths)),
            select_context(expand_context(null_context, len(x)), slice(paths)),
            None if dropped is None else dropped[:paths],
        )
        u = AverageVelocity(net, select_context(context, owners))
        return self.path_terms(u, z, owners, self.times(len(x), progress, x.device))

    def path(
        self,
        net: Callable[..., Tensor],
        noise: Tensor,
        context: Context = None,
        null_context: Context = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """The teacher's states at t = 0, 1 / K, ..., 1 from ``noise`` ``[P, C, H, W]``, ``[K + 1, P, C, H, W]``."""
        states = [noise]
        for k in range(self.solver_steps, 0, -1):
            z = states[-1]
            t = torch.full((len(z),), k / self.solver_steps, dtype=torch.float32, device=z.device)
            v = self.target_velocity(net, z, z, t, context, null_context, dropped)
            states.append(z - v / self.solver_steps)
        return torch.stack(states[::-1])

    def path_terms(self, u: AverageVelocity, path: Tensor, owners: Tensor, times: Times) -> FlowMapTerms:
        """The error of u against the paths' average velocities.

        Args:
            u: the average velocity of all B samples.
            path: ``[K + 1, P, C, H, W]``, see ``path``.
            owners: ``[B]``, the path of each sample.
            times: the samples' (r, t), before they move to the grid.
        """
        n, steps = times.n_interval, self.solver_steps
        start, end = (times.t * steps).ceil().long().clamp(1, steps), (times.r * steps).floor().long()
        # r = t: an Euler step's average velocity is the teacher's at its start
        lower = torch.cat([torch.minimum(end, start - 1)[:n], start[n:] - 1])
        z = path[start, owners]
        target = (z - path[lower, owners]) / expand_like((start - lower) / steps, z)
        t = start / steps
        on_grid = replace(times, t=t, r=torch.cat([lower[:n] / steps, t[n:]]))
        return weighted_mse(u(z, on_grid.r, on_grid.t), target, target, on_grid, self.weighting)
