"""Attention in blocks against torch's own forward mode and against differences, both in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operations import peak_bytes
from emf_lightning.flow.derivative import attention
from emf_lightning.flow.derivative.attention import BLOCK_LOGITS, WHOLE_LOGITS, blockwise_attention
from emf_lightning.flow.derivative.fast_forward_mode import FastForwardMode
from emf_lightning.flow.derivative.forward_mode import ForwardMode

QUERIES, KEYS, WIDTH, VALUES, SCALE = 11, 13, 4, 6, 0.7
MOVING = [moving for moving in itertools.product((True, False), repeat=3) if any(moving)]


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(rising: float = 0.0) -> tuple[torch.Tensor, ...]:
    """q, k, v, whose logits rise along the keys."""
    k = tensor(2, 3, KEYS, WIDTH, seed=2) + rising * torch.arange(KEYS)[:, None]
    return 1 + tensor(2, 3, QUERIES, WIDTH, seed=1), k, tensor(2, 3, KEYS, VALUES, seed=3)


def tangents(moving: tuple[bool, ...]) -> list[torch.Tensor | None]:
    return [tensor(*x.shape, seed=10 + i) if moving[i] else None for i, x in enumerate(inputs())]


def plain(q, k, v, mask=None):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE)


def stock(arguments, tangents, mask=None):
    """Torch's own value and tangent."""
    given = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(arguments, tangents, strict=True)]
    return torch.func.jvp(lambda q, k, v: plain(q, k, v, mask), tuple(arguments), tuple(given))


