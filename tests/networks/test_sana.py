from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SanaTransformer2DModel

from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.guidance import GuidanceCondition
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.prediction import PredictData, PredictVelocity
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.networks.sana_transformer import IntervalSanaTransformer
from emf_lightning.networks.two_time.rules import DecoupledInterval, SummedInterval

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


def inputs(batch: int = 3):
    torch.manual_seed(1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[:, 3:] = False
    return torch.randn(batch, 3, 12, 12), torch.rand(batch), torch.randn(batch, 5, 16), mask


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


def adapted(tmp_path, name: str = "parent", **kwargs) -> SanaFlowMap:
    return SanaFlowMap(pretrained=str(tmp_path / name), latent_size=12, context_width=16, **kwargs).eval()


def test_adapted_network_equals_its_parent_bit_for_bit_where_r_equals_t(tmp_path):
    parent = stock_parent(tmp_path)
    net = adapted(tmp_path)
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
    net = adapted(tmp_path, interval=SummedInterval())
    z, t, context, mask = inputs()
    with torch.no_grad():
        expected = parent(z, context, t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]
        assert (net(z, t, t, context, mask) - expected).abs().max() > 1e-3
        with net.two_times.at(t * 500.0, t * 1000.0):
            modulation, _ = net.transformer.time_embed(t * 1000.0, hidden_dtype=z.dtype)
        a, b = (parent.time_embed(time * 1000.0, hidden_dtype=z.dtype)[0] for time in (t, t / 2))
        assert torch.allclose(modulation, a + b, atol=1e-5)


NEW = ("time_embed.interval.", "time_embed.conditions.", "proj_out.velocity.")


@pytest.mark.parametrize(
    ("settings", "new"),
    [({}, NEW[:1]), ({"guidance_conditioning": True}, NEW), ({"interval": DecoupledInterval(1)}, ())],
)
def test_parameters_keep_the_published_names(settings, new):
    net = tiny(**settings)
    ours = set(net.transformer.state_dict())
    config = {k: v for k, v in net.transformer.config.items() if not k.startswith("_")}
    published = set(SanaTransformer2DModel(**config).state_dict())
    assert published <= ours
    assert {name for name in ours - published if name.startswith(new)} == ours - published
    assert all(any(name.startswith(prefix) for name in ours) for prefix in new)


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
        ({"prediction": PredictVelocity()}, "with prediction"),
        ({"prediction": PredictData(), "time_scale": 1.0}, "with time_scale"),
        ({"prediction": PredictData(), "context_width": 8}, "text feature width"),
        ({"prediction": PredictData(), "latent_channels": 4}, "latent channels"),
        ({"prediction": PredictData(), "interval": SummedInterval()}, "with interval"),
        ({"prediction": PredictData(), "interval": DecoupledInterval(1)}, "with interval"),
    ],
)
def test_weights_of_another_configuration_are_refused(tmp_path, settings, named):
    tiny(prediction=PredictData()).save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match=named):
        SanaFlowMap(pretrained=str(tmp_path / "net"), **({"latent_size": 12, "context_width": 16} | settings))


def test_missing_weights_are_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="SanaFlowMap: cannot load pretrained="):
        SanaFlowMap(pretrained=str(tmp_path / "nowhere"))


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patches of 4"):
        SanaFlowMap(TINY, latent_size=10)


def test_latents_that_do_not_fit_the_patches_of_pretrained_weights_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match=r"side 10 .* patches of 4; change the data's resolution"):
        SanaFlowMap(pretrained=str(tmp_path / "net"), latent_size=10, context_width=16)


def test_derivative_of_the_network_equals_central_differences():
    net = tiny(prediction=PredictData(), time_scale=10.0).double().eval()
    z, t, context, mask = inputs()
    z, t, context = z.double(), t.double() * 0.8 + 0.1, context.double()
    r, v = t / 2, torch.randn_like(z)

    def u(z, r, t):
        return net(z, r, t, context, mask)

    dudt = ForwardMode().jvp(u, z, r, t, v)
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


@pytest.mark.parametrize("attention_backend", [None, "math"])
def test_gradient_checkpointing_changes_no_gradient(attention_backend):
    stored = tiny(attention_backend=attention_backend)
    checkpointed = tiny(attention_backend=attention_backend, gradient_checkpointing=True)
    assert checkpointed.transformer.is_gradient_checkpointing
    assert torch.equal(gradients(checkpointed), gradients(stored))


