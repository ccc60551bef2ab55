"""The second time input on each backbone that knows one time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf_lightning.flow.derivative.float64 import KeepFloat64
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import AdaptiveWeighting
from emf_lightning.modules.checkpoint import PARAMETRIZATION, described, disagreement, parametrization_of
from emf_lightning.networks.auraflow import AuraFlowArchitecture, AuraFlowFlowMap
from emf_lightning.networks.backbone import BackboneFlowMap
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.flux import FluxArchitecture, FluxFlowMap
from emf_lightning.networks.lumina2 import Lumina2Architecture, Lumina2FlowMap
from emf_lightning.networks.mmdit import MMDiTArchitecture, MMDiTFlowMap
from emf_lightning.networks.pixart import PixArtArchitecture, PixArtFlowMap
from emf_lightning.networks.qwen_image import QwenImageArchitecture, QwenImageFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval, DecoupledInterval, IntervalInput, SummedInterval
from emf_lightning.networks.unet import TextUNetFlowMap, UNetArchitecture, UNetFlowMap
from emf_lightning.pipeline import PipelinePart

UNET = UNetArchitecture([8, 16], [False, True], layers=1, heads=2, groups=4)
MMDIT = MMDiTArchitecture(3, 2, 8, pooled_projection_dim=12, pos_embed_max_size=8)
SD35 = replace(MMDIT, qk_norm="rms_norm", dual_attention_layers=(0, 1))
FLUX = FluxArchitecture(2, 2, 2, 8, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4))
LUMINA = Lumina2Architecture(16, 2, 1, 2, 1, multiple_of=8, axes_dim_rope=(2, 2, 4), axes_lens=(16, 8, 8))

KINDS: dict[str, tuple[type[BackboneFlowMap], Any, int]] = {
    "SD3": (MMDiTFlowMap, MMDIT, 4),
    "SD3.5": (MMDiTFlowMap, SD35, 4),
    "FLUX": (FluxFlowMap, FLUX, 4),
    "PixArt": (PixArtFlowMap, PixArtArchitecture(3, 2, 8), 4),
    "Lumina2": (Lumina2FlowMap, LUMINA, 4),
    "Qwen-Image": (QwenImageFlowMap, QwenImageArchitecture(3, 2, 8, axes_dims_rope=(2, 2, 4)), 4),
    "AuraFlow": (AuraFlowFlowMap, AuraFlowArchitecture(2, 2, 2, 8, pos_embed_max_size=64), 4),
    "UNet": (UNetFlowMap, UNET, 3),
    "text UNet": (TextUNetFlowMap, UNET, 4),
}
"""Name -> class, a tiny size and channels of the latents."""

BY_BLOCKS = ("SD3", "SD3.5", "FLUX", "PixArt", "Qwen-Image", "AuraFlow")
"""Those whose blocks share a time embedding that a rule can split."""

INSIDE = {"Qwen-Image": 1000, "AuraFlow": 1000}
"""Factors on the time inside the sinusoid."""

backbones = pytest.mark.parametrize("name", KINDS)


def network(name: str, interval: IntervalInput | None, **settings: Any) -> BackboneFlowMap:
    kind, size, channels = KINDS[name]
    torch.manual_seed(0)
    source = {} if "pretrained" in settings else {"architecture": size}
    return kind(**source, latent_channels=channels, latent_size=8, context_width=16, interval=interval, **settings)


def inputs(name: str, batch: int = 3) -> tuple[Tensor, ...]:
    """z, r < t, and context with its mask."""
    torch.manual_seed(1)
    t = 0.1 + 0.8 * torch.rand(batch)
    z, context = torch.randn(batch, KINDS[name][2], 8, 8), torch.randn(batch, 7, 16)
    return z, t * torch.rand(batch), t, context, torch.ones(batch, 7, dtype=torch.bool)


def stir(net: nn.Module) -> nn.Module:
    """Changes all weights a little, so that nothing is a copy any more and no gate is zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def call(net: nn.Module, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return net(z, r, t, context, mask)


@backbones
def test_anchored_it_is_the_parent_at_r_equal_t_bit_for_bit_and_stays_so(name):
    one = stir(network(name, None)).eval()
    two = network(name, AnchoredInterval()).eval()
    missing, surplus = two.load_state_dict(one.state_dict(), strict=False)
    assert all(".interval." in key for key in missing) and not surplus
    z, r, t, *text = inputs(name)
    assert torch.equal(call(two, z, t, t, *text), call(one, z, t, t, *text))
    stir(two.model.get_submodule(f"{two.places.embedding}.interval"))
    assert torch.equal(call(two, z, t, t, *text), call(one, z, t, t, *text)), "after training"
    assert not torch.allclose(call(two, z, r, t, *text), call(one, z, t, t, *text), atol=1e-5)


@backbones
def test_the_second_embedding_sees_the_intervals_length_in_fp32(name):
    """The rules' formulas, with the embedding's own layers."""
    rules: dict[type[IntervalInput], Any] = {
        AnchoredInterval: lambda m, n, r, t: m(t) + n(t - r) - n(0 * t),
        SummedInterval: lambda m, n, r, t: m(t) + n(t - r),
    }
    z, r, t, *text = inputs(name)
    for rule, formula in rules.items():
        net = stir(network(name, rule())).eval()
        seen: list[Tensor] = []
        embedding: Any = net.model.get_submodule(net.places.embedding)
        embedding.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(_joined(output)))
        call(net, z, r, t, *text)
        m, n, turned = _of_time(net, embedding.forward), _of_time(net, embedding.interval), net.places.reversed
        expected = formula(lambda time, m=m, turned=turned: m(1 - time if turned else time), n, r, t)
        torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-4)


