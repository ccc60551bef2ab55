from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel

from emf_lightning.flow.derivative import ForwardMode
from emf_lightning.networks.prediction import PredictData, PredictVelocity
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.networks.sana_transformer import IntervalSanaTransformer

TINY = SanaArchitecture(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    patch_size=4,
)


def tiny(**kwargs) -> SanaFlowMap:
    torch.manual_seed(0)
    return SanaFlowMap(TINY, latent_size=12, context_width=16, **kwargs)


def inputs(rows: int = 3):
    torch.manual_seed(1)
    mask = torch.ones(rows, 5, dtype=torch.bool)
    mask[:, 3:] = False
    return torch.randn(rows, 3, 12, 12), torch.rand(rows), torch.randn(rows, 5, 16), mask


def stock_parent(tmp_path) -> SanaTransformer2DModel:
    """A plain diffusers SANA, saved as its users save it."""
    torch.manual_seed(2)
    parent = SanaTransformer2DModel(
        in_channels=3,
        out_channels=3,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=12,
        patch_size=4,
    ).eval()
    parent.save_pretrained(str(tmp_path / "parent"))
    return parent


def test_adapted_network_equals_its_parent_bit_for_bit_where_r_equals_t(tmp_path):
    parent = stock_parent(tmp_path)
    net = SanaFlowMap(pretrained=str(tmp_path / "parent"), latent_size=12, context_width=16).eval()
    z, t, context, mask = inputs()
    with torch.no_grad():
        expected = parent(z, context, t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]
        assert torch.equal(net(z, t, t, context, mask), expected)
        assert not torch.allclose(net(z, t / 2, t, context, mask), expected, atol=1e-3)
        net.transformer.time_embed.interval.linear.bias.add_(
            torch.randn_like(net.transformer.time_embed.interval.linear.bias)
        )
        assert torch.allclose(net(z, t, t, context, mask), expected, atol=1e-6), "training must not undo the anchor"


def test_plain_sum_is_the_sum_of_both_embeddings_and_not_the_parent(tmp_path):
    parent = stock_parent(tmp_path)
    net = SanaFlowMap(pretrained=str(tmp_path / "parent"), plain_sum=True, latent_size=12, context_width=16).eval()
    z, t, context, mask = inputs()
    with torch.no_grad():
        expected = parent(z, context, t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]
        assert (net(z, t, t, context, mask) - expected).abs().max() > 1e-3
        modulation, _ = net.transformer.time_embed(t * 1000.0, guidance=t * 500.0, hidden_dtype=z.dtype)
        a, b = (parent.time_embed(time * 1000.0, hidden_dtype=z.dtype)[0] for time in (t, t / 2))
        assert torch.allclose(modulation, a + b, atol=1e-5)


def test_parameters_keep_the_published_names():
    ours = set(tiny().transformer.state_dict())
    published = set(
        SanaTransformer2DModel(
            **{k: v for k, v in tiny().transformer.config.items() if not k.startswith("_")}
        ).state_dict()
    )
    assert published <= ours
    assert all(name.startswith("time_embed.interval.") for name in ours - published)


def test_weights_survive_the_round_trip(tmp_path):
    net = tiny(prediction=PredictData()).eval()
    with torch.no_grad():
        net.transformer.time_embed.interval.linear.weight.normal_()
    net.save_pretrained(tmp_path / "net")
    again = SanaFlowMap(
        pretrained=str(tmp_path / "net"), prediction=PredictData(), latent_size=12, context_width=16
    ).eval()
    z, t, context, mask = inputs()
    with torch.no_grad():
        assert torch.equal(again(z, t / 3, t, context, mask), net(z, t / 3, t, context, mask))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prediction": PredictVelocity()}, "flow_prediction"),
        ({"prediction": PredictData(), "time_scale": 1.0}, "flow_time_scale"),
        ({"prediction": PredictData(), "context_width": 8}, "text feature width"),
        ({"prediction": PredictData(), "latent_channels": 4}, "latent channels"),
    ],
)
def test_weights_of_another_configuration_are_refused(tmp_path, settings, named):
    tiny(prediction=PredictData()).save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match=named):
        SanaFlowMap(pretrained=str(tmp_path / "net"), **({"latent_size": 12, "context_width": 16} | settings))


