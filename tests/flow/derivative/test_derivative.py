from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.derivative.finite_difference import FiniteDifference
from emf_lightning.flow.derivative.forward_mode import ForwardMode, Fused
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.networks.prediction import PredictVelocity
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap

ROWS, N = 6, 4
TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "patch_size": 4,
}
EXACT = [ForwardMode(), ForwardMode(fast=False), Fused()]


def network(time_scale: float = 1.0, **architecture) -> SanaFlowMap:
    torch.manual_seed(0)
    net = SanaFlowMap(
        SanaArchitecture(**(TINY | architecture)),
        prediction=PredictVelocity(),
        time_scale=time_scale,
        latent_size=12,
        context_width=16,
    )
    nn.init.normal_(net.transformer.time_embed.interval.linear.weight, std=0.05)
    return net


def inputs():
    generator = torch.Generator().manual_seed(1)
    z, v = (torch.randn(ROWS, 3, 12, 12, generator=generator) for _ in range(2))
    t = 0.3 + 0.6 * torch.rand(ROWS, generator=generator)
    r = torch.cat([t[:N] * 0.4, t[N:]])
    context = torch.randn(ROWS, 5, 16, generator=generator)
    mask = torch.ones(ROWS, 5, dtype=torch.bool)
    mask[:, 3:] = False
    return z, r, t, v, context, mask


def velocity(net: SanaFlowMap, context: torch.Tensor, mask: torch.Tensor) -> AverageVelocity:
    return AverageVelocity(net, (context, mask))


def of(net: SanaFlowMap, derivative: Derivative) -> tuple[torch.Tensor, torch.Tensor]:
    z, r, t, v, context, mask = inputs()
    return derivative(velocity(net, context, mask), z, r, t, v, N)


def gradient(net: SanaFlowMap, derivative: Derivative, autocast: bool = False) -> list[torch.Tensor]:
    """Of the MeanFlow error, by every parameter."""
    z, r, t, v, context, mask = inputs()
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        u, dudt = derivative(velocity(net, context, mask), z, r, t, v, N)
        target = torch.cat([v[:N] - (t - r)[:N].view(-1, 1, 1, 1) * dudt, v[N:]])
        (u.float() - target).square().mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def full_batch_gradient(net: SanaFlowMap) -> list[torch.Tensor]:
    """The reference: stock jvp of every row, in one dual pass with a graph."""
    z, r, t, v, context, mask = inputs()
    net.zero_grad()
    u, dudt = Fused()(velocity(net, context, mask), z, r, t, v, ROWS)
    (u - (v - (t - r).view(-1, 1, 1, 1) * dudt)).square().mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    assert len(got) == len(wanted)
    apart = sum(float((a - b).detach().double().square().sum()) for a, b in zip(got, wanted, strict=True))
    return (apart / sum(float(b.detach().double().square().sum()) for b in wanted)) ** 0.5


@pytest.mark.parametrize("derivative", EXACT)
def test_gradient_is_the_full_batch_one(derivative):
    net = network()
    assert error(gradient(net, derivative), full_batch_gradient(net)) < 1e-6


def test_fast_mode_differs_by_rounding_from_torchs_own():
    net = network()
    fast, stock = of(net, ForwardMode()), of(net, ForwardMode(fast=False))
    assert error([fast[1]], [stock[1]]) < 1e-6
    assert torch.equal(fast[0], stock[0])


@pytest.mark.parametrize("derivative", [*EXACT, FiniteDifference(1e-3)])
def test_derivative_has_no_graph_and_u_has_one(derivative):
    u, dudt = of(network(), derivative)
    assert u.shape == (ROWS, 3, 12, 12)
    assert dudt.shape == (N, 3, 12, 12)
    assert u.requires_grad
    assert not dudt.requires_grad


@pytest.mark.parametrize("derivative", [*EXACT, FiniteDifference(1e-3)])
def test_no_interval_rows_is_a_plain_pass(derivative):
    net = network()
    z, _, t, v, context, mask = inputs()
    u = velocity(net, context, mask)
    value, dudt = derivative(u, z, t, t, v, 0)
    assert torch.equal(value, u(z, t, t))
    assert len(dudt) == 0


@pytest.mark.parametrize(
    ("derivative", "bound"), [(FiniteDifference(1e-3), 2e-3), (FiniteDifference(1e-3, central=False), 2e-2)]
)
def test_finite_differences_come_near_the_exact_derivative(derivative, bound):
    net = network()
    exact = of(net, ForwardMode())[1]
    assert 0 < error([of(net, derivative)[1]], [exact]) < bound


def test_finite_differences_are_refused_where_rounding_drowns_them():
    with pytest.raises(ValueError, match="11 %"):
        FiniteDifference(precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="ForwardMode"):
            of(network(), FiniteDifference(precision="training"))
        of(network(), FiniteDifference(1e-3))
    with pytest.raises(ValueError, match="step"):
        FiniteDifference(0.0)


WIDE = {
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 64,
}


@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
@pytest.mark.parametrize(("derivative", "bound"), [(ForwardMode("fp32"), 1e-4), (ForwardMode("bf16"), 1e-2)])
def test_relative_error_against_float64(derivative, bound, time_scale):
    net = network(time_scale, **WIDE)
    assert error([of(net, derivative)[1].double()], [of64(net)]) < bound


