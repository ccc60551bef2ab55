"""Rules that make forward mode fast: operations skip inputs that have no tangent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from emf_lightning.flow.derivative.attention import attention_rule


class FastForwardMode(TorchFunctionMode):
    """A mode in which linear layers, 2-D convolutions, layer and group norm and attention use forward rules of our own.

    Torch's forward mode gives weights a tangent of zeros and multiplies by it: 2.87 forward passes' operations where
    the mathematics takes 2 (one for u, one for du/dt), and it pushes tangents through layer norm in a dozen elementwise
    steps. Results differ by rounding only. The rules are for dual numbers (``torch.autograd.forward_ad``) in passes
    without a graph: they define no backward. A weight that is a ``DTensor`` (tensor parallelism; FSDP2's are plain
    inside a forward pass), dropout inside attention, a causal mask, a mask that moves and grouped queries take torch's
    own path.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        names = _ARGUMENTS.get(func)
        if names is not None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if (result := _RULES[func](given)) is not None:
                return result
        return func(*args, **kwargs)


class _Affine(torch.autograd.Function):
    """op(x, w) + b where only x has a tangent."""

    @staticmethod
    def forward(
        ctx: Any, op: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        ctx.set_materialize_grads(False)  # no tensor of zeros for the weights
        ctx.op, ctx.options = op, options
        ctx.save_for_forward(w)
        return op(x, w, b, **options)

    @staticmethod
    def jvp(ctx: Any, _op: None, dx: Tensor, _w: None, _b: None, _options: None) -> Tensor:
        (w,) = ctx.saved_tensors
        # dx lies in memory as x does, and so does the result as u's: another layout would be copied into it
        result: Tensor = ctx.op(dx, w, None, **ctx.options)
        return result


class _LayerNorm(torch.autograd.Function):
    """(x - mean) / std, times w plus b, where only x has a tangent.

    Its Jacobian without w is symmetric, (1 - 11'/N - yy'/N) / std, so the one kernel of the backward pass serves.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        ctx.set_materialize_grads(False)
        y, mean, rstd = torch.native_layer_norm(x, shape, w, b, eps)
        ctx.shape = shape
        ctx.save_for_forward(x, w, mean, rstd)
        return y

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _shape: None, _w: None, _b: None, _eps: None) -> Tensor:
        x, w, mean, rstd = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        dy: Tensor = backward(dx, x, ctx.shape, mean, rstd, None, None, [True, False, False])[0]
        return dy if w is None else dy * w


class _GroupNorm(torch.autograd.Function):
    """As ``_LayerNorm``, over a group's channels and all positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        ctx.set_materialize_grads(False)
        rows, channels, positions = len(x), x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(x, w, b, rows, channels, positions, groups, eps)
        ctx.sizes = rows, channels, positions, groups
        ctx.save_for_forward(x, w, mean, rstd)
        return y

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _groups: None, _w: None, _b: None, _eps: None) -> Tensor:
        x, w, mean, rstd = ctx.saved_tensors
        backward = torch.ops.aten.native_group_norm_backward
        dy: Tensor = backward(dx.contiguous(), x, mean, rstd, None, *ctx.sizes, [True, False, False])[0]
        return dy if w is None else dy * w.view(-1, *[1] * (x.ndim - 2))


def _affine(op: Callable[..., Tensor]) -> Callable[[dict[str, Any]], Tensor | None]:
    def rule(given: dict[str, Any]) -> Tensor | None:
        x, w, b = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        return _Affine.apply(op, x, w, b, given) if _plain(w) and _plain(b) else None

    return rule


def _layer_norm(given: dict[str, Any]) -> Tensor | None:
    x, w, b = given["input"], given.get("weight"), given.get("bias")
    if not (_plain(w) and _plain(b)):
        return None
    x, kept = _norm_input(x, w)
    return _LayerNorm.apply(x, list(given["normalized_shape"]), w, b, given.get("eps", 1e-5)).to(kept)


def _group_norm(given: dict[str, Any]) -> Tensor | None:
    x, w, b = given["input"], given.get("weight"), given.get("bias")
    if not (_plain(w) and _plain(b)):
        return None
    x, kept = _norm_input(x, w)
    return _GroupNorm.apply(x.contiguous(), given["num_groups"], w, b, given.get("eps", 1e-5)).to(kept)


def _norm_input(x: Tensor, w: Tensor | None) -> tuple[Tensor, torch.dtype]:
    """The input of a norm, as fp32 where the stock operator takes it so, and the type of its output."""
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return x.float(), torch.float32
    # the backward kernels take no bf16 input with statistics in fp32, which CPUs give under autocast
    mixed = w is not None and w.dtype != x.dtype
    return (x.float() if mixed else x), x.dtype


def _plain(weight: Any) -> bool:
    """Whether ``weight`` is an ordinary tensor without a tangent."""
    if type(weight) is Tensor:
        return forward_ad.unpack_dual(weight).tangent is None  # type: ignore[no-untyped-call]
    return weight is None or type(weight) is torch.nn.Parameter


_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
}
_RULES: dict[Any, Callable[[dict[str, Any]], Tensor | None]] = {
    F.linear: _affine(F.linear),
    F.conv2d: _affine(F.conv2d),
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.scaled_dot_product_attention: attention_rule,
}
