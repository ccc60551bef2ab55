"""Samplers of the times (r, t) of a training step, and their schedule over training progress."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Times:
    """Interval ends of B samples.

    Attributes:
        r: ``[B]``, fp32, the interval's end, in [0, 1); r <= t.
        t: ``[B]``, fp32, its start, in (0, 1).
        n_interval: the first ``n_interval`` samples have r < t; in the rest r = t exactly.
    """

    r: Tensor
    t: Tensor
    n_interval: int


@dataclass(frozen=True)
class Schedule:
    """A number that moves linearly over training, from ``start`` at progress 0 to ``end`` at progress 1.

    Example:
        >>> Schedule(-0.5, 0.5)(progress=0.25)
        -0.25
    """

    start: float
    end: float | None = None

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""
        return self.start if self.end is None else self.start + (self.end - self.start) * progress


class TimeSampler(ABC):
    """Base of the distributions of (r, t).

    Args:
        flow_matching_ratio: share of the samples with r = t, which train on the velocity; EMF moves it from .75 to .25.
        consistency_ratio: share of the samples with r = 0, out of those with r < t: intervals that end at the data, as
            that of one step does and a random r hardly ever (arXiv 2509.04394 has .1).
    """

    def __init__(self, flow_matching_ratio: Schedule, consistency_ratio: float = 0.0) -> None:
        for ratio in (flow_matching_ratio(0.0), flow_matching_ratio(1.0)):
            if not 0 <= ratio <= 1:
                raise ValueError(f"{type(self).__name__}: flow_matching_ratio must lie in [0, 1], got {ratio}")
            if not 0 <= consistency_ratio <= 1 - ratio + 1e-9:  # .1 of .9 is more than 1 - .9 in floating point
                raise ValueError(
                    f"{type(self).__name__}: samples with r = 0 are some of those with r < t, so consistency_ratio "
                    f"must lie in [0, 1 - flow_matching_ratio]; got {consistency_ratio}, and flow_matching_ratio is "
                    f"{ratio} at its largest"
                )
        self.flow_matching_ratio = flow_matching_ratio
        self.consistency_ratio = consistency_ratio
        self._progress: float | None = None
        self._repeats = 0

    @property
    def has_intervals(self) -> bool:
        """Whether any sample has r < t."""
        return self.flow_matching_ratio(0.0) < 1 or self.flow_matching_ratio(1.0) < 1

    @abstractmethod
    def sample(self, batch: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two fp32 vectors ``[batch]`` in (0, 1), from the distributions of t and of r, not sorted."""

    def counts(self, batch: int, progress: float, repeats: int = 0) -> tuple[int, int]:
        """How many of ``batch`` samples have r < t, and how many of these r = 0.

        Each is its share of the batch, rounded. Where that leaves no sample of a kind, as in a batch of one, the number
        is the next lower or the next higher one, by chance, so that its mean over many batches is right. It follows
        from ``progress`` and from the number of batches before at the same progress: all ranks have equal shapes.
        """
        chance = Random(f"{progress} {repeats}" if repeats else progress).random()

        def whole(share: float) -> int:
            n = round(share * batch)
            return math.floor(share * batch + chance) if 0 < share < 1 and n in (0, batch) else n

        n = whole(1 - self.flow_matching_ratio(progress))
        return n, min(whole(self.consistency_ratio), n)

    def __call__(self, batch: int, progress: float, device: torch.device) -> Times:
        """Times of ``batch`` samples, the r < t samples first, and of these the r = 0 samples.

        Args:
            batch: B.
            progress: of training, in [0, 1].
            device: of the result.

        Raises:
            ValueError: for another ``progress``.
        """
        progress = float(progress)
        if not 0 <= progress <= 1 + 1e-6:  # steps over steps may be a little more than 1
            raise ValueError(
                f"progress must lie in [0, 1], as optimiser steps taken over those planned, got {progress}"
            )
        self._repeats = self._repeats + 1 if progress == self._progress else 0
        self._progress = progress
        a, b = self.sample(batch, progress, device)
        n, zeros = self.counts(batch, progress, self._repeats)
        t, r = torch.maximum(a, b), torch.minimum(a, b)
        r[:zeros] = 0
        t = torch.cat([t[:n], a[n:]])
        return Times(r=torch.cat([r[:n], a[n:]]), t=t, n_interval=n)


