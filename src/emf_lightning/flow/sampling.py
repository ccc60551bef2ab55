"""Samplers: from noise to data in a few steps."""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.guidance import ClassifierFreeGuidance, SamplingGuidance
from emf_lightning.flow.path import expand_like
from emf_lightning.flow.velocity import Context, Velocity, no_grad_pass

StepEnd = Callable[[int, Tensor, Tensor], Tensor]
"""(step, the t at which it began, the samples behind it) -> the samples with which sampling goes on."""


class Sampler(ABC):
    """Base of the samplers: dataclasses, since a run and an export build them again from their fields."""

    @abstractmethod
    def __call__(self, u: Velocity, noise: Tensor, steps: int, step_end: StepEnd | None = None) -> Tensor:
        """Data, like ``noise``, without a graph.

        Args:
            u: average velocity of the B samples.
            noise: ``[B, C, H, W]``, unit normal, the state at t = 1.
            steps: evaluations of ``u``, at least 1.
            step_end: called after each step.

        Raises:
            ValueError: for no steps.
        """


@dataclass(frozen=True)
class FlowMapSampler(Sampler):
    """Jumps z_r = z_t - (t - r) u(z_t, r, t) over a uniform grid (arXiv 2505.13447, eq. 12).

    Example:
        >>> u = lambda z, r, t: z - 3.0  # data is 3 and noise is z at t = 1
        >>> FlowMapSampler()(u, torch.tensor([[5.0]]), 1)
        tensor([[3.]])
    """

    def __call__(self, u: Velocity, noise: Tensor, steps: int, step_end: StepEnd | None = None) -> Tensor:
        return flow_map_rollout(u, noise, steps, 0, step_end)


@dataclass(frozen=True)
class EulerSampler(Sampler):
    """Euler steps along the velocity u(z, t, t): the sampler of a flow-matching model.

    Example:
        >>> EulerSampler()(lambda z, r, t: torch.ones_like(z), torch.tensor([[5.0]]), steps=4)
        tensor([[4.]])
    """

    def __call__(self, u: Velocity, noise: Tensor, steps: int, step_end: StepEnd | None = None) -> Tensor:
        return flow_map_rollout(lambda z, r, t: u(z, t, t), noise, steps, 0, step_end)


@dataclass(frozen=True)
class MultistepSampler(Sampler):
    """Jumps to the data, with fresh noise in between: the sampler of a one-step generator (arXiv 2303.01469).

    The noise of step k > 0 is a function of the sample's first noise and of k, so a sample does not depend on its
    batch.

    Attributes:
        start: the first t, in (0, 1].

    Example:
        >>> MultistepSampler()(lambda z, r, t: z - 3.0, torch.tensor([[5.0]]), steps=1)
        tensor([[3.]])
    """

    start: float = 1.0

    @torch.no_grad()
    def __call__(self, u: Velocity, noise: Tensor, steps: int, step_end: StepEnd | None = None) -> Tensor:
        return multistep_sample(u, noise, steps, lambda k: _fresh_noise(noise, k), self.start, step_end)


def sample(
    net: Callable[..., Tensor],
    noise: Tensor,
    context: Context = None,
    *,
    steps: int = 1,
    sampler: Sampler = FlowMapSampler(),
    guidance_scale: float = 1.0,
    null_context: Context = None,
    guidance: SamplingGuidance = ClassifierFreeGuidance(),
    step_end: StepEnd | None = None,
) -> Tensor:
    """Data ``[B, C, H, W]`` from noise, in a few steps.

    Args:
        net: called as ``net(z, r, t, context)``; see ``AverageVelocity``.
        noise: ``[B, C, H, W]``, unit normal.
        context: conditioning of the B samples.
        steps: from noise to data.
        sampler: ``FlowMapSampler`` for average velocities, ``EulerSampler`` for flow matching.
        guidance_scale: of classifier-free guidance; 1 is none.
        null_context: conditioning without a caption, of one sample or of all; guidance needs it.
        guidance: how the scale acts.
        step_end: called after each step, of a sampler that takes it.

    Raises:
        ValueError: for no steps, for guidance without ``null_context``, and for a scale that is no finite number.

    Warns:
        UserWarning: where samples are not finite, which make black images.

    Example:
        >>> sample(lambda z, r, t, mean: z - mean, torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]), steps=1)
        tensor([[1.],
                [2.]])
    """
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
    u = guidance(net, context, null_context, noise.shape[0], guidance_scale)
    data = sampler(u, noise, steps) if step_end is None else sampler(u, noise, steps, step_end)
    if torch.compiler.is_compiling():  # also by torch.export: a graph has no warnings
        return data
    if lost := int((~data.isfinite()).reshape(len(data), -1).any(1).sum()):
        warnings.warn(
            f"{lost} of {len(data)} samples are not finite, and their images are black: the weights are not, or the "
            "precision or the guidance scale does not suit them",
            stacklevel=2,
        )
    return data