def of64(net: SanaFlowMap) -> torch.Tensor:
    z, r, t, v, context, mask = (x.double() if x.is_floating_point() else x for x in inputs())
    net = copy.deepcopy(net).double()
    return ForwardMode().jvp(velocity(net, context[:N], mask[:N]), z[:N], r[:N], t[:N], v[:N])


def test_times_rounded_to_bf16_ruin_the_derivative_and_are_refused():
    """What a mixed-precision policy that casts its inputs does, at SANA's own time scale."""
    net = network(1000.0)
    z, r, t, v, context, mask = inputs()
    u = velocity(net, context, mask)
    with pytest.raises(TypeError, match="fp32"):
        ForwardMode()(u, z, r.bfloat16(), t.bfloat16(), v, N)

    scale = net.time_scale

    def rounded(z, r, t):  # as the policy casts 1000 t at the transformer's door
        scaled = ((scale * time).bfloat16().float() / scale for time in (r, t))
        return net(z, *scaled, context[:N], mask[:N])

    assert error([ForwardMode().jvp(rounded, z[:N], r[:N], t[:N], v[:N])], [of(net, ForwardMode())[1]]) > 0.1


def test_precision_is_the_derivatives_own():
    net = network(1000.0)
    exact = of(net, ForwardMode())[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(of(net, ForwardMode("fp32"))[1], exact)
        rounded = of(net, ForwardMode())[1]
        assert error([rounded], [exact]) > 1e-4
    assert torch.equal(of(net, ForwardMode("bf16"))[1], rounded)
    with pytest.raises(ValueError, match="fp16"):
        ForwardMode("fp16")


def test_attention_kernel_is_replaced_inside_the_derivative_only(monkeypatch):
    from torch.nn.functional import scaled_dot_product_attention

    kernels = []

    def spy(*args, **kwargs):
        on = torch.backends.cuda.flash_sdp_enabled()
        kernels.append((torch.is_grad_enabled(), on))
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    of(network(), ForwardMode())
    assert set(kernels) == {(False, False), (True, True)}


@pytest.mark.parametrize("derivative", EXACT)
def test_autocast_keeps_no_weight_cast_without_a_graph(derivative):
    """Autocast caches casts; one made inside the derivative has no gradient to hand on."""
    net = network()
    cached = gradient(net, derivative, autocast=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        z, r, t, v, context, mask = inputs()
        net.zero_grad()
        u, dudt = derivative(velocity(net, context, mask), z, r, t, v, N)
        target = torch.cat([v[:N] - (t - r)[:N].view(-1, 1, 1, 1) * dudt, v[N:]])
        (u.float() - target).square().mean().backward()
    assert error(cached, [p.grad for p in net.parameters() if p.grad is not None]) < 1e-4  # sums in bf16


@pytest.mark.parametrize("derivative", EXACT)
def test_dropout_masks_are_the_same_in_u_and_its_derivative(derivative):
    net = network(dropout=0.3).train()
    z, r, t, v, context, mask = inputs()
    u = velocity(net, context, mask)
    torch.manual_seed(3)
    value, dudt = derivative(u, z, r, t, v, N)
    torch.manual_seed(3)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected, derived = torch.func.jvp(
            lambda z, t: u.slice(slice(N))(z, r[:N], t), (z[:N], t[:N]), (v[:N], torch.ones(N))
        )
    assert torch.allclose(value[:N], expected, atol=1e-6)
    assert error([dudt], [derived]) < 1e-6
    assert not torch.allclose(value[:N], velocity(net.eval(), context, mask)(z, r, t)[:N], atol=1e-3)


@pytest.mark.parametrize("central", [True, False])
def test_difference_quotients_drop_the_same_units_in_all_passes(central):
    net = network(dropout=0.3).train()
    z, r, t, v, context, mask = inputs()
    u = velocity(net, context, mask)
    found = []
    for derivative in (FiniteDifference(1e-3, central=central), ForwardMode()):
        torch.manual_seed(3)
        found.append(derivative(u, z, r, t, v, N))
    (value, quotient), (expected, dudt) = found
    assert torch.allclose(value, expected, atol=1e-6)
    assert error([quotient], [dudt]) < 0.02


def test_gradient_checkpointing_changes_nothing():
    net = network()
    plain = gradient(net, ForwardMode())
    net.transformer.enable_gradient_checkpointing()
    net.train()
    assert error(gradient(net, ForwardMode()), plain) < 1e-6


@pytest.mark.parametrize("fast", [True, False])
def test_compiled_blocks_run_uncompiled_in_the_derivative_and_compiled_before_and_after(fast):
    torch._dynamo.reset()
    compiled: list[object] = []
    calls: list[object] = []

    def backend(graph, inputs):
        compiled.append(graph)
        return lambda *args: calls.append(graph) or graph(*args)

    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU(), torch.nn.LayerNorm(4))
    block.compile(backend=backend)

    def u(z, r, t):
        return block(z) * t[:, None]

    z, v, r, t = torch.randn(2, 4), torch.randn(2, 4), torch.zeros(2), torch.ones(2)
    u(z, r, t)
    assert len(compiled) == len(calls) == 1
    dudt = ForwardMode(fast=fast).jvp(u, z, r, t, v)
    assert len(compiled) == len(calls) == 1
    u(z, r, t)
    assert len(compiled) == 1 and len(calls) == 2
    plain = torch.func.jvp(lambda z, t: torch.nn.Sequential(*block)(z) * t[:, None], (z, t), (v, torch.ones(2)))[1]
    assert torch.allclose(dudt, plain, atol=1e-6)
