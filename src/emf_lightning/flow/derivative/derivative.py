"""The total derivative of the average velocity along the path, MeanFlow's one hard quantity.

Every kind takes du/dt = (grad_z u) v + d_t u, the change of u along the tangent (v, 0, 1) of (z, r, t)
(arXiv 2505.13447, eq. 8), for the rows with r < t only: elsewhere its factor t - r is zero. Times are fp32, and u must
take t - r itself, so that the derivative moves the interval's length too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf_lightning.flow.derivative.fast_forward_mode import LeanForwardMode
from emf_lightning.flow.path import Velocity, of_rows

Precision = Literal["training", "fp32", "bf16"]


class Derivative(ABC):
    """A way to du/dt, and to u itself beside it.

    Args:
        precision: of the passes that only the derivative needs: as the rest of ``training``, ``fp32`` or ``bf16``
            autocast. The weights stay as they are, so with bf16 weights ``fp32`` is bf16 all the same.
    """

    def __init__(self, precision: Precision = "training") -> None:
        if precision not in ("training", "fp32", "bf16"):
            raise ValueError(f"{type(self).__name__}: precision must be training, fp32 or bf16, got {precision!r}")
        self.precision = precision
        self.clock: AbstractContextManager[object] = nullcontext()
        """Entered around the passes that only the derivative needs: what measures them sets it, for a while."""

    @abstractmethod
    def along(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """du/dt, like ``z``, without a graph.

        Args:
            u: the average velocity.
            z: ``[N, C, H, W]``, the state at t.
            r: ``[N]``, fp32.
            t: ``[N]``, fp32.
            v: like ``z``, dz/dt.
        """

    def __call__(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """u of all rows with its graph, and du/dt of the first ``n`` without one.

        Where u draws random numbers (dropout), both see the same ones.
        """
        _check_times(r, t)
        if n == 0:
            return u(z, r, t), torch.zeros_like(z[:0])
        before = _random_state(z.device)
        with self.clock:
            dudt = self.along(of_rows(u, slice(n)), z[:n], r[:n], t[:n], v[:n])
        torch.clear_autocast_cache()  # weights cast without a graph must not serve the pass that needs one
        if before is None or _same(before, after := _random_state(z.device)):
            return u(z, r, t), dudt
        _set_random_state(before, z.device)
        value = of_rows(u, slice(n))(z[:n], r[:n], t[:n])
        assert after is not None and _same(after, _random_state(z.device)), "both passes draw the same numbers"
        return _with_rest(value, u, z, r, t), dudt

    def _autocast(self, z: Tensor) -> AbstractContextManager[object]:
        if self.precision == "training":
            return nullcontext()
        return torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


class ForwardMode(Derivative):
    """Exact, by forward-mode differentiation without a graph: it keeps no activations, so its memory is
    below a training pass's.

    Attention runs on a kernel that has a forward-mode rule, inside this pass only. Gradient checkpointing and FSDP2
    work as in any forward pass without a graph. What is compiled takes ``torch.func.jvp``, lean or not.

    Args:
        precision: see ``Derivative``.
        lean: dual numbers with rules of our own, which know what has no tangent (``LeanForwardMode``): 2 instead of
            2.9 forward passes' operations, equal up to rounding. Otherwise ``torch.func.jvp`` as torch has it.
    """

    def __init__(self, precision: Precision = "training", lean: bool = True) -> None:
        super().__init__(precision)
        self.lean = lean

    def along(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """du/dt of the one pass."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._autocast(z))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if not self.lean or torch.compiler.is_compiling():
                return _jvp(u, z, r, t, v)[1]
            stack.enter_context(forward_ad.dual_level())
            stack.enter_context(LeanForwardMode())
            return _tangent(u(_dual(z, v), r, _dual(t, torch.ones_like(t))))


