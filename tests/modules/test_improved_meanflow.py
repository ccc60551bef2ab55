from __future__ import annotations

import copy

import pytest
import torch

from emf_lightning.flow.guidance import GuidanceCondition, GuidanceSampler
from emf_lightning.flow.objectives.improved_meanflow import ImprovedMeanFlow, _Heads
from emf_lightning.flow.target_velocity import ConditionalVelocity, SelfVelocity, TeacherVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.optimization import Optimization
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import DecoupledInterval
from emf_lightning.text.words import WordEncoder
from tests.modules.conftest import TINY
from tests.modules.test_objectives import fit, moved, optimizer


def improved(**settings) -> SanaFlowMap:
    torch.manual_seed(0)
    return SanaFlowMap(
        TINY,
        prediction=PredictData(),
        time_scale=10.0,
        latent_size=8,
        context_width=16,
        guidance_conditioning=True,
        **settings,
    )


@pytest.fixture
def heads() -> SanaFlowMap:
    """A network whose conditions and velocity head have learned something."""
    net = improved()
    torch.nn.init.normal_(net.transformer.time_embed.conditions.linear.weight)
    torch.nn.init.normal_(net.transformer.proj_out.velocity.weight, std=0.1)
    return net


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("velocity", "interval"), [(ConditionalVelocity, None), (TeacherVelocity, DecoupledInterval(1))]
)
def test_training_moves_every_weight(tmp_path, loader, velocity, interval, precision):
    net = improved(interval=interval)
    before = copy.deepcopy(net.state_dict())
    model = FlowMapModule(net, ImprovedMeanFlow(velocity=velocity()), optimization=Optimization(optimizer))
    logged = fit(model, loader, tmp_path, precision=precision).callback_metrics
    assert moved(before, net) == set(before)
    assert logged["train/nan_rows"] == 0
    assert logged["train/derivative_norm"] > 0


class Spy(ImprovedMeanFlow):
    """Keeps the inputs of the two regressions."""

    def head_terms(self, heads, z, v_g, v_c, times, weighting):
        self.seen = {"heads": heads, "z": z, "v_g": v_g, "v_c": v_c, "t": times.t, "n": times.n_interval}
        return super().head_terms(heads, z, v_g, v_c, times, weighting)


class Watched(FlowMapModule):
    progress = 0.0

    def log(self, *args, **kwargs) -> None:
        pass


def watched(net, batch, velocity=None, **settings) -> dict:
    objective = Spy(times=LogitNormalTimes(flow_matching_ratio=Schedule(0.5)), velocity=velocity)
    model = Watched(net, objective, **settings)
    torch.manual_seed(3)
    model.compute_loss(batch)
    return objective.seen


def test_tangent_is_the_networks_own_guided_velocity_and_the_target_mixes_it_in(heads, loader):
    batch = next(iter(loader))
    seen = watched(heads, batch, caption_dropout=0.0)
    z, t, conditions = seen["z"], seen["t"], seen["heads"].conditions["conditions"]
    w = torch.where((conditions[:, 1] <= t) & (t <= conditions[:, 2]), 1 / (1 - conditions[:, 0]), 1.0)
    with torch.no_grad():
        told = GuidanceCondition.everywhere(w).conditions
        v_c = heads(z, t, t, batch.text.context, batch.text.mask, told)[:, 3:]
        null = batch.null.expand(len(t))
        v_u = heads(z, t, t, null.context, null.mask)[:, 3:]
    assert not seen["v_g"].requires_grad and not seen["v_c"].requires_grad
    assert torch.allclose(seen["v_c"], v_c, atol=1e-5)
    v = seen["v_g"] - (1 - 1 / w).view(-1, 1, 1, 1) * (v_c - v_u)
    assert torch.allclose(z - t.view(-1, 1, 1, 1) * v, batch.latents, atol=1e-4), "what is left is e - x"
    assert (w > 1).any()