@pytest.mark.slow
def test_compiled_blocks_change_no_gradient_and_keep_the_names():
    plain, compiled = tiny(), tiny(compile=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    expected = gradients(plain)
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
    assert net.transformer.config["_flow_interval"] is None, "a network that starts from it may have any rule"


# -- Decoupled MeanFlow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
def test_decoupled_network_equals_its_parent_bit_for_bit_where_r_equals_t(tmp_path, blocks):
    parent = stock_parent(tmp_path)
    net = adapted(tmp_path, interval=DecoupledInterval(blocks))
    z, t, context, mask = inputs()
    with torch.no_grad():
        expected = parent(z, context, t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]
        assert torch.equal(net(z, t, t, context, mask), expected)
        assert not torch.allclose(net(z, t / 2, t, context, mask), expected, atol=1e-3)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in parent.parameters())


def test_decoupled_blocks_see_t_first_and_then_r():
    net = tiny(interval=DecoupledInterval(1)).eval()
    z, t, context, mask = inputs()
    seen = []
    for block in net.transformer.transformer_blocks:  # a hook behind the network's own sees what that one handed over
        block.register_forward_pre_hook(lambda block, arguments: seen.append(arguments[4]))
    norm = net.transformer.norm_out.register_forward_pre_hook(lambda norm, arguments: seen.append(arguments[1]))
    with torch.no_grad():
        net(z, t / 3, t, context, mask)
        start, end = (net.transformer.time_embed(1000.0 * time, hidden_dtype=z.dtype) for time in (t, t / 3))
    norm.remove()
    for got, expected in zip(seen, (start[0], end[0], end[1]), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)
    assert not torch.allclose(start[0], end[0], atol=1e-3)


def test_decoupled_network_has_an_exact_derivative_under_checkpointing_and_copies():
    net = tiny(prediction=PredictData(), time_scale=10.0, interval=DecoupledInterval(1)).double()
    z, t, context, mask = inputs()
    z, t, context = z.double(), t.double() * 0.8 + 0.1, context.double()
    r, v = t / 2, torch.randn_like(z)

    def gradient(net) -> tuple[torch.Tensor, ...]:
        net.zero_grad()
        u, dudt = ForwardMode()(lambda z, r, t: net(z, r, t, context, mask), z, r, t, v, len(z))
        (u + dudt).square().sum().backward()
        return dudt, *(p.grad.clone() for p in net.parameters())

    plain = gradient(net.train())
    h = 1e-3
    with torch.no_grad():
        ends = [net(z + s * h * v, r, t + s * h, context, mask) for s in (1, -1)]
    assert (plain[0] - (ends[0] - ends[1]) / (2 * h)).norm() < 2e-3 * plain[0].norm()
    again = copy.deepcopy(net)
    again.transformer.enable_gradient_checkpointing()
    for a, b in zip(plain, gradient(again), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_decoupled_weights_survive_the_round_trip_and_start_from_any_parent(tmp_path):
    net = tiny(interval=DecoupledInterval(1)).eval()
    net.save_pretrained(tmp_path / "net")
    z, t, context, mask = inputs()
    with torch.no_grad():
        again = adapted(tmp_path, "net", interval=DecoupledInterval(1))
        assert torch.equal(again(z, t / 3, t, context, mask), net(z, t / 3, t, context, mask))
    with pytest.raises(ValueError, match="with interval"):
        adapted(tmp_path, "net", interval=DecoupledInterval(2))
    parent = tiny(time_scale=10.0).eval()
    parent.transformer.register_to_config(_flow_interval=None)  # as `refit_time` leaves one that knows no intervals
    parent.save_pretrained(tmp_path / "parent")
    with torch.no_grad():
        child = adapted(tmp_path, time_scale=10.0, interval=DecoupledInterval(1))
        assert torch.equal(child(z, t, t, context, mask), parent(z, t, t, context, mask))


@pytest.mark.parametrize("blocks", [0, 3])
def test_impossible_numbers_of_decoupled_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="DecoupledInterval: blocks"):
        tiny(interval=DecoupledInterval(blocks))


# -- Improved MeanFlow ------------------------------------------------------------------------------------------------


def some_guidance(t: torch.Tensor) -> torch.Tensor:
    return GuidanceCondition(1 + 3 * t, 0.3 * t, 0.5 + 0.4 * t).conditions