def test_missing_weights_are_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no weights at pretrained"):
        SanaFlowMap(pretrained=str(tmp_path / "nowhere"))


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patches of 4"):
        SanaFlowMap(TINY, latent_size=10)


def test_derivative_of_the_network_equals_central_differences():
    net = tiny(prediction=PredictData(), time_scale=10.0).double().eval()
    z, t, context, mask = inputs()
    z, t, context = z.double(), t.double() * 0.8 + 0.1, context.double()
    r, v = t / 2, torch.randn_like(z)

    def u(z, r, t):
        return net(z, r, t, context, mask)

    dudt = ForwardMode().along(u, z, r, t, v)
    h = 1e-3  # SANA's linear attention and time embedding compute in fp32, which bounds the difference's accuracy
    with torch.no_grad():
        expected = (u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h)
    assert (dudt - expected).norm() < 2e-3 * expected.norm()


def test_masked_tokens_are_not_read():
    net = tiny().eval()
    z, t, context, mask = inputs()
    other = context.clone()
    other[:, 3:] = 100.0
    with torch.no_grad():
        assert torch.allclose(net(z, t, t, context, mask), net(z, t, t, other, mask), atol=1e-5)


def test_data_prediction_is_the_velocity_towards_the_output():
    z, x = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.5, 0.01])
    u = PredictData(min_time=0.05)(x, z, t)
    assert torch.allclose(u[0], (z[0] - x[0]) / 0.5)
    assert torch.allclose(u[1], (z[1] - x[1]) / 0.05)


def test_published_sizes_build_on_the_meta_device():
    """SANA-1.5 1.6 B (its published config.json): 20 blocks of width 2240."""
    with torch.device("meta"):
        model = IntervalSanaTransformer(qk_norm="rms_norm_across_heads")
    stock = sum(p.numel() for name, p in model.named_parameters() if ".interval." not in name)
    assert 1.59e9 < stock < 1.62e9


def gradients(net: SanaFlowMap) -> torch.Tensor:
    """Of one MeanFlow-like loss."""
    z, t, context, mask = inputs()

    def u(z, r, t):
        return net(z, r, t, context, mask)

    value, dudt = ForwardMode()(u, z, t / 3, t, z.flip(0), len(z))
    (value + dudt).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def test_gradient_checkpointing_changes_no_gradient():
    stored, recomputed = tiny(), tiny(gradient_checkpointing=True)
    assert recomputed.transformer.is_gradient_checkpointing
    assert torch.equal(gradients(recomputed), gradients(stored))


@pytest.mark.slow
def test_compiled_blocks_change_no_gradient_and_keep_the_names():
    written, compiled = tiny(), tiny(compile=True)
    assert compiled.state_dict().keys() == written.state_dict().keys()
    expected = gradients(written)
    assert (gradients(compiled) - expected).norm() < 1e-5 * expected.norm()
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)


def test_refitting_time_keeps_what_the_embedding_says_at_every_time():
    torch.manual_seed(0)
    net = SanaFlowMap(TINY, time_scale=10.0, latent_size=12, context_width=16).eval()
    embedding, t = net.transformer.time_embed, torch.linspace(0, 1, 50)
    with torch.no_grad():
        before = embedding(t * 10.0, hidden_dtype=t.dtype)[0]
        misread = embedding(t * 2.0, hidden_dtype=t.dtype)[0]
    assert net.refit_time(2.0) < 0.3
    assert net.time_scale == net.transformer.config["_flow_time_scale"] == 2.0
    with torch.no_grad():
        after = embedding(t * 2.0, hidden_dtype=t.dtype)[0]
        interval = embedding.interval(t * 2.0, hidden_dtype=t.dtype)[0]
    assert (after - before).square().mean() < 0.1 * (misread - before).square().mean()
    assert torch.equal(interval, after)
