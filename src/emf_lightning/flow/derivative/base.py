"""The total derivative of the average velocity along the path.

Every kind computes du/dt = (grad_z u) v + d_t u, the change of u along the tangent (v, 0, 1) of (z, r, t)
(arXiv 2505.13447, eq. 8), for the samples with r < t only: at r = t its factor t - r is zero. Times are fp32, and u
must take t - r itself, so that the derivative also moves the length of the interval.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from emf_lightning.flow.velocity import Velocity, fresh_casts, slice_velocity

Precision = Literal["training", "fp32", "bf16"]


class Derivative(ABC):
    """Base of the methods that compute u and du/dt.

    Attributes:
        exact: whether du/dt differs from the network's by rounding only; ``SelfCheck`` then holds it to float64.

    Args:
        precision: of the passes that only the derivative needs: that of the ``training`` step, or ``fp32`` or ``bf16``
            autocast. Weights are not cast, so with bf16 weights ``fp32`` computes in bf16 as well.
    """

    exact: bool = True

    def __init__(self, precision: Precision = "training") -> None:
        if precision not in ("training", "fp32", "bf16"):
            raise ValueError(f"{type(self).__name__}: precision must be training, fp32 or bf16, got {precision!r}")
        self.precision = precision
        self.timer: AbstractContextManager[object] = nullcontext()
        """Entered around the passes that only the derivative needs; a callback sets it to measure them."""

    @abstractmethod
    def jvp(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """du/dt, like ``z``, without a graph.

        Args:
            u: the average velocity.
            z: ``[N, C, H, W]``, the state at t.
            r: ``[N]``, fp32.
            t: ``[N]``, fp32.
            v: like ``z``, dz/dt.
        """

    def __call__(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """u of all samples with its graph, and du/dt of the first ``n`` without one.

        A network with dropout sees the same random numbers in both.
        """
        check_times(r, t)
        if n == 0:
            return u(z, r, t), torch.zeros_like(z[:0])
        first = slice_velocity(u, slice(n), len(z))
        before = random_state(z.device)
        with fresh_casts(), self.timer:
            dudt = self.jvp(first, z[:n], r[:n], t[:n], v[:n])
        if before is None or _same(before, after := random_state(z.device)):
            return u(z, r, t), dudt
        set_random_state(before, z.device)
        value = first(z[:n], r[:n], t[:n])
        assert after is not None and _same(after, random_state(z.device)), "both passes draw the same numbers"
        return with_other_samples(value, u, z, r, t), dudt

    def _autocast(self, z: Tensor) -> AbstractContextManager[object]:
        if self.precision == "training":
            return nullcontext()
        return torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def with_other_samples(first: Tensor, u: Velocity, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """u of all samples, of which ``first`` holds the first ones."""
    n = len(first)
    if n == len(z):
        return first
    return torch.cat([first, slice_velocity(u, slice(n, None), len(z))(z[n:], r[n:], t[n:])])


def check_times(r: Tensor, t: Tensor) -> None:
    """Raises a ``TypeError`` for times in less than fp32."""
    if any(torch.finfo(time.dtype).bits < 32 for time in (r, t)):
        raise TypeError(f"times must be fp32, got {r.dtype} and {t.dtype}: rounded, t - r and its derivative are noise")


def random_state(device: torch.device) -> list[Tensor] | None:
    """States of the generators that a network on ``device`` may use; None under compilation."""
    if torch.compiler.is_compiling():
        return None
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _same(a: list[Tensor], b: list[Tensor] | None) -> bool:
    return b is not None and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
