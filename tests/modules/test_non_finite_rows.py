"""A sample whose latents or features are not finite is left out, and leaves no trace in any network."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from emf_lightning.flow.objectives.base import LossTerm, scaled_to
from emf_lightning.flow.objectives.distribution_matching import DMD, AlphaMatching, DistributionMatching, ExactMatching
from emf_lightning.flow.objectives.flow_generator_matching import FlowGeneratorMatching
from emf_lightning.flow.objectives.improved_meanflow import ImprovedMeanFlow
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.self_corrected import SelfCorrectedFlow, VelocityConsistency
from emf_lightning.flow.objectives.twin_flow import TwinFlow
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.weighting import UniformWeighting
from emf_lightning.modules.alternating import Alternation
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.modules.optimization import Optimization
from emf_lightning.modules.scflow import SCFlow
from emf_lightning.networks.discriminator import ConvDiscriminator
from emf_lightning.networks.feature_discriminator import FeatureDiscriminator
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaFlowMap
from tests.modules.conftest import TINY, Batches
from tests.modules.test_objectives import HALF, OBJECTIVES, fit, optimizer

NAN = float("nan")
CONVOLUTIONS = partial(ConvDiscriminator, channels=4, max_channels=8)


class Damaged(Dataset):
    """Batches of eight of which the latents of one sample and the features of another are not finite."""

    def __init__(self, latents: float = NAN, features: float = float("inf"), rows: int = 1) -> None:
        self.whole, self.latents, self.features, self.rows = Batches(6), latents, features, rows

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int):
        batch = self.whole[index]
        batch.latents[: self.rows, 0, 0, 0] = self.latents
        context = batch.text.context.clone()
        context[-self.rows :, 0, 0] = self.features
        return replace(batch, text=replace(batch.text, context=context))


def modules(net: SanaFlowMap):
    settings = {"optimization": Optimization(optimizer)}
    for name, (kind, options) in OBJECTIVES.items():
        yield name, partial(FlowMapModule, net, kind(times=HALF, velocity=TeacherVelocity(), **options), **settings)
        if name not in ("cmt", "refined"):
            yield f"{name} from data", partial(FlowMapModule, net, kind(times=HALF, **options), **settings)
    two = Alternation(micro_batches=2)
    joint = JointObjective(matching_weight=LossTerm(2.0), adversarial_weight=LossTerm(0.5), r1=0.1)
    heads = partial(FeatureDiscriminator, blocks=[0], width=8)
    yield "joint", partial(JointDistillation, net, joint, heads, **settings)
    yield "joint in parts", partial(JointDistillation, net, joint, CONVOLUTIONS, **settings, alternation=two)
    yield "fgm", partial(FGM, net, FlowGeneratorMatching(steps=2), **settings)
    yield "scflow", partial(SCFlow, net, CONVOLUTIONS, SelfCorrectedFlow(r1=0.1), **settings)


NAMES = [
    *OBJECTIVES,
    *(f"{name} from data" for name in OBJECTIVES if name not in ("cmt", "refined")),
    *("joint", "joint in parts", "fgm", "scflow"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_stays_finite_and_moves(tmp_path, net, name):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = dict(modules(net))[name]()
    logged = fit(model, DataLoader(Damaged(), batch_size=None), tmp_path).callback_metrics
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items())
    if name not in ("cmt", "fgm"):  # both read captions alone, and the bad one is the null caption for them
        assert logged["train/nan_rows"] == 2


def test_improved_meanflow_and_twin_flow_leave_it_out_as_well(tmp_path):
    for objective, takes in (
        (ImprovedMeanFlow(times=HALF), {"guidance_conditioning": True}),
        (TwinFlow(), {"negative_times": True}),
    ):
        torch.manual_seed(0)
        net = SanaFlowMap(TINY, prediction=PredictData(), time_scale=10.0, latent_size=8, context_width=16, **takes)
        model = FlowMapModule(net, objective, optimization=Optimization(optimizer))
        logged = fit(model, DataLoader(Damaged(), batch_size=None), tmp_path).callback_metrics
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert logged["train/nan_rows"] >= 1


def test_the_others_train_as_if_it_were_not_there(net):
    """The gradient is that of the batch without the sample, whatever its latents are."""
    x = torch.randn(4, 3, 8, 8)
    text = Batches(1)[0].text[:4]

    def gradient(value: float) -> list[torch.Tensor]:
        torch.manual_seed(1)
        damaged = x.clone()
        damaged[1, 2, 3, 4] = value
        terms = MeanFlow(times=HALF)(net, damaged, text.conditioning)
        assert terms.finite.tolist() == [True, value == 0, True, True]
        return list(torch.autograd.grad(terms.loss, list(net.parameters()), allow_unused=True))

    of_nan, of_inf, whole = gradient(NAN), gradient(float("inf")), gradient(0.0)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(of_nan, of_inf, strict=True))
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(of_nan, whole, strict=True))


def test_a_run_of_bad_data_stops(tmp_path, net):
    model = FlowMapModule(net, optimization=Optimization(optimizer), nan_patience=2)
    with pytest.raises(ValueError, match="not finite, 2 batches in a row"):
        fit(model, DataLoader(Damaged(rows=4), batch_size=None), tmp_path)
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_padding_may_hold_anything(net):
    batch = Batches(1)[0]
    context = torch.where(batch.text.mask[..., None], batch.text.context, torch.nan)
    kept = replace(batch, text=replace(batch.text, context=context)).without_bad_features()
    assert kept.latents.isfinite().all()


def test_samples_of_the_network_that_are_not_finite_leave_the_other_networks_alone(tmp_path, net):
    """The network's own samples overflow where a caption says so; online flow and discriminator go on without them."""

    class Overflow(SanaFlowMap):
        def forward(self, z, r, t, context, mask):
            u = super().forward(z, r, t, context, mask)
            if (r == 0).all() and not torch.is_grad_enabled():
                u = torch.cat([u[:1] * float("inf"), u[1:]])
            return u

    net.__class__ = Overflow
    joint = JointObjective(adversarial_weight=LossTerm(0.5))
    model = JointDistillation(net, joint, CONVOLUTIONS, optimization=Optimization(optimizer))
    model.auxiliaries["online_flow"].__class__ = model.teacher.net.__class__ = SanaFlowMap
    before = {key: value.clone() for key, value in model.auxiliaries.state_dict().items()}
    fit(model, DataLoader(Batches(6), batch_size=None), tmp_path)
    after = model.auxiliaries.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in after if key.startswith("online_flow"))
    assert any(not torch.equal(after[key], before[key]) for key in after if key.startswith("discriminator"))


