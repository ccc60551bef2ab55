"""Velocities u(z, r, t): networks bound to their conditioning, and passes that keep no graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""u(z, r, t): ``[B, C, H, W]``, ``[B]``, ``[B]`` -> ``[B, C, H, W]``."""

Context = Any
"""Conditioning of B samples: a tensor ``[B, ...]``, a tuple or dictionary of such tensors, or None."""

Bound = TypeVar("Bound", bound="AverageVelocity")


@dataclass(frozen=True)
class AverageVelocity:
    """u(z, r, t) of a network, bound to the conditioning of a batch.

    An objective evaluates u on a part of the batch, so it has to know the conditioning: a closure hides it.

    Attributes:
        net: called as ``net(z, r, t, context)``; a tuple becomes further positional arguments, a dictionary keyword
            arguments, and None no argument. Channels of its output behind those of z (a velocity head's) are cut off.
        context: conditioning of the B samples.
        conditions: further keyword arguments ``[B, ...]`` of ``net``, e.g. the guidance that it is to apply.

    Example:
        >>> u = AverageVelocity(lambda z, r, t, c: z * c[:, None], torch.tensor([1.0, 2.0]))
        >>> u.slice(slice(1, 2))(torch.ones(1, 3), torch.zeros(1), torch.ones(1))
        tensor([[2., 2., 2.]])
    """

    net: Callable[..., Tensor]
    context: Context = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """u of the B samples, like ``z`` ``[B, C, ...]``."""
        return self.heads(z, r, t)[:, : z.shape[1]]

    def heads(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Everything that the network predicts for the B samples.

        Raises:
            ValueError: where the conditioning is of another number of samples, or the output is not like ``z``.
            TypeError: where the output is no tensor.
        """
        output = call_with_context(self.net, (z, r, t), self.context, self.conditions)
        if not isinstance(output, Tensor):
            held = ": return its .sample" if hasattr(output, "sample") else ""
            raise TypeError(f"net(z, r, t, ...) must return a tensor, got {type(output).__name__}{held}")
        batch, channels, *sides = z.shape
        if (
            output.ndim != z.ndim
            or output.shape[0] != batch
            or output.shape[1] < channels
            or [*output.shape[2:]] != sides
        ):
            raise ValueError(f"net(z, r, t, ...) must return a tensor like z, {[*z.shape]}, got {[*output.shape]}")
        return output

    def slice(self: Bound, part: slice) -> Bound:
        """The same velocity for a part of the batch."""
        conditions = {name: value[part] for name, value in self.conditions.items()}
        return replace(self, context=select_context(self.context, part), conditions=conditions)


def call_with_context(
    net: Callable[..., Tensor], inputs: tuple[Tensor, ...], context: Context, conditions: Mapping[str, Tensor] = {}
) -> Tensor:
    """``net(*inputs, context)``; see ``AverageVelocity`` for tuples, dictionaries and None.

    Raises:
        ValueError: where the conditioning is of another number of samples than ``inputs``.
    """
    map_context(context, lambda tensor: check_batch(tensor, inputs[0].shape[0]))
    if context is None:
        return net(*inputs, **conditions)
    if isinstance(context, Mapping):
        return net(*inputs, **context, **conditions)
    return net(*inputs, *(context if isinstance(context, tuple | list) else (context,)), **conditions)


def expand_context(context: Context, batch: int) -> Context:
    """Conditioning of one sample repeated for ``batch`` samples, without a copy; of ``batch`` samples as it is."""
    return map_context(
        context, lambda tensor: tensor.expand(batch, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor
    )


def select_context(context: Context, samples: slice | Tensor, batch: int | None = None) -> Context:
    """Conditioning of a part of the samples, or of those with the given indices ``[N]``.

    Raises:
        ValueError: where it is of another number of samples than ``batch``, if that is given.
    """
    if batch is not None:
        map_context(context, lambda tensor: check_batch(tensor, batch))
    return map_context(context, lambda tensor: tensor[samples])


def slice_velocity(u: Velocity, part: slice, batch: int) -> Velocity:
    """``u`` for a part of a batch of ``batch`` samples.

    Raises:
        TypeError: for a plain function and a proper part: nobody can see which conditioning belongs to it.
    """
    if isinstance(u, AverageVelocity):
        return u.slice(part)
    if part.indices(batch) == (0, batch, 1):
        return u
    raise TypeError(
        f"u is a {type(u).__name__}, which cannot be evaluated on a part of the batch (the r < t samples): give "
        "AverageVelocity(net, context) instead of a closure over the conditioning, or AverageVelocity(u) where there "
        "is none"
    )


class CoarseOutput:
    """Finds networks that compute in 16 bits: an output of that dtype, or one that was cast up from it.

    The values are looked at until they can tell, which waits for the device once.
    """

    _ENOUGH = 64
    """Different values that are not all round by chance."""

    def __init__(self) -> None:
        self._looked = False

    def __call__(self, u: Tensor) -> torch.dtype | None:
        """The dtype, or None where ``u`` is finer."""
        if torch.finfo(u.dtype).eps > torch.finfo(torch.float32).eps:
            return u.dtype
        if self._looked or torch.compiler.is_compiling() or torch.unique(u).numel() < self._ENOUGH:
            return None
        self._looked = True
        return next((half for half in (torch.bfloat16, torch.float16) if (u == u.to(half).to(u.dtype)).all()), None)


@contextmanager
def fresh_casts() -> Iterator[None]:
    """A context after which autocast casts the weights anew, as the casts in its cache belong to another graph."""
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def no_grad_pass() -> Iterator[None]:
    """A context for forward passes without a graph; a later pass with a graph does not reuse their casts."""
    with fresh_casts(), torch.no_grad():
        yield


def stop_gradient(u: Velocity, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """sg[u(z, r, t)], like ``z`` and in its precision: a part of a target."""
    with no_grad_pass():
        return u(z, r, t).to(z.dtype)


def map_context(context: Context, function: Callable[[Tensor], Any]) -> Context:
    """``function`` of each tensor of a conditioning, in the same shape."""
    if context is None:
        return None
    if isinstance(context, Tensor):
        return function(context)
    if isinstance(context, Mapping):
        return {name: map_context(value, function) for name, value in context.items()}
    if isinstance(context, tuple | list):
        return tuple(map_context(value, function) for value in context)
    raise TypeError(
        f"context must be a tensor, a tuple or dictionary of tensors, or None, got {type(context).__name__}: the "
        "objective slices it sample by sample"
    )


def check_batch(tensor: Tensor, batch: int) -> None:
    """Raises ``ValueError`` for a tensor of a conditioning that is of another number of samples."""
    if tensor.ndim == 0 or tensor.shape[0] != batch:
        raise ValueError(
            f"context has a tensor of shape {list(tensor.shape)} for a batch of {batch} samples: the first dimension "
            f"of each must be {batch}"
        )