def _joined(embedding: Tensor | tuple[Tensor, ...]) -> Tensor:
    return embedding if isinstance(embedding, Tensor) else torch.cat(embedding, dim=1)


def _of_time(net: BackboneFlowMap, embedding: Any) -> Callable[[Tensor], Tensor]:
    """The embedding of a time in [0, 1]."""
    if net.places.sinusoid is None:
        return lambda time: _joined(embedding(net.timestep(time), hidden_dtype=torch.float32))
    sinusoid = net.model.get_submodule(net.places.sinusoid)
    return lambda time: embedding(sinusoid(net.timestep(time)))


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_decoupled_the_first_blocks_see_t_and_the_others_r(name):
    """With all blocks at t only the output norm sees r; with one the rest does; at r = t all are the parent."""
    one = stir(network(name, None)).eval()
    z, r, t, *text = inputs(name)
    for blocks in (1, len(one.blocks)):
        two = network(name, DecoupledInterval(blocks)).eval()
        assert two.state_dict().keys() == one.state_dict().keys()
        two.load_state_dict(one.state_dict())
        assert torch.equal(call(two, z, t, t, *text), call(one, z, t, t, *text))
        at_t, at_r = _embeddings(one, z, t, t, *text), _embeddings(one, z, r, r, *text)
        for i, embedding in enumerate(_embeddings(two, z, r, t, *text)):
            assert torch.equal(embedding, (at_t if i < blocks else at_r)[i])
    assert not torch.allclose(call(two, z, r, t, *text), call(one, z, t, t, *text)), "the output norm sees r"


def _embeddings(net: BackboneFlowMap, *inputs: Tensor) -> list[Tensor]:
    """The time embedding that each block is given."""
    given: list[Tensor] = []

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(kwargs[net.places.argument])

    handles = [block.register_forward_pre_hook(look, with_kwargs=True) for block in net.blocks]
    call(net, *inputs)
    for handle in handles:
        handle.remove()
    return given


@pytest.mark.parametrize("name", KINDS.keys() - BY_BLOCKS)
def test_a_rule_by_blocks_is_refused_where_blocks_share_no_embedding(name):
    with pytest.raises(ValueError, match="blocks share no time embedding"):
        network(name, DecoupledInterval(1))