# -- a gradient that is exactly 0 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.0, 1e-30, 3.0, 1e30])
def test_a_gradient_of_zero_stays_zero_at_any_norm(norm):
    assert not scaled_to(torch.zeros(3), torch.tensor(norm)).any()
    assert torch.equal(scaled_to(torch.tensor([0.0, -2.0]), torch.tensor(norm)), torch.tensor([0.0, -norm]))


def test_joint_training_starts_where_both_flows_agree(tmp_path, net, loader):
    """Teacher and online flow are the same network at first, and a warm-up from 0 keeps them so for a step."""
    objective = JointObjective(
        regression=MeanFlow(weighting=UniformWeighting()),
        matching=DistributionMatching(),
        matching_weight=LossTerm(2.0),
    )

    def still(params):
        return torch.optim.SGD(params, lr=0.0)

    model = JointDistillation(net, objective, optimization=Optimization(still))
    fit(model, loader, tmp_path)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("loss", [AlphaMatching(), ExactMatching(), DMD()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("broken", ["teacher", "online_flow"])
def test_a_generator_learns_from_the_samples_whose_other_velocities_are_finite(loss, broken):
    flows = {name: overflowing(name == broken, k) for name, k in {"teacher": 0.5, "online_flow": 0.3}.items()}
    terms, gradient = student(lambda net: FlowGeneratorMatching(loss=loss)(net, torch.zeros(4, 3), **flows))
    assert terms.finite.tolist() == [False, True, True, True]
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("broken", ["teacher", "target", "discriminator"])
def test_a_student_learns_from_the_samples_whose_targets_and_logits_are_finite(broken):
    objective = SelfCorrectedFlow(consistency=VelocityConsistency(truncation=0.0), adversarial=LossTerm(1.0))
    flows = {name: overflowing(name == broken) for name in ("teacher", "target")}
    logits = overflowing(broken == "discriminator")
    terms, gradient = student(
        lambda net: objective(net, torch.randn(4, 3), **flows, discriminator=lambda z, t: logits(z, t, t).sum(1))
    )
    assert terms.finite.tolist() == [False, True, True, True]
    assert gradient.isfinite().all() and gradient.any()


def student(loss_of):
    """The terms of a linear student, and its gradient."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3)
    terms = loss_of(lambda z, r, t: layer(z))
    terms.loss.backward()
    return terms, layer.weight.grad


def overflowing(broken: bool, scale: float = 0.5):
    """A velocity of ``scale`` times z, infinite for the first sample if ``broken``."""

    def velocity(z, r, t):
        factor = torch.full((len(z), 1), scale)
        factor[0] = float("inf") if broken else scale
        return z * factor

    return velocity
