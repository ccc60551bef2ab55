"""The counter that `make bench` and the cost of the derivative are measured with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operations import count_operations, peak_bytes
from emf_lightning.flow.derivative.fast_forward_mode import FastForwardMode
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import UniformWeighting
from tests.flow.derivative.test_derivative import network, velocity


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def test_linear_layers_are_two_operations_a_weight_and_row_and_twice_that_backwards():
    x, w, b = leaf(5, 7, 3), leaf(4, 3), leaf(4)
    assert count_operations(lambda: F.linear(x, w, b)) == 2 * 35 * 3 * 4
    assert count_operations(lambda: F.linear(x, w)) == 2 * 35 * 3 * 4
    assert count_operations(lambda: F.linear(x, w, b).sum().backward()) == 3 * 2 * 35 * 3 * 4
    assert count_operations(lambda: F.linear(x.detach(), w, b).sum().backward()) == 2 * 2 * 35 * 3 * 4


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions_count_each_output_and_its_field_whatever_the_groups(groups):
    x, w = leaf(2, 6, 8, 8), leaf(12, 6 // groups, 3, 3)
    forward = 2 * (2 * 12 * 8 * 8) * (6 // groups * 9)
    assert count_operations(lambda: F.conv2d(x, w, padding=1, groups=groups)) == forward
    assert count_operations(lambda: F.conv2d(x, w, padding=1, groups=groups).sum().backward()) == 3 * forward


@pytest.mark.parametrize(("kernel", "backward"), [(SDPBackend.MATH, 4), (SDPBackend.FLASH_ATTENTION, 5)])
def test_attention_is_two_products_and_a_fused_backward_repeats_one(kernel, backward):
    q, k, v = leaf(2, 3, 5, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 8)
    product = 2 * 2 * 3 * 5 * 7 * 8
    with sdpa_kernel(kernel):
        assert count_operations(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
        both = count_operations(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both == (2 + backward) * product


def test_forward_mode_is_counted_with_its_product_by_the_weights_zero_tangent():
    x, w = torch.randn(5, 3), torch.randn(3, 4)
    product = 2 * 5 * 3 * 4
    assert count_operations(lambda: torch.func.jvp(lambda x: x @ w, (x,), (x,))) == 3 * product
    with torch.no_grad(), forward_ad.dual_level(), FastForwardMode():
        dual = forward_ad.make_dual(x, x)
        assert count_operations(lambda: F.linear(dual, w.T)) == 2 * product


def test_peak_is_what_is_held_at_once():
    def twice() -> None:
        for _ in range(2):
            a = torch.ones(1000)
            del a

    def both() -> None:
        _ = torch.ones(1000), torch.ones(1000)

    assert peak_bytes(twice, torch.device("cpu")) == 4000
    assert peak_bytes(both, torch.device("cpu")) == 8000


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_meanflow_step_costs_at_most_a_fiftieth_more_than_it_must(share):
    """The least: a plain step, 3 forward passes' worth, and u and du/dt of a share of the rows, 2 passes' worth."""
    net = network()
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(8, 3, 12, 12, generator=generator) for _ in range(2))
    t = torch.rand(8, generator=generator)
    u = velocity(net, torch.randn(8, 5, 16, generator=generator), torch.ones(8, 5, dtype=torch.bool))
    n = round(share * 8)

    def flow() -> None:
        FlowMatching().terms(u, z, v, Times(t, t, 0), UniformWeighting()).loss.backward()

    def meanflow(fast: bool) -> None:
        times = Times(torch.cat([t[:n] / 2, t[n:]]), t, n)
        MeanFlow(derivative=ForwardMode(fast=fast)).terms(u, z, v, times, UniformWeighting(), 0.0).loss.backward()

    plain = count_operations(flow)
    least = (3 + 2 * share) / 3
    assert count_operations(lambda: meanflow(fast=True)) <= 1.02 * least * plain
    assert count_operations(lambda: meanflow(fast=False)) > 1.02 * least * plain, "fast mode has nothing left to save"
