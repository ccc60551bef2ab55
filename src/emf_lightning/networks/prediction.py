"""Parametrizations of a backbone's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Prediction(ABC):
    """A rule from a backbone's output to the average velocity u.

    It is for backbones of the straight path; one that was trained on another is given its own state and time.
    """

    def state(self, z: Tensor, t: Tensor) -> Tensor:
        """What the backbone is given for the state ``z`` ``[B, C, H, W]`` at ``t`` ``[B]``."""
        return z

    def time(self, t: Tensor) -> Tensor:
        """Its time for ``t`` ``[B]``, before ``time_scale``."""
        return t

    @abstractmethod
    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """u, from ``output`` and the state ``z``, both ``[B, C, H, W]``, at ``t`` ``[B]``."""


class PredictVelocity(Prediction):
    """u-prediction: the output is u itself, as in SANA, BLIP3o-NEXT and EMF."""

    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return output


class PredictData(Prediction):
    """x-prediction: u = (z - output) / t, where the output is the data predicted from the interval's mean velocity.

    The parametrization of pixel MeanFlow (arXiv 2601.22158): with large patches the data lie on a thin manifold of
    the patch's dimensions and the velocity does not.

    Args:
        min_time: lower bound of t in the division, which bounds u near the data.
    """

    def __init__(self, min_time: float = 0.05) -> None:
        if not 0 < min_time < 1:
            raise ValueError(f"PredictData: min_time must lie in (0, 1), got {min_time}")
        self.min_time = min_time

    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """(z - output) / max(abs(t), min_time), in fp32."""
        return (z - output.float()) / t.abs().clamp(min=self.min_time).view(-1, 1, 1, 1)


class PredictReversedVelocity(Prediction):
    """Prediction of x - e, the velocity where t = 0 is noise: InstaFlow (arXiv 2309.06380)."""

    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return -output


class PredictNoise(Prediction):
    """Prediction of the noise by a network that was trained on a variance-preserving schedule, as DDPM's.

    Such a network sees z_n = alpha_n x + sigma_n e with alpha_n^2 + sigma_n^2 = 1 at the times n = 0 ... ``steps`` - 1.
    That is the straight path at t = sigma_n / (alpha_n + sigma_n), scaled: z_n = z / sqrt(t^2 + (1 - t)^2). So the
    network is given that state and n(t), linear between the schedule's times, and u = (output - z) / (1 - t).

    The schedule ends before t = 1: PixArt's at .9937, Stable Diffusion's at .936. Later times are taken for its last
    one, so that u stays finite: pure noise is read as the schedule's noisiest state, as in the networks' own samplers,
    and an error of the output counts 1 / (1 - t) there, 158 and 16 times. Times before its first are read as that one.

    PixArt-alpha and -Sigma have the default schedule; Stable Diffusion 1.x and 2.x have ``first_beta: 0.00085``,
    ``last_beta: 0.012``, ``power: 2``. Weights that predict a velocity of the schedule (v-prediction) are not for it.

    Args:
        first_beta: variance that the first step adds.
        last_beta: that of the last.
        steps: N, the number of the schedule's steps; ``time_scale`` has to be the same.
        power: beta^(1 / power) moves linearly.
    """

    def __init__(
        self, first_beta: float = 1e-4, last_beta: float = 0.02, steps: int = 1000, power: float = 1.0
    ) -> None:
        if not 0 < first_beta <= last_beta < 1 or steps < 2 or power <= 0:
            raise ValueError(
                "PredictNoise: betas must lie in (0, 1), the first at most the last, with at least 2 steps and a "
                f"positive power; got {first_beta} to {last_beta}, {steps} steps, power {power}"
            )
        # one form of each number, whoever gave it: checkpoints name them
        self.first_beta, self.last_beta, self.power = float(first_beta), float(last_beta), float(power)
        self.steps = int(steps)

    def time(self, t: Tensor) -> Tensor:
        """n(t) / N."""
        times = torch.tensor(self._times, dtype=t.dtype, device=t.device)
        t = t.clamp(times[0], times[-1])
        n = torch.searchsorted(times, t.detach().contiguous(), right=True).clamp(1, self.steps - 1) - 1
        return (n + (t - times[n]) / (times[n + 1] - times[n])) / self.steps

    def state(self, z: Tensor, t: Tensor) -> Tensor:
        """The schedule's state at n(t)."""
        t = self._at(t)
        return z / (t.square() + (1 - t).square()).sqrt()

    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """(output - z) / (1 - t), in fp32."""
        return (output.float() - z) / (1 - self._at(t))

    def _at(self, t: Tensor) -> Tensor:
        return t.clamp(max=self._times[-1]).view(-1, 1, 1, 1)

    @property
    def _times(self) -> tuple[float, ...]:
        return _schedule_times(self.first_beta, self.last_beta, self.steps, self.power)


@lru_cache
def _schedule_times(first: float, last: float, steps: int, power: float) -> tuple[float, ...]:
    """t of n = 0 ... N - 1, as numbers: a tensor made within torch.export would be part of its graph."""
    kept = np.cumprod(1 - np.linspace(first ** (1 / power), last ** (1 / power), steps) ** power)
    alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
    return tuple((sigma / (alpha + sigma)).tolist())