@backbones
def test_dudt_is_exact(name):
    """Forward mode against central differences in float64."""
    net = stir(network(name, AnchoredInterval(), time_scale=5.0 / INSIDE.get(name, 1))).double().eval()
    z, r, t, context, mask = inputs(name)
    z, r, t, context = (each.double() for each in (z, r, t, context))
    u = AverageVelocity(net, (context, mask))
    v, h = torch.randn_like(z), 1e-4
    with KeepFloat64(), torch.no_grad():
        dudt = ForwardMode().jvp(u, z, r, t, v)
        expected = (u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h)
    error = (dudt - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 1e-3  # where a model makes fp32 numbers itself


@backbones
def test_the_gradient_is_that_of_the_whole_batch_by_torchs_own_forward_mode(name):
    """MeanFlow's, which takes du/dt of the r < t samples alone and by rules of its own."""
    net = stir(network(name, AnchoredInterval(), time_scale=5.0 / INSIDE.get(name, 1)))
    z, r, t, *text = inputs(name, 4)
    r = torch.cat([r[:2], t[2:]])
    u, v = AverageVelocity(net, tuple(text)), torch.randn_like(z)

    def gradient(loss: Tensor) -> Tensor:
        net.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    ours = gradient(MeanFlow().terms(u, z, v, Times(r, t, 2), AdaptiveWeighting(), 0.0).loss)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            dudt = torch.func.jvp(lambda z, t: u(z, r, t), (z, t), (v, torch.ones_like(t)))[1]
        except RuntimeError as error:  # older torch, of group norm with strided inputs
            if "view size" in str(error):
                pytest.skip(f"torch's own forward mode: {error}")
            raise
    squares = (u(z, r, t) - v + (t - r).view(-1, 1, 1, 1) * dudt).square().flatten(1).sum(1)
    expected = gradient((squares / (squares.detach() + 1e-3)).mean())
    assert (ours - expected).norm() < 1e-6 * expected.norm()


@backbones
def test_exported_and_read_back_it_is_the_same_network(name, tmp_path):
    net = stir(network(name, AnchoredInterval())).eval()
    kind, size, channels = KINDS[name]
    shape = {"latent_channels": channels, "latent_size": 8, "context_width": 16}
    interval = {"class_path": f"{AnchoredInterval.__module__}.AnchoredInterval"}
    arguments = {"architecture": asdict(size), "interval": interval, "gradient_checkpointing": True}
    spec = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": arguments | shape}
    PipelinePart(net, spec).save_pretrained(tmp_path)
    again = PipelinePart.from_pretrained(tmp_path).part
    assert torch.equal(call(again, *inputs(name)), call(net, *inputs(name)))


@backbones
def test_saved_and_read_back_it_is_the_same_network(name, tmp_path):
    net = stir(network(name, AnchoredInterval())).eval()
    net.save_pretrained(tmp_path / "two")
    again = network(name, AnchoredInterval(), pretrained=str(tmp_path / "two")).eval()
    assert torch.equal(call(again, *inputs(name)), call(net, *inputs(name)))
    with pytest.raises(ValueError, match=r"knows intervals; set net.init_args.interval"):
        network(name, None, pretrained=str(tmp_path / "two"))
    with pytest.raises(ValueError, match="was trained with interval 'AnchoredInterval"):
        network(name, SummedInterval(), pretrained=str(tmp_path / "two"))


@backbones
def test_from_a_flow_the_second_embedding_starts_as_a_copy_and_trains_even_if_the_flow_is_frozen(name, tmp_path):
    flow = stir(network(name, None))
    flow.save_pretrained(tmp_path / "flow")
    net = network(name, AnchoredInterval(), pretrained=str(tmp_path / "flow"))
    embedding: Any = net.model.get_submodule(net.places.embedding)
    theirs = dict(flow.model.get_submodule(net.places.embedding).named_parameters())
    ours = dict(embedding.interval.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].requires_grad for key in ours)

    net(*inputs(name)).square().mean().backward()
    still = {name for name, parameter in ours.items() if not parameter.grad.abs().max() > 0}
    assert still == {"linear.bias" if name == "PixArt" else "linear_2.bias"}, "which m'(t - r) - m'(0) cancels"