@pytest.mark.parametrize("interval", [None, DecoupledInterval(1)])
@pytest.mark.parametrize("prediction", [PredictVelocity(), PredictData()])
def test_guided_network_starts_as_its_parent_in_both_heads_with_any_conditions(tmp_path, interval, prediction):
    parent = stock_parent(tmp_path)
    net = adapted(tmp_path, guidance_conditioning=True, interval=interval, prediction=prediction)
    z, t, context, mask = inputs()
    with torch.no_grad():
        expected = parent(z, context, t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]
        u, v = net(z, t, t, context, mask, some_guidance(t)).chunk(2, dim=1)
        assert torch.allclose(u, prediction(expected, z, t), atol=1e-5)
        assert torch.allclose(v, prediction(expected, z, t), atol=1e-5)


def test_conditions_and_the_velocity_head_are_learned_and_survive_the_round_trip(tmp_path):
    net = tiny(guidance_conditioning=True).eval()
    transformer = net.transformer
    with torch.no_grad():
        transformer.time_embed.conditions.linear.weight.normal_()
        transformer.proj_out.velocity.weight.normal_()
    net.save_pretrained(tmp_path / "net")
    again = adapted(tmp_path, "net", guidance_conditioning=True)
    z, t, context, mask = inputs()
    with torch.no_grad():
        told = net(z, t / 3, t, context, mask, some_guidance(t))
        assert torch.equal(again(z, t / 3, t, context, mask, some_guidance(t)), told)
        untold = net(z, t / 3, t, context, mask)
        assert torch.equal(
            untold, net(z, t / 3, t, context, mask, GuidanceCondition.everywhere(torch.ones_like(t)).conditions)
        )
        assert not torch.allclose(told, untold, atol=1e-3)
        u, v = told.chunk(2, dim=1)
        assert not torch.allclose(u, v, atol=1e-3)
    with pytest.raises(ValueError, match=r"surplus"):
        adapted(tmp_path, "net")


def test_heads_keep_apart_in_patches():
    """Each head's output is that of a network with that projection alone."""
    net = tiny(guidance_conditioning=True).eval()
    head = net.transformer.proj_out
    torch.nn.init.normal_(head.velocity.weight)
    z, t, context, mask = inputs()
    with torch.no_grad():
        v = net(z, t, t, context, mask)[:, 3:]
        head.weight.copy_(head.velocity.weight)
        head.bias.copy_(head.velocity.bias)
        assert torch.allclose(net(z, t, t, context, mask)[:, :3], v, atol=1e-6)


# -- settings of a start from published weights -----------------------------------------------------------------------


def test_refit_reads_the_new_scale_as_the_parent_read_its_own(tmp_path):
    parent = stock_parent(tmp_path)
    with torch.no_grad():  # as smooth in t as a trained embedding: of the waves only those slower than 1 in 60
        waves = parent.time_embed.emb.timestep_embedder.linear_1.weight
        waves[:, :60] = waves[:, 128:188] = 0
    parent.save_pretrained(str(tmp_path / "parent"))
    raw, net = adapted(tmp_path, time_scale=1.0), adapted(tmp_path, time_scale=1.0, finetuning=Finetuning(refit=True))
    z, t, context, mask = inputs(16)
    with torch.no_grad():
        expected = parent(z, context, t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]
        unfitted, fitted = ((each(z, t, t, context, mask) - expected).norm() for each in (raw, net))
    assert fitted < 0.1 * unfitted
    embedding = net.transformer.time_embed
    assert torch.equal(embedding.linear.weight, embedding.interval.linear.weight)


def test_refit_at_the_pretrained_scale_changes_nothing(tmp_path):
    parent = stock_parent(tmp_path)
    net = adapted(tmp_path, finetuning=Finetuning(refit=True))
    assert torch.equal(net.transformer.time_embed.linear.weight, parent.time_embed.linear.weight)


def test_only_what_is_named_trains():
    net = tiny(finetuning=Finetuning(trainable=["transformer_blocks.1", "time_embed", "scale_shift_table"]))
    trained = {name for name, p in net.transformer.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"transformer_blocks", "time_embed", "scale_shift_table"}
    assert all(name.startswith("transformer_blocks.1.") for name in trained if name.startswith("transformer_blocks"))
    assert any(name.startswith("time_embed.interval.") for name in trained)


def test_a_name_of_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"trainable='time_embed_t' is the beginning of no .* there are .*time_embed"):
        tiny(finetuning=Finetuning(trainable=["time_embed_t"]))


def test_a_fresh_text_projection_leaves_the_rest_of_the_weights(tmp_path):
    parent = stock_parent(tmp_path)
    settings = {"pretrained": str(tmp_path / "parent"), "latent_size": 12, "context_width": 24}
    with pytest.raises(ValueError, match="text feature width 16, this experiment has 24"):
        SanaFlowMap(**settings)
    net = SanaFlowMap(finetuning=Finetuning(reset_text_projection=True), **settings)
    assert net.transformer.config.caption_channels == 24
    for name, weight in parent.state_dict().items():
        if not name.startswith("caption_projection.linear_1."):
            assert torch.equal(net.transformer.state_dict()[name], weight)
    assert net.transformer.caption_projection.linear_1.weight.shape == (16, 24)
    assert 0.05 < net.transformer.caption_projection.linear_1.weight.std() < 0.5


