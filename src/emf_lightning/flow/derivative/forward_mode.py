"""Exact derivatives by forward-mode differentiation."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf_lightning.flow.derivative.base import Derivative, Precision, check_times, with_other_samples
from emf_lightning.flow.derivative.fast_forward_mode import FastForwardMode
from emf_lightning.flow.velocity import Velocity, slice_velocity


class ForwardMode(Derivative):
    """Exact, by forward-mode differentiation without a graph: it keeps no activations, so its memory is
    below a training pass's.

    Attention runs on a kernel that has a forward-mode rule, inside this pass only. Gradient checkpointing and FSDP2
    work as in any forward pass without a graph. Compiled code always takes ``torch.func.jvp``.

    Args:
        precision: see ``Derivative``.
        fast: use dual numbers with the rules of ``FastForwardMode``, which skip zero tangents: 2 instead of 2.9 forward
            passes' operations, equal up to rounding. Otherwise ``torch.func.jvp``.

    Example:
        >>> u = lambda z, r, t: z * t[:, None]  # du/dt = v t + z
        >>> z, v, r, t = torch.ones(1, 2), torch.full((1, 2), 3.0), torch.zeros(1), torch.full((1,), 0.5)
        >>> ForwardMode()(u, z, r, t, v, n=1)
        (tensor([[0.5000, 0.5000]]), tensor([[2.5000, 2.5000]]))
    """

    def __init__(self, precision: Precision = "training", fast: bool = True) -> None:
        super().__init__(precision)
        self.fast = fast

    def jvp(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """du/dt, from one dual pass."""
        if not self.fast or torch.compiler.is_compiling():  # compilers do not look into a stack of contexts
            with torch.no_grad(), self._autocast(z), sdpa_kernel(SDPBackend.MATH):
                return _jvp(u, z, r, t, v)[1]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._autocast(z))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # as in _jvp
            stack.enter_context(forward_ad.dual_level())
            stack.enter_context(FastForwardMode())
            return _tangent(u(_dual(z, v), r, _dual(t, torch.ones_like(t))))


class Fused(Derivative):
    """Exact: u and du/dt of the r < t samples from one dual pass, whose tangents record a graph.

    It takes the fewest operations and up to 2.2 times the memory, so it is for small networks. It excludes gradient
    checkpointing (torch counts the recomputed tensors differently) and a precision of its own.
    """

    def __init__(self) -> None:
        super().__init__("training")

    def jvp(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """du/dt, from a dual pass whose u is discarded."""
        return ForwardMode(fast=False).jvp(u, z, r, t, v)

    def __call__(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """u of all samples with its graph, and du/dt of the first ``n``; the others take a pass of their own."""
        check_times(r, t)
        if n == 0:
            return u(z, r, t), torch.zeros_like(z[:0])
        with sdpa_kernel(SDPBackend.MATH):
            value, dudt = _jvp(slice_velocity(u, slice(n), len(z)), z[:n], r[:n], t[:n], v[:n])
        return with_other_samples(value, u, z, r, t), dudt.detach()


def _jvp(u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # Compiled blocks run eagerly here, unless all of this is compiled: a compiled function that torch meets inside
    # forward mode is never compiled again, and the later passes would run uncompiled, too.
    with nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager"):
        value, dudt = torch.func.jvp(lambda z_, t_: u(z_, r, t_), (z, t), (v, torch.ones_like(t)))[:2]
    return value, dudt


def _dual(x: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(x, tangent)  # type: ignore[no-untyped-call]
    return dual


def _tangent(dual: Tensor) -> Tensor:
    tangent: Tensor | None = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(dual) if tangent is None else tangent
