"""Self-corrected flow distillation (SCFlow, arXiv 2412.16906): one velocity for one step and for few.

X(z, t; u) = z - t u(z, t, t) is where a velocity says that the path ends. A student's X is to be the same along the
teacher's paths, and its single step the same as its several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.path import Velocity, interpolate, over, without_graph


def end_of_path(u: Velocity, z: Tensor, t: Tensor) -> Tensor:
    """X(z, t; u), like ``z`` ``[B, C, H, W]``, fp32."""
    return z - over(t, z) * u(z, t, t).float()


def pseudo_huber(a: Tensor, b: Tensor, offset: float) -> Tensor:
    """The rows' means ``[B]`` of sqrt((a - b)^2 + offset^2) - offset."""
    return (((a - b).square() + offset**2).sqrt() - offset).flatten(1).mean(1)


@dataclass(frozen=True)
class ConsistencyTerms:
    """Losses of B rows, ``[B]``, with the student's graph.

    Attributes:
        forward: X at t against X one step of the teacher's nearer to the data, or the data themselves near them.
        backward: X at t against X one step nearer to the noise.
    """

    forward: Tensor
    backward: Tensor


@dataclass(frozen=True)
class ConsistencyObjective:
    """X(z_t, t) of the student against its target's on both sides, one Euler step of the teacher's away.

    Steps are uniform up to ``reach``, in t, and end at 0 and 1. Released settings: reach .1, truncation .4 for
    CelebA-HQ and .1 for text-to-image.

    Attributes:
        reach: longest step.
        truncation: rows whose step ends below this have the data themselves as their target.
        offset: of the pseudo-Huber distance.
    """

    reach: float = 0.1
    truncation: float = 0.1
    offset: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.reach <= 1:
            raise ValueError(f"ConsistencyObjective: reach must lie in (0, 1], got {self.reach}")
        if not 0 <= self.truncation < 1:
            raise ValueError(f"ConsistencyObjective: truncation must lie in [0, 1), got {self.truncation}")
        if self.offset <= 0:
            raise ValueError(f"ConsistencyObjective: offset must be positive, got {self.offset}")

    def __call__(
        self, student: Velocity, target: Velocity, teacher: Velocity, x: Tensor, e: Tensor, t: Tensor, backward: bool
    ) -> ConsistencyTerms:
        """Both losses; gradients flow through the student at t alone.

        Args:
            student: what learns.
            target: its moving average.
            teacher: whose paths these are.
            x: ``[B, C, H, W]``, data.
            e: like ``x``, noise.
            t: ``[B]``, fp32, in (0, 1).
            backward: whether that loss is wanted; without it, it is 0 and costs nothing.
        """
        z = interpolate(x, e, t)
        down, up = (torch.rand(len(t), device=t.device, dtype=t.dtype) for _ in range(2))
        down, up = down * t.clamp(max=self.reach), up * (1 - t).clamp(max=self.reach)
        v = without_graph(teacher, z, t, t)
        after = _end(target, z - over(down, z) * v, t - down)
        after = torch.where(over(t - down < self.truncation, x), x, after)
        before = _end(target, z + over(up, z) * v, t + up) if backward else None
        end = end_of_path(student, z, t)
        forward = pseudo_huber(end, after, self.offset)
        if before is None:
            return ConsistencyTerms(forward, torch.zeros_like(forward))
        return ConsistencyTerms(forward, pseudo_huber(end, before, self.offset))


def _end(u: Velocity, z: Tensor, t: Tensor) -> Tensor:
    return z - over(t, z) * without_graph(u, z, t, t)


def one_step(student: Velocity, e: Tensor) -> Tensor:
    """What the student draws from noise ``e`` ``[B, C, H, W]`` in one step."""
    return end_of_path(student, e, torch.ones(len(e), device=e.device))


def step_alignment(student: Velocity, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """The rows' errors ``[B]`` of X on the straight line from ``e`` to what one step made of it, against that.

    Args:
        student: what learns, through its values on the line alone.
        x: ``[B, C, H, W]``, ``one_step`` of ``e``.
        e: like ``x``, the same noise.
        t: ``[B]``, fp32, in (0, 1).
    """
    x = x.detach()
    return (end_of_path(student, interpolate(x, e, t), t) - x).square().flatten(1).mean(1)