def test_rows_without_a_caption_are_not_guided(heads, loader):
    batch = next(iter(loader))
    seen = watched(heads, batch, caption_dropout=0.6)
    z, t = seen["z"], seen["t"].view(-1, 1, 1, 1)
    plain = (z - t * seen["v_g"] - batch.latents).flatten(1).abs().amax(1) < 1e-4
    dropped = torch.tensor([torch.equal(c, batch.null.context[0]) for c in seen["heads"].context[0]])
    assert dropped.any() and not dropped.all()
    assert plain[dropped].all()


def test_teachers_velocity_is_guided_by_the_sampled_scale(heads, loader):
    batch = next(iter(loader))
    seen = watched(heads, batch, velocity=TeacherVelocity(), caption_dropout=0.0)
    z, t, conditions = seen["z"], seen["t"], seen["heads"].conditions["conditions"]
    w = GuidanceCondition(1 / (1 - conditions[:, 0]), conditions[:, 1], conditions[:, 2]).at(t).view(-1, 1, 1, 1)
    null = batch.null.expand(len(t))
    with torch.no_grad():
        text = heads(z, t, t, batch.text.context, batch.text.mask)[:, :3]
        plain = heads(z, t, t, null.context, null.mask)[:, :3]
    assert torch.allclose(seen["v_g"], plain + w * (text - plain), atol=1e-4)
    assert torch.equal(seen["v_g"], seen["v_c"])


def test_rows_of_heads_carry_their_conditions(heads):
    text = WordEncoder(width=16, length=4)(["a red circle", "a blue square", "a green cross"])
    t, z = torch.tensor([0.2, 0.5, 0.8]), torch.randn(3, 3, 8, 8)
    conditions = {"conditions": GuidanceCondition(1 + t, 0 * t, 1 + 0 * t).conditions}
    u = _Heads(heads.eval(), (text.context, text.mask), conditions)
    with torch.no_grad():
        part, whole = u.slice(slice(1, 3))(z[1:], t[1:], t[1:]), u(z, t, t)
    assert part.shape == (2, 6, 8, 8)
    assert torch.allclose(part, whole[1:], atol=1e-5)


def test_guidance_at_sampling_is_a_condition_and_costs_nothing(heads):
    model = FlowMapModule(heads, ImprovedMeanFlow(sampling_interval=(0.1, 0.7)), guidance_scale=3.0)
    encoder, noise = WordEncoder(width=16, length=4), torch.randn(1, 3, 8, 8)
    text, null = encoder(["a red circle"]), encoder([""])
    seen = []
    heads.register_forward_pre_hook(lambda net, arguments, given: seen.append(given["conditions"]), with_kwargs=True)
    own = model.sample_latents(text, null, noise, steps=2)
    assert len(seen) == model.nfe(2) == 2
    assert seen[0].tolist() == [pytest.approx([2 / 3, 0.1, 0.7])]
    assert not torch.equal(model.sample_latents(text, null, noise, steps=2, guidance_scale=1.0), own)
    assert torch.equal(model.sample_latents(text, null, noise, steps=2, guidance_scale=3.0), own)
    assert own.shape == noise.shape
    with pytest.raises(ValueError, match="at least 1"):
        model.sample_latents(text, null, noise, steps=1, guidance_scale=0.5)


def test_impossible_settings_are_refused(net):
    with pytest.raises(ValueError, match=r"net\.guidance_conditioning"):
        FlowMapModule(net, ImprovedMeanFlow())
    with pytest.raises(ValueError, match="ConditionalVelocity or TeacherVelocity"):
        ImprovedMeanFlow(velocity=SelfVelocity())


def test_validation_sees_the_velocity_alone(tmp_path, heads, loader):
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (result,) = trainer.validate(
        FlowMapModule(heads, ImprovedMeanFlow(guidance_sampler=GuidanceSampler(4.0))), loader, verbose=False
    )
    assert all(value > 0 for value in result.values())
    assert len(result) == 5
