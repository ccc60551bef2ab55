"""Each rule against torch's own forward mode, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operations import count_operations
from emf_lightning.flow.derivative import attention
from emf_lightning.flow.derivative.fast_forward_mode import FastForwardMode


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def tangent(function, *moving: torch.Tensor, fast: bool) -> torch.Tensor:
    """Of ``function`` along random tangents of its arguments."""
    tangents = [tensor(*x.shape, seed=10 + i) for i, x in enumerate(moving)]
    if not fast:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(function, moving, tuple(tangents))[1]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), FastForwardMode():
        duals = [forward_ad.make_dual(x, dx) for x, dx in zip(moving, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


X, Q, K = tensor(2, 5, 6), tensor(2, 3, 5, 4, seed=1), tensor(2, 3, 7, 4, seed=2)
V, W, B = tensor(2, 3, 7, 8, seed=3), tensor(6, seed=4), tensor(6, seed=5)
IMAGE = tensor(2, 5, 7, 6, seed=6).permute(0, 3, 1, 2)  # as SANA's, whose channels lie innermost
SEEN = torch.tensor([[True] * 4 + [False] * 3])
CASES = {
    "linear": (lambda x: F.linear(x, tensor(4, 6), tensor(4)), X),
    "linear by keyword": (lambda x: F.linear(input=x, weight=tensor(4, 6)), X),
    "linear whose weight moves": (lambda x, w: F.linear(x, w), X, tensor(4, 6)),
    "linear whose bias moves": (lambda x, b: F.linear(x, tensor(4, 6), b), X, tensor(4)),
    "convolution": (lambda x: F.conv2d(x, tensor(8, 6, 3, 3), tensor(8), stride=2, padding=1), IMAGE),
    "depthwise": (lambda x: F.conv2d(x, tensor(6, 1, 3, 3), None, 1, 1, 1, 6), IMAGE),
    "layer norm": (lambda x: F.layer_norm(x, (6,)), X),
    "layer norm with weights": (lambda x: F.layer_norm(x, (6,), W, B, 1e-6), X),
    "layer norm whose weight moves": (lambda x, w: F.layer_norm(x, (6,), w, B), X, W),
    "layer norm whose bias moves": (lambda x, b: F.layer_norm(x, (6,), W, b), X, B),
    "layer norm over two dimensions": (lambda x: F.layer_norm(x, (5, 6)), X),
    "group norm": (lambda x: F.group_norm(x, 3), IMAGE),
    "group norm with weights": (lambda x: F.group_norm(x, 2, W, B, 1e-6), IMAGE),
    "group norm over one dimension": (lambda x: F.group_norm(x.flatten(2), 2, W), IMAGE),
    "group norm whose weight moves": (lambda x, w: F.group_norm(x, 2, w, B), IMAGE.contiguous(), W),
    "group norm whose bias moves": (lambda x, b: F.group_norm(x, 2, W, b), IMAGE.contiguous(), B),
    "attention to what stands still": (lambda q: F.scaled_dot_product_attention(q, K, V), Q),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), Q, K, V),
    "attention of keys": (lambda k: F.scaled_dot_product_attention(Q, k, V), K),
    "attention of values": (lambda v: F.scaled_dot_product_attention(Q, K, v), V),
    "masked attention": (lambda q, k: F.scaled_dot_product_attention(q, k, V, SEEN), Q, K),
    "attention with a bias": (lambda q: F.scaled_dot_product_attention(q, K, V, -1e4 * (~SEEN).double()), Q),
    "attention with a scale": (lambda q, k: F.scaled_dot_product_attention(q, k, V, scale=0.3), Q, K),
    "attention whose mask moves": (lambda q, m: F.scaled_dot_product_attention(q, K, V, m), Q, tensor(3, 5, 7)),
    "causal attention": (lambda q, k: F.scaled_dot_product_attention(q, k, V, is_causal=True), Q, K),
    "attention of grouped queries": (
        lambda q, k: F.scaled_dot_product_attention(q, k, V, enable_gqa=True),
        tensor(2, 6, 5, 4),
        K,
    ),
    "attention with dropout": (lambda q, k: _dropped(q, k), Q, K),
    "joint attention": (lambda q, k, v: _joint(q, k, v), Q, K, V),
    "RMS norm": (lambda x: F.rms_norm(x, (6,), W, 1e-6), X),
    "gated activation": (lambda x: x[..., :3] * F.silu(x[..., 3:]), X),
    "RoPE": (lambda x: x * X[0].cos() + torch.stack([-x[..., 3:], x[..., :3]], -2).flatten(-2) * X[0].sin(), X),
}
"""Name -> operation and its arguments that move; the last three have torch's own rules."""