class UniformTimes(TimeSampler):
    """t and r uniform on (0, 1).

    Args:
        flow_matching_ratio: see ``TimeSampler``.
        consistency_ratio: see ``TimeSampler``.

    Example:
        >>> times = UniformTimes(Schedule(0.5))(4, progress=0.0, device=torch.device("cpu"))
        >>> times.n_interval, bool((times.r <= times.t).all())
        (2, True)
    """

    def __init__(self, flow_matching_ratio: Schedule = Schedule(0.75), consistency_ratio: float = 0.0) -> None:
        super().__init__(flow_matching_ratio, consistency_ratio)

    def sample(self, batch: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two independent uniform vectors."""
        options = _fp32_on(device)
        return torch.rand(batch, **options), torch.rand(batch, **options)


class LogitNormalTimes(TimeSampler):
    """t and r as sigmoids of normal numbers; the larger is t (arXiv 2505.13447, section 4.3).

    With ``sort_first`` it is MeanFlow's sampler, where an r = t sample has the larger of two numbers, too, and with
    ``mu`` -.5 -> .5, ``sigma`` 1 -> 2 and ``flow_matching_ratio`` .75 -> .25 EMF's (arXiv 2604.18168, released code).
    Without it, t of such a sample is one number, as flow matching has it.

    Args:
        mu: mean of t's logit; larger is noisier.
        sigma: its standard deviation.
        flow_matching_ratio: share of the samples with r = t.
        r_mu: mean of r's logit, where r has a distribution of its own; else ``mu``. The later version of MeanFlow's
            CIFAR-10 code has one, too, but keeps t and takes min(r, t): there 70 % of the samples have r < t.
        r_sigma: its standard deviation; else ``sigma``.
        sort_first: r = t samples, too, take the larger of two numbers, as in MeanFlow and in EMF's release.
        consistency_ratio: share of the samples with r = 0.

    Example:
        >>> emf = LogitNormalTimes(Schedule(-0.5, 0.5), Schedule(1.0, 2.0), Schedule(0.75, 0.25))
        >>> [emf(64, progress, torch.device("cpu")).n_interval for progress in (0.0, 1.0)]
        [16, 48]
    """

    def __init__(
        self,
        mu: Schedule = Schedule(-0.4),
        sigma: Schedule = Schedule(1.0),
        flow_matching_ratio: Schedule = Schedule(0.75),
        r_mu: Schedule | None = None,
        r_sigma: Schedule | None = None,
        sort_first: bool = False,
        consistency_ratio: float = 0.0,
    ) -> None:
        super().__init__(flow_matching_ratio, consistency_ratio)
        self.mu = mu
        self.sigma = sigma
        self.r_mu = r_mu or mu
        self.r_sigma = r_sigma or sigma
        self.sort_first = sort_first

    def sample(self, batch: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two independent logit-normal vectors at this point of the schedule."""
        options = _fp32_on(device)
        t = torch.sigmoid(self.mu(progress) + self.sigma(progress) * torch.randn(batch, **options))
        r = torch.sigmoid(self.r_mu(progress) + self.r_sigma(progress) * torch.randn(batch, **options))
        return (torch.maximum(t, r), torch.minimum(t, r)) if self.sort_first else (t, r)


class AnyStepTimes(TimeSampler):
    """t = 1 and r = 0, or r = t, or r uniform on (0, t), with t uniform on (0, 1) (arXiv 2512.05150).

    One step starts at exactly t = 1 and ends at r = 0: continuous distributions hardly ever sample it. For r = t the
    release takes r uniform on (.95 t, t), whose target differs from v by less than the step of its difference quotient.

    Args:
        one_step_ratio: share of the samples with t = 1 and r = 0; they are the first ones.
        flow_matching_ratio: share of the samples with r = t.

    Example:
        >>> times = AnyStepTimes()(6, progress=0.0, device=torch.device("cpu"))
        >>> times.n_interval, times.t[:2].tolist(), times.r[:2].tolist()
        (4, [1.0, 1.0], [0.0, 0.0])
    """

    def __init__(self, one_step_ratio: float = 1 / 3, flow_matching_ratio: Schedule = Schedule(1 / 3)) -> None:
        super().__init__(flow_matching_ratio, one_step_ratio)

    def one_step(self, batch: int) -> int:
        """How many of ``batch`` samples have t = 1 and r = 0."""
        ratio = max(self.flow_matching_ratio(0.0), self.flow_matching_ratio(1.0))
        return min(round(self.consistency_ratio * batch), round((1 - ratio) * batch))

    def counts(self, batch: int, progress: float, repeats: int = 0) -> tuple[int, int]:
        """See ``TimeSampler``; always rounded, so that ``one_step`` holds for every batch."""
        return round((1 - self.flow_matching_ratio(progress)) * batch), self.one_step(batch)

    def sample(self, batch: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """t uniform on (0, 1), and r uniform on (0, t)."""
        options = _fp32_on(device)
        t = torch.rand(batch, **options)
        return t, t * torch.rand(batch, **options)

    def __call__(self, batch: int, progress: float, device: torch.device) -> Times:
        """See ``TimeSampler``; the samples with t = 1 and r = 0 come first."""
        times = super().__call__(batch, progress, device)
        times.t[: self.one_step(batch)] = 1
        return times


def _fp32_on(device: torch.device) -> dict[str, Any]:
    """Tensor options for times: a precision plugin may make bf16 the default dtype, and rounded times are useless."""
    return {"dtype": torch.float32, "device": device}
