"""References for checking a derivative: float64 throughout, and difference quotients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from emf_lightning.flow.velocity import Velocity


class KeepFloat64(TorchFunctionMode):
    """A mode in which casts from float64 to fp32 do nothing.

    Networks compute parts in fp32 on purpose (SANA its linear attention, its sinusoids, its normalisation), also when
    they are cast to float64; rounding then limits a difference quotient to 1e-3 of du/dt at SANA's time scale. In this
    mode the limit is 4e-6 at h = 1e-6. Casts to coarser types go through: a check has to find them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(map(_kept, args))
            kwargs = {name: _kept(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


_CASTS = (Tensor.float, Tensor.to, Tensor.type)


def _kept(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@torch.no_grad()
def central_difference(u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor, step: float) -> Tensor:
    """(u(z + h v, r, t + h) - u(z - h v, r, t - h)) / 2 h, like ``z``, with h = ``step``; in u's precision."""
    return (u(z + step * v, r, t + step) - u(z - step * v, r, t - step)) / (2 * step)