@pytest.mark.parametrize("prediction", [PredictVelocity(), PredictData()], ids=["velocity", "data"])
def test_second_flow_at_negative_times_starts_as_the_first_and_learns_apart(tmp_path, prediction):
    stock_parent(tmp_path)
    net = adapted(tmp_path, prediction=prediction, negative_times=True)
    z, t, context, mask = inputs()
    with torch.no_grad():
        first = adapted(tmp_path, prediction=prediction)(z, t, t, context, mask)
        assert torch.equal(net(z, t, t, context, mask), first)
        assert torch.equal(net(z, -t, -t, context, mask), first)
        time_embed = net.transformer.time_embed
        time_embed.negative.linear.bias.add_(torch.randn_like(time_embed.negative.linear.bias))
        assert torch.equal(net(z, t, t, context, mask), first)
        second = net(z, -t, -t, context, mask)
        assert not torch.allclose(second, first, atol=1e-3)
        sign = torch.tensor([1.0, -1.0, 1.0])
        mixed = net(z, sign * t, sign * t, context, mask)
        assert torch.allclose(mixed, torch.where((sign > 0).view(-1, 1, 1, 1), first, second), atol=1e-5)


def test_second_flow_is_saved_and_loaded(tmp_path):
    net = tiny(negative_times=True, prediction=PredictData()).eval()
    torch.nn.init.normal_(net.transformer.time_embed.negative.linear.weight)
    net.save_pretrained(tmp_path / "net")
    z, t, context, mask = inputs()
    again = adapted(tmp_path, "net", negative_times=True, prediction=PredictData())
    assert torch.equal(again(z, -t, -t, context, mask), net(z, -t, -t, context, mask))
    with pytest.raises(ValueError, match=r"surplus .*negative"):
        adapted(tmp_path, "net", prediction=PredictData())


def test_refit_of_the_time_embedding_takes_the_second_flow_along(tmp_path):
    stock_parent(tmp_path)
    net = adapted(tmp_path, negative_times=True, finetuning=Finetuning(refit=True), time_scale=5.0)
    z, t, context, mask = inputs()
    assert torch.equal(net(z, -t, -t, context, mask), net(z, t, t, context, mask))


def test_negative_times_and_guidance_conditions_exclude_each_other():
    with pytest.raises(ValueError, match="guidance_conditioning or negative_times"):
        tiny(negative_times=True, guidance_conditioning=True)


def test_both_time_embeddings_can_start_from_normal_weights_as_emfs_code_does(tmp_path):
    parent = stock_parent(tmp_path)
    torch.manual_seed(0)
    net = adapted(tmp_path, interval=SummedInterval(), time_scale=1.0, finetuning=Finetuning(reset_time=0.02))
    embedding, published = net.transformer.time_embed, parent.state_dict()
    layers = [layer for layer in embedding.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 6, "three in each embedding"
    assert abs(torch.cat([layer.weight.flatten() for layer in layers]).std() - 0.02) < 1e-3
    assert all(not layer.bias.any() for layer in layers)
    assert not torch.equal(embedding.linear.weight, embedding.interval.linear.weight)
    for name, weight in net.transformer.state_dict().items():
        if not name.startswith("time_embed."):
            assert torch.equal(weight, published[name]), name
    net.save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match="knows intervals, which reset_time would make it forget"):
        adapted(tmp_path, "net", interval=SummedInterval(), time_scale=1.0, finetuning=Finetuning(reset_time=0.02))
    with pytest.raises(ValueError, match="set one of them"):
        Finetuning(refit=True, reset_time=0.02)


def test_times_drawn_anew_leave_guidance_conditions_at_zero_and_copy_negative_times(tmp_path):
    stock_parent(tmp_path)
    twin = adapted(tmp_path, negative_times=True, finetuning=Finetuning(reset_time=0.02))
    z, t, context, mask = inputs()
    assert torch.equal(twin(z, -t, -t, context, mask), twin(z, t, t, context, mask))
    guided = adapted(tmp_path, guidance_conditioning=True, finetuning=Finetuning(reset_time=0.02))
    assert not guided.transformer.time_embed.conditions.linear.weight.any()
