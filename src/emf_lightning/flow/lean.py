"""Forward mode without products by zero tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Affine(torch.autograd.Function):
    """op(x, w) + b where only x moves."""

    @staticmethod
    def forward(op: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor | None, options: dict[str, Any]) -> Tensor:
        return op(x, w, b, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, _, w, _, ctx.options = inputs
        ctx.save_for_forward(w)

    @staticmethod
    def jvp(ctx: Any, _op: None, dx: Tensor, _w: None, _b: None, _options: None) -> Tensor:
        (w,) = ctx.saved_tensors
        result: Tensor = ctx.op(dx.contiguous(), w, None, **ctx.options)
        return result


_CONVOLUTION_OPTIONS = ("stride", "padding", "dilation", "groups")


class LeanForwardMode(TorchFunctionMode):
    """While it is entered, linear layers and 2-D convolutions push their input's tangent through and nothing else.

    Stock forward mode gives weights a zero tangent and multiplies by it: 2.87 forward passes where the mathematics
    takes 2 (one for u, one for du/dt). The products left are the same ones, so the result is the same bit for bit.
    Only for passes without a graph: it defines no backward. Weights must be plain tensors, as FSDP2's are inside a
    forward pass; a tensor-parallel ``DTensor`` takes the stock path.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func is F.conv2d:
            x, w, b, options = _arguments(func, args, kwargs)
            if type(w) in (Tensor, torch.nn.Parameter):
                return _Affine.apply(func, x, w, b, options)
        return func(*args, **kwargs)


def _arguments(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    names = ("input", "weight", "bias", *(_CONVOLUTION_OPTIONS if func is F.conv2d else ()))
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given.pop("input"), given.pop("weight"), given.pop("bias", None), given
