"""Counts of what a computation does, the same on every machine: floating-point operations, and bytes at its peak.

torch's own ``FlopCounterMode`` counts the backward pass of depthwise convolutions ``groups`` times over, and fails
under forward-mode differentiation; the peak is that of the allocator, so it holds what forward mode allocates too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class OperationCounter(TorchDispatchMode):
    """Counts 2 operations for each multiply-add of products, convolutions and attention, in all passes.

    Elementwise work is not counted. ``torch.func.jvp`` and backward passes are counted as they run.

    Attributes:
        by_operator: aten operator -> operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All operations so far."""
        return sum(self.by_operator.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _COUNTS:
            self.by_operator[packet.__name__] += _COUNTS[packet](args, kwargs or {}, result)
        return result


def _mm(a: Tensor, b: Tensor) -> int:
    return 2 * a.numel() * b.shape[-1]


def _convolution(args: tuple[Any, ...], kwargs: Any, result: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return 2 * (x if transposed else result).numel() * weight[0].numel()


def _convolution_backward(args: tuple[Any, ...], kwargs: Any, result: Any) -> int:
    grad, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    # one product each for the input's and the weight's gradient, of the forward pass's size
    return 2 * (x if transposed else grad).numel() * weight[0].numel() * sum(mask[:2])


def _attention(q: Tensor, k: Tensor, v: Tensor, products_qk: int, products_v: int) -> int:
    pairs = q.shape[:-1].numel() * k.shape[-2]
    return 2 * pairs * (products_qk * q.shape[-1] + products_v * v.shape[-1])


_Count = Callable[[tuple[Any, ...], Any, Any], int]
_COUNTS: dict[Any, _Count] = {
    aten.mm: lambda a, k, r: _mm(a[0], a[1]),
    aten.bmm: lambda a, k, r: _mm(a[0], a[1]),
    aten.addmm: lambda a, k, r: _mm(a[1], a[2]),
    aten.baddbmm: lambda a, k, r: _mm(a[1], a[2]),
    aten.linear: lambda a, k, r: 2 * a[0].numel() * a[1].shape[0],
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
}
# forward: q k^T and p v; backward: q k^T again, and the gradients of q, k (as wide as q) and of p, v (as wide as v)
for _name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    if (_op := getattr(aten, f"_scaled_dot_product_{_name}", None)) is not None:
        _COUNTS[_op] = lambda a, k, r: _attention(*a[:3], 1, 1)
        _COUNTS[getattr(aten, f"_scaled_dot_product_{_name}_backward")] = lambda a, k, r: _attention(*a[1:4], 3, 2)


def count_operations(function: Callable[[], object]) -> int:
    """Floating-point operations of one call."""
    with OperationCounter() as counter:
        function()
    return counter.total


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call has allocated at its peak, above those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