def wrong_by(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


FIRST_KEYS_HIDDEN = torch.arange(KEYS) >= 7  # the first blocks of keys are seen by none
SOME_SEE_NOTHING = (tensor(2, 1, QUERIES, KEYS, seed=4) > 0) & (torch.arange(QUERIES)[:, None] % 3 > 0)
MASKS = {
    "none": None,
    "keys": FIRST_KEYS_HIDDEN,
    "keys of each sample": torch.stack([FIRST_KEYS_HIDDEN, ~FIRST_KEYS_HIDDEN])[:, None, None],
    "pairs, of which some queries see nothing": SOME_SEE_NOTHING,
    "added": tensor(3, QUERIES, KEYS, seed=5),
    "added to queries": tensor(3, QUERIES, 1, seed=5),
    "infinite": torch.zeros(2, 1, QUERIES, KEYS).double().masked_fill(~SOME_SEE_NOTHING, -torch.inf),
}


@pytest.mark.parametrize("block", [1, 4, 50])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("moving", MOVING)
def test_value_and_tangent_are_torchs(moving, mask, block):
    arguments, along = inputs(), tangents(moving)
    got = blockwise_attention(*arguments, *along, MASKS[mask], SCALE, block)
    for mine, torchs in zip(got, stock(arguments, along, MASKS[mask]), strict=True):
        assert wrong_by(mine, torchs) < 1e-13


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("rising", [1.0, -1.0, 20.0])
def test_largest_logit_may_come_first_or_last(rising, moving):
    arguments, along = inputs(rising), tangents(moving)
    value, tangent = blockwise_attention(*arguments, *along, None, SCALE, 4)
    assert wrong_by(value, plain(*arguments)) < 1e-12
    step = 1e-6
    ahead, behind = (
        plain(*(x if dx is None else x + sign * step * dx for x, dx in zip(arguments, along, strict=True)))
        for sign in (1, -1)
    )
    differences = (ahead - behind) / (2 * step)
    assert (tangent - differences).norm() < 1e-6 * max(1.0, float(differences.norm()))


def test_a_query_that_sees_nothing_is_0_and_stays_0():
    value, tangent = blockwise_attention(*inputs(), *tangents((True,) * 3), SOME_SEE_NOTHING, SCALE, 4)
    assert not value[:, :, ::3].any()
    assert not tangent[:, :, ::3].any()


def test_nothing_that_moves_has_no_tangent():
    value, tangent = blockwise_attention(*inputs(), None, None, None, None, SCALE, 4)
    assert wrong_by(value, plain(*inputs())) < 1e-13
    assert tangent is None


@pytest.mark.parametrize("moving", MOVING)
def test_half_precision_is_summed_in_fp32(moving):
    """Wrong by the rounding of the inputs and of the result, no more, over many blocks, with and without autocast."""
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(1, 2, 700, 8, generator=generator).bfloat16() for _ in range(6)]
    along = [dx if moves else None for dx, moves in zip(rounded[3:], moving, strict=True)]
    with torch.autocast("cpu", torch.bfloat16, enabled=moving[0]):
        got = blockwise_attention(*rounded[:3], *along, None, SCALE, 16)
    exact = stock([x.double() for x in rounded[:3]], [None if dx is None else dx.double() for dx in along])
    for mine, wanted in zip(got, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert wrong_by(mine, wanted) < 2.5e-3  # that of rounding ``wanted`` alone is 1.7e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_gives_the_stock_type(dtype):
    arguments = [x.to(dtype) for x in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        got = blockwise_attention(*arguments, *arguments, None, SCALE, 4)
        expected = plain(*arguments).dtype
    assert [x.dtype for x in got] == [expected] * 2


LONG = 4160


def long_inputs(rows: int = LONG) -> list[torch.Tensor]:
    assert LONG * LONG > WHOLE_LOGITS
    return [tensor(1, 1, rows, 8, seed=seed) for seed in range(6)]


def in_fast_mode(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), FastForwardMode():
        return forward_ad.unpack_dual(plain(*map(forward_ad.make_dual, given[:3], given[3:])))


def test_long_attention_takes_blocks():
    given = long_inputs()
    taken: list[torch.Tensor] = []
    peak = peak_bytes(lambda: taken.extend(in_fast_mode(*given)), torch.device("cpu"))
    value, tangent = taken
    rows = slice(4090, 4110)
    expected = stock([given[0][..., rows, :], *given[1:3]], [given[3][..., rows, :], *given[4:]])
    assert wrong_by(value[..., rows, :], expected[0]) < 1e-13
    assert wrong_by(tangent[..., rows, :], expected[1]) < 1e-13
    assert peak < 5 * 8 * BLOCK_LOGITS < 8 * 1.3 * LONG * LONG  # all weights and their tangents take 4 times that


@pytest.mark.parametrize(("spare", "blocks"), [(0, 0), (-1, 1)])
def test_logits_of_all_samples_and_heads_count(monkeypatch, spare, blocks):
    taken = []
    monkeypatch.setattr(attention, "WHOLE_LOGITS", 2 * 3 * QUERIES * KEYS + spare)
    monkeypatch.setattr(attention, "blockwise_attention", lambda *given: taken.append(0) or blockwise_attention(*given))
    in_fast_mode(*inputs(), *tangents((True,) * 3))
    assert len(taken) == blocks


def test_memory_is_linear_in_length():
    def peaks(function):
        lengths = ([x.float() for x in long_inputs(length)] for length in (1024, 2048, 4096))
        return [peak_bytes(lambda given=given: function(*given), torch.device("cpu")) for given in lengths]

    blocks = peaks(lambda *given: blockwise_attention(*given, None, SCALE, 128))
    assert blocks[2] < 2.1 * blocks[1] < 4.3 * blocks[0]
    all_at_once = peaks(in_fast_mode)
    assert all_at_once[2] > 3.8 * all_at_once[1] > 14 * all_at_once[0]
    assert blocks[2] < all_at_once[2] / 50


def test_du_dt_of_a_long_attention_is_exact():
    """Through the derivative itself: the fast pass, in blocks, against torch's own."""
    w = tensor(3, 8, 8, seed=9) / 3

    def u(z, r, t):
        q, k, v = (z * (1 + t[:, None, None]) @ each for each in w)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    z, v = tensor(1, LONG, 8), tensor(1, LONG, 8, seed=1)
    r, t = torch.tensor([0.2]).double(), torch.tensor([0.7]).double()
    fast, torchs = (ForwardMode(fast=fast).jvp(u, z, r, t, v) for fast in (True, False))
    assert wrong_by(fast, torchs) < 1e-12