def multistep_sample(
    u: Velocity,
    noise: Tensor,
    steps: int,
    fresh_noise: Callable[[int], Tensor],
    start: float = 1.0,
    step_end: StepEnd | None = None,
    jumps: int | None = None,
) -> Tensor:
    """Data from noise, with the graph of the last jump alone.

    At each t of the uniform grid from ``start`` down, z = (1 - t) x + t e becomes x = z - t u(z, 0, t); e is ``noise``
    at first, beside x = 0, then fresh.

    Args:
        u: the generator's average velocity.
        noise: ``[B, C, H, W]``, unit normal.
        steps: jumps of the whole grid.
        fresh_noise: k -> the noise of step k > 0, like ``noise``.
        start: the first t, in (0, 1].
        step_end: called after each jump.
        jumps: how many of them are made, the first ones; None makes all.

    Raises:
        ValueError: for no steps.
    """
    _check_steps(steps)
    jumps = steps if jumps is None else jumps
    x = torch.zeros_like(noise)
    for k in range(jumps):
        t = torch.full((noise.shape[0],), start * (1 - k / steps), device=noise.device, dtype=torch.float32)
        e = noise if k == 0 else fresh_noise(k)
        z = (1 - expand_like(t, e)) * x + expand_like(t, e) * e
        with nullcontext() if k == jumps - 1 else no_grad_pass():
            x = z - expand_like(t, z) * u(z.to(noise.dtype), torch.zeros_like(t), t).to(z.dtype)
        if step_end is not None:
            x = step_end(k, t[0], x)
    return x.to(noise.dtype)


def flow_map_rollout(
    u: Velocity, noise: Tensor, steps: int, gradient_jumps: int, step_end: StepEnd | None = None
) -> Tensor:
    """Data as ``FlowMapSampler`` makes them, with the graph of the last ``gradient_jumps`` jumps.

    Args:
        u: average velocity of the B samples.
        noise: ``[B, C, H, W]``, unit normal, the state at t = 1.
        steps: jumps.
        gradient_jumps: how many of them have a graph, 0 to ``steps`` or more.
        step_end: called after each jump.

    Raises:
        ValueError: for no steps.
    """
    _check_steps(steps)
    grid = torch.linspace(1, 0, steps + 1, device=noise.device, dtype=torch.float32)
    grid = grid.unsqueeze(1).expand(-1, noise.shape[0])
    without_graph = max(steps - gradient_jumps, 0)

    def move(z: Tensor, jumps: range) -> Tensor:
        for k in jumps:
            t, r = grid[k], grid[k + 1]
            z = z - expand_like(t - r, z) * u(z.to(noise.dtype), r, t).to(z.dtype)
            if step_end is not None:
                z = step_end(k, t[0], z)
        return z

    with no_grad_pass():
        z = move(noise, range(without_graph))
    return move(z, range(without_graph, steps)).to(noise.dtype)


def _fresh_noise(e: Tensor, k: int) -> Tensor:
    """Unit normal noise like ``e``, ``[B, ...]``; that of a sample is a function of ``e`` and ``k``."""
    samples = []
    for row in e.detach().float().cpu().contiguous():
        digest = hashlib.sha256(row.numpy().tobytes() + k.to_bytes(1 if k < 256 else 4, "big")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch's takes 32 bits
        samples.append(torch.randn(e.shape[1:], generator=generator))
    return torch.stack(samples).to(e)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps: sampling needs at least one step, got {steps}")