class Fused(Derivative):
    """Exact, u and du/dt of the r < t rows from one dual pass: fewest operations, but the tangents record a graph.

    Needs up to 2.2 times the memory, so it is for small networks. It does not go together with gradient
    checkpointing (torch counts the recomputed tensors differently), nor with a precision of its own.
    """

    def __init__(self) -> None:
        super().__init__("training")

    def along(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """du/dt of a dual pass whose u is not wanted."""
        return ForwardMode(lean=False).along(u, z, r, t, v)

    def __call__(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """u of all rows with its graph, and du/dt of the first ``n``; the other rows take a pass of their own."""
        _check_times(r, t)
        if n == 0:
            return u(z, r, t), torch.zeros_like(z[:0])
        with sdpa_kernel(SDPBackend.MATH):
            value, dudt = _jvp(of_rows(u, slice(n)), z[:n], r[:n], t[:n], v[:n])
        return _with_rest(value, u, z, r, t), dudt.detach()


class FiniteDifference(Derivative):
    """(u(z + h v, r, t + h) - u(z - h v, r, t - h)) / 2 h, or one-sided: two plain passes, on any attention kernel.

    For networks or strategies without forward mode (arXiv 2509.04394, h = .005). The state moves on the path's
    tangent, so nothing need be known of data and noise. Measured on a SANA with times x 1000: relative error 8e-4 in
    fp32 at the best h; in bf16 11 % at the best h and above 100 % at small ones, hence refused.

    Args:
        step: h > 0; with times x 1000 inside the network 3e-5 was best, with times in [0, 1] 1e-3.
        central: two-sided; one-sided costs one pass less and is ten times less exact.
        precision: see ``Derivative``; the default leaves autocast.

    Raises:
        ValueError: on the first batch, where u comes out of bf16 or fp16 arithmetic.
    """

    def __init__(self, step: float = 0.005, central: bool = True, precision: Precision = "fp32") -> None:
        super().__init__(precision)
        if step <= 0:
            raise ValueError(f"FiniteDifference: step must be positive, got {step}")
        if precision == "bf16":
            raise ValueError(_TOO_COARSE.format("bf16"))
        self.step = step
        self.central = central

    @torch.no_grad()
    def along(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The difference quotient."""
        with self._autocast(z):
            if torch.is_autocast_enabled(z.device.type):
                raise ValueError(_TOO_COARSE.format(torch.get_autocast_dtype(z.device.type)))
            h = self.step
            back = h if self.central else 0.0
            ahead, behind = u(z + h * v, r, t + h), u(z - back * v, r, t - back)
        if torch.finfo(ahead.dtype).eps > torch.finfo(torch.float32).eps:
            raise ValueError(_TOO_COARSE.format(ahead.dtype))
        return (ahead - behind) / (h + back)


_TOO_COARSE = (
    "FiniteDifference in {}: rounding leaves an error of 11 % of du/dt at the best step and over 100 % at small ones "
    "(fp32: 0.1 %); set the derivative's precision to fp32 and keep fp32 weights, or use ForwardMode"
)


def _jvp(u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # compiled blocks run as they are written, unless all of this is compiled: met inside forward mode, torch gives a
    # compiled function up for good, and the passes that follow would run uncompiled, too
    with nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager"):
        value, dudt = torch.func.jvp(lambda z_, t_: u(z_, r, t_), (z, t), (v, torch.ones_like(t)))[:2]
    return value, dudt


def _dual(x: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(x, tangent)  # type: ignore[no-untyped-call]
    return dual


def _tangent(dual: Tensor) -> Tensor:
    tangent: Tensor | None = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(dual) if tangent is None else tangent


def _with_rest(first: Tensor, u: Velocity, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    n = len(first)
    return first if n == len(z) else torch.cat([first, of_rows(u, slice(n, None))(z[n:], r[n:], t[n:])])


def _check_times(r: Tensor, t: Tensor) -> None:
    if any(torch.finfo(time.dtype).bits < 32 for time in (r, t)):
        raise TypeError(f"times must be fp32, got {r.dtype} and {t.dtype}: rounded, t - r and its derivative are noise")


def _random_state(device: torch.device) -> list[Tensor] | None:
    """The generators that a network on ``device`` may draw from, or None where they cannot be read (compilation)."""
    if torch.compiler.is_compiling():
        return None
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _same(a: list[Tensor], b: list[Tensor] | None) -> bool:
    return b is not None and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
