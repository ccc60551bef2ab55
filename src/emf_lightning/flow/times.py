"""Which times a training step looks at: samplers of (r, t), and EMF's schedule of them over training progress."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Times:
    """Interval ends of B rows.

    Attributes:
        r: ``[B]``, fp32, where the interval ends, in [0, 1); r <= t.
        t: ``[B]``, fp32, where it starts, in (0, 1).
        n_interval: the first ``n_interval`` rows are drawn with r < t; in the rest r = t exactly.
    """

    r: Tensor
    t: Tensor
    n_interval: int


@dataclass(frozen=True)
class Schedule:
    """A number that moves linearly over training, from ``start`` at progress 0 to ``end`` at progress 1."""

    start: float
    end: float | None = None

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""
        return self.start if self.end is None else self.start + (self.end - self.start) * progress


class TimeSampler(ABC):
    """A law of (r, t), with the share of rows that have r < t.

    Args:
        interval_share: share of the rows with r < t; EMF moves it from .25 to .75.
        zero_share: share of the rows with r = 0, out of those with r < t: intervals that end at the data, as one step's
            does and a drawn r hardly ever (arXiv 2509.04394 takes .1).
    """

    def __init__(self, interval_share: Schedule, zero_share: float = 0.0) -> None:
        for share in (interval_share(0.0), interval_share(1.0)):
            if not 0 <= share <= 1:
                raise ValueError(f"{type(self).__name__}: interval_share must lie in [0, 1], got {share}")
            if not 0 <= zero_share <= share:
                raise ValueError(
                    f"{type(self).__name__}: rows with r = 0 are some of those with r < t, so zero_share must lie in "
                    f"[0, interval_share]; got {zero_share}, and interval_share is {share} at its least"
                )
        self.interval_share = interval_share
        self.zero_share = zero_share

    @abstractmethod
    def draw(self, rows: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two fp32 vectors ``[rows]`` in (0, 1): t's law and r's, in any order."""

    def __call__(self, rows: int, progress: float, device: torch.device) -> Times:
        """Times of ``rows`` rows, the r < t rows first, and of these the r = 0 rows.

        The number of r < t rows is ``round(interval_share * rows)``, not drawn, so shapes are equal on all ranks.
        """
        a, b = self.draw(rows, progress, device)
        n = round(self.interval_share(progress) * rows)
        t, r = torch.maximum(a, b), torch.minimum(a, b)
        r[: round(self.zero_share * rows)] = 0
        t = torch.cat([t[:n], a[n:]])
        return Times(r=torch.cat([r[:n], a[n:]]), t=t, n_interval=n)


class UniformTimes(TimeSampler):
    """t and r uniform on (0, 1).

    Args:
        interval_share: see ``TimeSampler``, as ``zero_share``.
    """

    def __init__(self, interval_share: Schedule = Schedule(0.25), zero_share: float = 0.0) -> None:
        super().__init__(interval_share, zero_share)

    def draw(self, rows: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two independent uniform vectors."""
        options = _fp32_on(device)
        return torch.rand(rows, **options), torch.rand(rows, **options)


class LogitNormalTimes(TimeSampler):
    """t and r as sigmoids of normal numbers; the larger is t (arXiv 2505.13447, section 4.3).

    With ``mu`` -.5 -> .5, ``sigma`` 1 -> 2, ``interval_share`` .25 -> .75 it is EMF's sampler (arXiv 2604.18168,
    released code). One departure: for r = t rows t is one draw, not the larger of two, unless ``larger`` is set.

    Args:
        mu: mean of t's logit; larger is noisier.
        sigma: its standard deviation.
        interval_share: share of the rows with r < t.
        r_mu: mean of r's logit, where r has a law of its own (MeanFlow's CIFAR-10 release); else ``mu``.
        r_sigma: likewise.
        larger: r = t rows take the larger of two draws, as the release does.
        zero_share: share of the rows with r = 0.
    """

    def __init__(
        self,
        mu: Schedule = Schedule(-0.4),
        sigma: Schedule = Schedule(1.0),
        interval_share: Schedule = Schedule(0.25),
        r_mu: Schedule | None = None,
        r_sigma: Schedule | None = None,
        larger: bool = False,
        zero_share: float = 0.0,
    ) -> None:
        super().__init__(interval_share, zero_share)
        self.mu = mu
        self.sigma = sigma
        self.r_mu = r_mu or mu
        self.r_sigma = r_sigma or sigma
        self.larger = larger

    def draw(self, rows: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two independent logit-normal vectors at this point of the schedule."""
        options = _fp32_on(device)
        t = torch.sigmoid(self.mu(progress) + self.sigma(progress) * torch.randn(rows, **options))
        r = torch.sigmoid(self.r_mu(progress) + self.r_sigma(progress) * torch.randn(rows, **options))
        return (torch.maximum(t, r), torch.minimum(t, r)) if self.larger else (t, r)


def _fp32_on(device: torch.device) -> dict[str, Any]:
    """How times are drawn: a precision plugin makes bf16 the default dtype, and rounded times are useless."""
    return {"dtype": torch.float32, "device": device}