@backbones
def test_refit_reads_the_new_scale_as_the_flow_read_its_own_and_forgets_intervals(name, tmp_path):
    inside = INSIDE.get(name, 1)
    flow = network(name, None, time_scale=4.0 / inside)  # as smooth in t as a trained one
    flow.eval().save_pretrained(tmp_path / "flow")
    z, _, t, *text = inputs(name, 16)
    expected = call(flow, z, t, t, *text)

    def error(net: nn.Module) -> Tensor:
        return (call(net.eval(), z, t, t, *text) - expected).norm()

    settings = {"pretrained": str(tmp_path / "flow"), "time_scale": 2.0 / inside}
    with pytest.raises(ValueError, match=r"time_scale .*, this experiment has"):
        network(name, AnchoredInterval(), **settings)
    unfitted = network(name, None, time_scale=2.0 / inside)
    unfitted.load_state_dict(flow.state_dict())
    two = network(name, AnchoredInterval(), finetuning=Finetuning(refit=True), **settings)
    assert error(two) < 0.25 * error(unfitted)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"knows intervals .* leave refit out"):
        network(name, AnchoredInterval(), finetuning=Finetuning(refit=True), pretrained=str(tmp_path / "two"))

    two.refit_time(3.0 / inside)
    assert error(two) < 0.5 * error(unfitted)
    two.save_pretrained(tmp_path / "again")
    again = network(name, SummedInterval(), pretrained=str(tmp_path / "again"), time_scale=3.0 / inside)
    assert error(network(name, None, pretrained=str(tmp_path / "again"), time_scale=3.0 / inside)) == error(two)
    assert again.model.config["_flow_interval"] == "SummedInterval()"


@backbones
def test_only_what_is_named_trains(name):
    net = network(name, AnchoredInterval(), finetuning=Finetuning(trainable=[KINDS[name][0].places.embedding]))
    trained = {key for key, parameter in net.model.named_parameters() if parameter.requires_grad}
    assert trained and all(key.startswith(net.places.embedding) for key in trained)
    with pytest.raises(ValueError, match="reset_text_projection is for SanaFlowMap"):
        network(name, None, finetuning=Finetuning(reset_text_projection=True))


@backbones
def test_all_that_trains_has_a_gradient(name):
    """DDP waits for each."""
    net = network(name, AnchoredInterval())
    net(*inputs(name)).square().mean().backward()
    assert not [key for key, parameter in net.named_parameters() if parameter.requires_grad and parameter.grad is None]


@backbones
def test_a_copy_of_the_network_has_times_of_its_own(name):
    """A deep copy, as a frozen teacher is one, does not share the second embedding."""
    net = stir(network(name, AnchoredInterval())).eval()
    before, twin = call(net, *inputs(name)), copy.deepcopy(net)
    assert torch.equal(call(twin, *inputs(name)), before)
    stir(net)
    assert torch.equal(call(twin, *inputs(name)), before)


@backbones
def test_gradient_checkpointing_changes_no_gradient(name):
    def gradients(**settings: Any) -> Tensor:
        net = stir(network(name, AnchoredInterval(), **settings)).train()
        net(*inputs(name)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    assert torch.allclose(gradients(gradient_checkpointing=True), gradients(), atol=1e-6)


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_weights_with_a_rule_by_blocks_are_not_taken_for_a_network_of_one_time(name, tmp_path):
    decoupled, anchored = network(name, DecoupledInterval(1)), network(name, AnchoredInterval())
    decoupled.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"knows intervals; set net\.init_args\.interval to DecoupledInterval"):
        network(name, None, pretrained=str(tmp_path))
    saved = parametrization_of({PARAMETRIZATION: decoupled.parametrization})
    assert "its interval is DecoupledInterval" in str(disagreement(saved, described(network(name, None))))
    of_one_time = parametrization_of({PARAMETRIZATION: network(name, None).parametrization})
    assert disagreement(of_one_time, described(anchored)) is None, "a network that learns intervals starts from it"


@pytest.mark.parametrize("interval", [DecoupledInterval(1), AnchoredInterval(), SummedInterval()])
def test_a_network_that_forgets_its_intervals_is_one_of_one_time(interval):
    net, (z, r, t, *rest) = stir(network("SD3", interval)), inputs("SD3")
    net.refit_time(5.0)
    assert torch.equal(call(net, z, r, t, *rest), call(net, z, t, t, *rest))