def _joint(*moving: torch.Tensor) -> torch.Tensor:
    """Beside text that stands still."""
    return F.scaled_dot_product_attention(
        *(torch.cat([x[:, :, :2], y], 2) for x, y in zip((Q, K, V), moving, strict=True))
    )


def _dropped(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return F.scaled_dot_product_attention(q, k, V, dropout_p=0.5)


@pytest.mark.parametrize("case", CASES)
def test_rule_equals_torchs(case):
    function, *moving = CASES[case]
    fast = tangent(function, *moving, fast=True)
    stock = tangent(function, *(x.contiguous() for x in moving), fast=False)  # torch 2.10's group norm needs it
    assert (fast - stock).norm() < 1e-12 * stock.norm()


@pytest.mark.parametrize("case", [case for case in CASES if "attention" in case])
def test_rule_in_blocks_equals_torchs(case, monkeypatch):
    monkeypatch.setattr(attention, "WHOLE_LOGITS", 0)
    test_rule_equals_torchs(case)


@pytest.mark.parametrize("case", CASES)
def test_value_is_the_plain_one(case):
    function, *moving = CASES[case]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), FastForwardMode():
        value = forward_ad.unpack_dual(function(*(forward_ad.make_dual(x, x) for x in moving))).primal
    assert (value - function(*moving)).abs().max() < 1e-12


def test_a_row_that_sees_nothing_is_0_and_stays_0():
    nothing = torch.zeros(1, 7, dtype=torch.bool)
    derivative = tangent(lambda q, k: F.scaled_dot_product_attention(q, k, V, nothing), Q, K, fast=True)
    assert torch.equal(derivative, torch.zeros_like(derivative))


def test_tangents_lie_in_memory_as_their_values_do():
    with torch.no_grad(), forward_ad.dual_level(), FastForwardMode():
        x = forward_ad.make_dual(IMAGE, IMAGE)
        result = forward_ad.unpack_dual(F.conv2d(x, tensor(6, 1, 3, 3), None, 1, 1, 1, 6))
    assert result.tangent.stride() == result.primal.stride()


LAYERS = [torch.nn.Linear(6, 4), torch.nn.Conv2d(6, 8, 3), torch.nn.Conv2d(6, 6, 3, groups=6)]


@pytest.mark.parametrize(("layer", "x"), [*zip(LAYERS, (X, IMAGE, IMAGE), strict=True)])
def test_weights_that_stand_still_cost_nothing(layer, x):
    """Value and tangent take two forward passes' operations."""
    layer.double()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with FastForwardMode():
            both = count_operations(lambda: layer(dual))
        assert both == 2 * count_operations(lambda: layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_stock_types(dtype):
    x, w = torch.randn(2, 5, 6, dtype=dtype), torch.randn(4, 6)
    q = torch.randn(2, 3, 5, 4, dtype=dtype)
    for function, moving in (
        (lambda x: F.linear(x, w), x),
        (lambda x: F.layer_norm(x, (6,)), x),
        (lambda x: F.layer_norm(x, (6,), torch.ones(6), torch.zeros(6)), x),
        (lambda x: F.group_norm(x.transpose(1, 2), 2, torch.ones(6), torch.zeros(6)), x),
        (lambda q: F.scaled_dot_product_attention(q, q.detach(), q.detach()), q),
    ):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), forward_ad.dual_level():
            plain = function(moving)
            with FastForwardMode():
                result = forward_ad.unpack_dual(function(forward_ad.make_dual(moving, moving)))
        assert result.primal.dtype == result.tangent.dtype == plain.dtype
