from __future__ import annotations

from functools import partial

import pytest
import torch

from emf_lightning.callbacks import DistillationMonitor, WeightEMA
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.self_corrected import SelfCorrectedFlow
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.modules.alternating import Alternation
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.flow_map import VALIDATION_TIMES, FlowMapModule
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.modules.optimization import Optimization
from emf_lightning.modules.scflow import SCFlow
from emf_lightning.networks.discriminator import ConvDiscriminator
from emf_lightning.networks.frozen import FrozenNetwork
from tests.callbacks import tiny

STILL = Optimization(partial(torch.optim.SGD, lr=0.0))
MOVING = Optimization(partial(torch.optim.SGD, lr=0.01))
CRITIC = partial(ConvDiscriminator, channels=4, max_channels=8)
GAPS = {"train/teacher_gap", *(f"train/teacher_gap_at_{time}" for time in VALIDATION_TIMES)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


def fit(shards, run, model, *callbacks, **arguments):
    torch.manual_seed(5)
    tiny.trainer(run, *callbacks, **arguments).fit(model, datamodule=tiny.data(shards))
    return tiny.events(run)


def tags(found) -> set[str]:
    return {tag for tag in found.Tags()["scalars"] if "teacher_gap" in tag or "one_step" in tag}


class Multiple:
    """A teacher whose velocity is ``factor`` times that of a frozen copy of ``net``."""

    def __init__(self, net, factor: float) -> None:
        self.net, self.factor = FrozenNetwork(net), factor

    def __deepcopy__(self, memo):
        return self

    def __call__(self, *inputs):
        return self.factor * self.net(*inputs)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (2.0, 0.5), (0.5, 1.0), (-1.0, 2.0)])
def test_the_gap_is_relative_to_the_teachers_velocity_at_every_time(shards, tmp_path, factor, expected) -> None:
    net = tiny.network()
    objective = MeanFlow(velocity=TeacherVelocity(Multiple(net, factor)))
    model = FlowMapModule(net, objective, optimization=STILL)
    found = fit(shards, tmp_path / "run", model, DistillationMonitor(2, samples=8))
    assert tags(found) == {*GAPS, "train/one_step_variance"}
    for tag in GAPS:
        points = found.Scalars(tag)
        assert [event.step for event in points] == [2, 4]
        assert [event.value for event in points] == pytest.approx([expected] * 2, abs=1e-5), tag


class Keeper(DistillationMonitor):
    """Keeps what the gap was measured from."""

    def _gaps(self, module, x, text, null):
        self.taken = x.clone(), text, null, torch.get_rng_state()
        return super()._gaps(module, x, text, null)


def test_the_teachers_velocity_is_guided_where_the_target_is(shards, tmp_path) -> None:
    net, monitor = tiny.network(), Keeper(4, samples=8)
    guidance = TargetGuidance(scale=3.0, interval=(0.4, 1.0))
    model = FlowMapModule(net, MeanFlow(velocity=TeacherVelocity(), guidance=guidance), optimization=STILL)
    found = fit(shards, tmp_path / "run", model, monitor)
    x, text, null, state = monitor.taken
    torch.set_rng_state(state)
    for time in VALIDATION_TIMES:
        e, t = torch.randn_like(x), torch.full((len(x),), time)
        z = (1 - time) * x + time * e
        with torch.no_grad():
            u = net(z, t, t, *text.conditioning)
            bare = net(z, t, t, *null.expand(len(x)).conditioning)
        v = bare + (3.0 if time >= 0.4 else 1.0) * (u - bare)
        expected = float((u - v).norm() / v.norm())
        assert found.Scalars(f"train/teacher_gap_at_{time}")[0].value == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert (expected > 1e-3) is (time >= 0.4)


class Scaled(FlowMapModule):
    """One-step samples are ``factor`` times the batch's own latents."""

    factor = 1.0

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.latents = batch.latents

    def sample_latents(self, text, null, noise, steps, guidance_scale=None):
        assert steps == 1 and len(text) == len(noise)
        return self.factor * self.latents[: len(noise)] + 7.0


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0, 0.0])
def test_the_variance_is_relative_to_that_of_the_same_captions_latents(shards, tmp_path, factor) -> None:
    model = Scaled(tiny.network(), FlowMatching(), optimization=STILL)
    model.factor = factor
    found = fit(shards, tmp_path / "run", model, DistillationMonitor(4, samples=6))
    assert tags(found) == {"train/one_step_variance"}  # no teacher, no gap
    assert found.Scalars("train/one_step_variance")[0].value == pytest.approx(factor**2, abs=1e-5)


def joint(net):
    return JointDistillation(net, JointObjective(regression=MeanFlow(velocity=TeacherVelocity())), optimization=MOVING)


MODELS = {
    "meanflow": (lambda net: FlowMapModule(net, MeanFlow(velocity=TeacherVelocity()), optimization=MOVING), True),
    "joint": (joint, True),
    "scflow": (
        lambda net: SCFlow(net, CRITIC, SelfCorrectedFlow(teacher_guidance_scale=2.0), optimization=MOVING),
        True,
    ),
    "fgm": (lambda net: FGM(net, optimization=MOVING, alternation=Alternation(micro_batches=2)), False),
    "conditional": (lambda net: FlowMapModule(net, MeanFlow(), optimization=MOVING), False),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_bit_for_bit_and_teachers_alone_have_a_gap(shards, tmp_path, name) -> None:
    build, has_gap = MODELS[name]
    weights = []
    for run, callbacks in (
        ("with", [WeightEMA(decay=0.5), DistillationMonitor(1)]),
        ("without", [WeightEMA(decay=0.5)]),
    ):
        model = build(tiny.network())
        found = fit(shards, tmp_path / run, model, *callbacks, max_steps=3, precision="bf16-mixed")
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        expected = {"train/one_step_variance", *(GAPS if has_gap else ())} if run == "with" else set()
        assert tags(found) == expected
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_it_measures_once_a_step_while_gradients_accumulate(shards, tmp_path) -> None:
    model = FlowMapModule(tiny.network(), MeanFlow(velocity=TeacherVelocity()), optimization=MOVING)
    monitor = DistillationMonitor(2, samples=4)
    found = fit(shards, tmp_path / "run", model, monitor, accumulate_grad_batches=2, max_steps=4)
    assert len(found.Scalars("train/teacher_gap")) == 2


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"samples": 1}])
def test_numbers_that_are_too_small_are_refused(settings) -> None:
    [name] = settings
    with pytest.raises(ValueError, match=f"DistillationMonitor: {name} must be at least"):
        DistillationMonitor(**settings)
