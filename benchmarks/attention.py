"""Measures the forward rules of attention: torch's own, ours with all weights held, and ours in blocks.

A section of docs/results/derivative.md; `python -m benchmarks.attention` prints it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operations import count_operations, peak_bytes
from emf_lightning.flow.derivative.attention import BLOCK_LOGITS, WholeAttention, blockwise_attention

LENGTHS, HEADS, WIDTH, ROUNDS = (1024, 2048, 4096), 4, 64, 4
HEAD = ("length", "type", "rule", "operations", "time", "peak, MiB")


def rules(given: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Each rule on q, k, v and their tangents; first, the kernel of a forward pass, which gives no tangent."""
    q, k, v, dq, dk, dv = given
    block = math.isqrt(BLOCK_LOGITS // HEADS)

    def stock() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), (dq, dk, dv))

    def whole() -> object:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, dx) for x, dx in zip((q, k, v), (dq, dk, dv), strict=True)]  # type: ignore[no-untyped-call]
            return WholeAttention.apply(*duals, None, WIDTH**-0.5)

    return {
        "value only, torch's kernel": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch's own": stock,
        "all weights held": whole,
        "in blocks": lambda: blockwise_attention(q, k, v, dq, dk, dv, None, WIDTH**-0.5, block),
    }


def measure(device: torch.device, timer: Callable[[], float]) -> list[list[str]]:
    """Rows of the table: operations and time relative to the kernel of a forward pass, and the peak."""
    rows = []
    for dtype, length in [(torch.float32, length) for length in LENGTHS] + [(torch.bfloat16, LENGTHS[-1])]:
        given = [torch.randn(1, HEADS, length, WIDTH, device=device, dtype=dtype) for _ in range(6)]
        with torch.no_grad():
            kinds = rules(given)
            times: dict[str, list[float]] = {name: [] for name in kinds}
            for _ in range(ROUNDS + 1):
                for name, rule in kinds.items():
                    start = timer()
                    rule()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    times[name].append(timer() - start)
            took = {name: statistics.median(each[1:]) for name, each in times.items()}
            counts = {name: count_operations(rule) for name, rule in kinds.items()}
            unit = next(iter(kinds))
            for name, rule in kinds.items():
                cost = f"{counts[name] / counts[unit]:.2f}", f"{took[name] / took[unit]:.1f}"
                peak = f"{peak_bytes(rule, device) / 2**20:.0f}"
                rows.append([str(length), str(dtype).removeprefix("torch."), name, *cost, peak])
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in [HEAD, ["---"] * len(HEAD), *measure(torch.device("cpu"), time.process_time)]:
        print("|", " | ".join(row), "|", flush=True)
