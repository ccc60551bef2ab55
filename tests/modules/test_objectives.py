"""Every objective trains a tiny network."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.flow.derivative.finite_difference import FiniteDifference
from emf_lightning.flow.guidance import ConditionedGuidance, TargetGuidance
from emf_lightning.flow.objectives.alpha_flow import AlphaFlow, AlphaSchedule
from emf_lightning.flow.objectives.base import LossTerm
from emf_lightning.flow.objectives.cmt import CMT
from emf_lightning.flow.objectives.distribution_matching import DistributionMatching
from emf_lightning.flow.objectives.flow_generator_matching import FlowGeneratorMatching
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.improved_meanflow import ImprovedMeanFlow
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.rcgm import RCGM
from emf_lightning.flow.objectives.refined_meanflow import RefinedMeanFlow, Refinement
from emf_lightning.flow.objectives.split_meanflow import SplitMeanFlow
from emf_lightning.flow.objectives.twin_flow import TwinFlow
from emf_lightning.flow.target_velocity import SelfVelocity, TeacherVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule
from emf_lightning.flow.weighting import TransitionWeighting
from emf_lightning.latents.pixels import Pixels
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.modules.optimization import Optimization
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import DecoupledInterval, SummedInterval
from emf_lightning.text.words import WordEncoder
from tests.data.tars import write_numbered
from tests.modules.conftest import TINY

HALF = LogitNormalTimes(flow_matching_ratio=Schedule(0.5), consistency_ratio=0.25)
OBJECTIVES = {
    "meanflow": (MeanFlow, {}),
    "alpha_flow": (AlphaFlow, {"alpha": AlphaSchedule(0.0, 0.9, gamma=4.0)}),
    "split_meanflow": (SplitMeanFlow, {}),
    "transition": (MeanFlow, {"derivative": FiniteDifference(0.005), "weighting": TransitionWeighting()}),
    "rcgm": (RCGM, {}),
    "refined": (RefinedMeanFlow, {"refinement": Refinement(start=0.0)}),
    "cmt": (CMT, {"share": 1.0, "solver_steps": 4, "samples_per_path": 3}),
}


def optimizer(params):
    return torch.optim.AdamW(params, lr=1e-3)


def fit(model, loader, folder, datamodule=None, **settings) -> Trainer:
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(model, loader, datamodule=datamodule)
    return trainer


def moved(before: dict[str, torch.Tensor], net: SanaFlowMap) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_trains_every_weight(tmp_path, net, loader, objective, precision):
    before = copy.deepcopy(net.state_dict())
    kind, settings = OBJECTIVES[objective]
    trained = kind(times=HALF, velocity=TeacherVelocity(), **settings)
    model = FlowMapModule(net, trained, optimization=Optimization(optimizer))
    logged = fit(model, loader, tmp_path, precision=precision).callback_metrics
    assert moved(before, net) == set(before)
    assert logged["train/nan_rows"] == 0
    assert logged["train/mse_r_below_t"] > 0
    assert logged["train/mse_r_equals_t"] > 0


def twin_network() -> SanaFlowMap:
    torch.manual_seed(0)
    return SanaFlowMap(
        TINY, prediction=PredictData(), time_scale=10.0, latent_size=8, context_width=16, negative_times=True
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_twin_flow_trains_every_weight_of_both_flows_and_logs_them(tmp_path, loader, precision):
    net = twin_network()
    before = copy.deepcopy(net.state_dict())
    model = FlowMapModule(net, TwinFlow(), optimization=Optimization(optimizer))
    logged = fit(model, loader, tmp_path, precision=precision).callback_metrics
    assert moved(before, net) == set(before)
    assert logged["train/nan_rows"] == 0
    assert logged["train/velocity_gap"] > 0, "the two flows have parted"
    assert logged["train/fake_flow_mse"] > 0


def test_twin_flow_refuses_a_network_without_negative_times(net):
    with pytest.raises(ValueError, match=r"TwinFlow trains a second flow .* net.negative_times"):
        FlowMapModule(net, TwinFlow(), optimization=Optimization(optimizer))
    with pytest.raises(ValueError, match=r"net.negative_times"):
        JointDistillation(net, JointObjective(regression=TwinFlow()), optimization=Optimization(optimizer))


def test_joint_training_takes_every_regression(tmp_path, loader):
    for regression, takes in (
        (TwinFlow(), {"negative_times": True}),
        (ImprovedMeanFlow(times=HALF), {"guidance_conditioning": True}),
    ):
        net = SanaFlowMap(TINY, prediction=PredictData(), time_scale=10.0, latent_size=8, context_width=16, **takes)
        before = copy.deepcopy(net.state_dict())
        joint = JointObjective(regression=regression)
        logged = fit(JointDistillation(net, joint, optimization=Optimization(optimizer)), loader, tmp_path)
        assert moved(before, net) == set(before)
        assert logged.callback_metrics["train/matching_gradient"] > 0


def test_joint_training_refuses_a_regression_whose_samples_are_no_jumps():
    with pytest.raises(ValueError, match="which FlowMatching does not learn"):
        JointObjective(regression=FlowMatching())


def test_matched_samples_have_the_teachers_guidance_as_their_condition():
    asked = []

    def net(z, r, t, conditions=None):
        asked.append(None if conditions is None else conditions.clone())
        return torch.zeros(len(z), 2 * z.shape[1], *z.shape[2:], requires_grad=True) + z.repeat(1, 2, 1, 1)

    matching = DistributionMatching(teacher_guidance_scale=3.0)
    joint = JointObjective(regression=ImprovedMeanFlow(sampling_interval=(0.1, 0.9)), matching=matching)
    joint._rollout(net, torch.zeros(2, 3, 4, 4), None, 0)
    recorded = ConditionedGuidance((0.1, 0.9)).conditioned(net, None, 2, 3.0, None).conditions["conditions"]
    assert torch.equal(asked[0], recorded)


def test_joint_training_refuses_a_network_that_its_regression_cannot_train(net):
    with pytest.raises(ValueError, match="guidance_conditioning"):
        JointDistillation(net, JointObjective(regression=ImprovedMeanFlow()), optimization=Optimization(optimizer))


@pytest.mark.parametrize("kind", [FlowMapModule, JointDistillation])
def test_a_given_teacher_stays_and_an_own_one_is_the_last_modules(net, kind):
    given = TeacherVelocity(lambda z, r, t, *context: -z)
    teacher = given.teacher
    own, other = TeacherVelocity(), copy.deepcopy(net)
    torch.nn.init.zeros_(other.transformer.proj_out.weight)
    for velocity in (given, own):
        for network in (net, other):
            objective = MeanFlow(velocity=velocity)
            kind(network, JointObjective(regression=objective) if kind is JointDistillation else objective)
    assert given.teacher is teacher
    assert not own.teacher.net.transformer.proj_out.weight.any(), "a copy of the second network"


@pytest.mark.parametrize("velocity", [TeacherVelocity(), SelfVelocity()])
def test_kappa_needs_a_velocity_beside_the_networks_own(velocity):
    with pytest.raises(ValueError, match=r"guidance.kappa .* give scale=2 for the same guidance"):
        MeanFlow(velocity=velocity, guidance=TargetGuidance(scale=1.0, kappa=0.5))
    refinement = Refinement(guidance=TargetGuidance(scale=1.0, kappa=0.5))
    with pytest.raises(ValueError, match=r"refinement.guidance.kappa .* give scale=2 for the same guidance"):
        RefinedMeanFlow(refinement=refinement)


def test_cmt_goes_on_with_meanflow_on_the_same_teacher(tmp_path, net, loader):
    steps = []

    class Watched(FlowMapModule):
        def log_terms(self, terms):
            steps.append(len(terms.derivative_norm))
            super().log_terms(terms)

    objective = CMT(share=0.5, solver_steps=4, times=HALF)
    parent = copy.deepcopy(net.state_dict())
    fit(Watched(net, objective, optimization=Optimization(optimizer)), loader, tmp_path)
    assert steps == [0, 0, 4]
    teacher = objective.velocity.teacher.net.state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in parent.items()), "the teacher stays the parent"


@pytest.mark.parametrize("interval", [SummedInterval(), DecoupledInterval(1)])
def test_a_network_trains_with_every_interval(tmp_path, loader, interval):
    torch.manual_seed(0)
    net = SanaFlowMap(
        TINY, prediction=PredictData(), time_scale=10.0, latent_size=8, context_width=16, interval=interval
    )
    before = copy.deepcopy(net.state_dict())
    logged = fit(
        FlowMapModule(net, MeanFlow(times=HALF), optimization=Optimization(optimizer)), loader, tmp_path
    ).callback_metrics
    assert moved(before, net) == set(before)
    assert logged["train/nan_rows"] == 0


def test_alpha_flow_takes_derivatives_from_the_end_of_its_schedule_on(tmp_path, net, loader):
    steps = []

    class Watched(FlowMapModule):
        def log_terms(self, terms):
            steps.append(len(terms.derivative_norm))
            super().log_terms(terms)

    objective = AlphaFlow(AlphaSchedule(0.0, 0.5), times=HALF)
    fit(Watched(net, objective, optimization=Optimization(optimizer)), loader, tmp_path)
    assert steps == [0, 0, 4]


@pytest.mark.parametrize("kind", [FlowMapModule, JointDistillation])
def test_samples_of_other_captions_train_and_objectives_without_samples_refuse_them(tmp_path, net, kind):
    shards = write_numbered(tmp_path / "shards", [16])

    def trained(objective, **options):
        torch.manual_seed(0)
        data = CaptionImageData(
            WordEncoder(16, 4), Pixels(), shards, resolution=8, batch_size=4, num_workers=0, **options
        )
        model = kind(copy.deepcopy(net), objective, optimization=Optimization(optimizer))
        fit(model, None, tmp_path, datamodule=data)
        return model.net.state_dict()

    def refined():
        return RefinedMeanFlow(velocity=TeacherVelocity(), refinement=Refinement(start=0.0))

    def sampling():
        return JointObjective() if kind is JointDistillation else refined()

    if kind is JointDistillation:  # the samples that its regression refines are of these captions, too
        alone = partial(JointObjective, matching_weight=LossTerm(2.0, start=1000))
        own, other = trained(alone(regression=refined())), trained(alone(regression=refined()), sampling_captions=["d"])
        assert any(not torch.equal(own[name], other[name]) for name in own)
    own, other = trained(sampling()), trained(sampling(), sampling_captions=["d", "e"])
    assert any(not torch.equal(own[name], other[name]) for name in own)
    if kind is FlowMapModule:
        with pytest.raises(ValueError, match=r"data.sampling_captions: MeanFlow draws no samples"):
            trained(MeanFlow(), sampling_captions=["d", "e"])


GUIDED = TargetGuidance(scale=2.0)


@pytest.mark.parametrize(
    ("objective", "dropout", "warned"),
    [
        (MeanFlow(guidance=GUIDED), 0.0, True),
        (MeanFlow(guidance=GUIDED), 0.1, False),
        (MeanFlow(guidance=TargetGuidance(scale=1.0)), 0.0, False),
        (MeanFlow(), 0.0, False),
        (MeanFlow(guidance=GUIDED, velocity=SelfVelocity()), 0.0, True),
        (MeanFlow(guidance=GUIDED, velocity=TeacherVelocity()), 0.0, False),
        (FlowMatching(), 0.0, False),
        (FlowGeneratorMatching(), 0.0, False),
        (JointObjective(regression=MeanFlow(guidance=GUIDED)), None, True),
        (JointObjective(regression=MeanFlow(guidance=GUIDED, velocity=TeacherVelocity())), None, False),
    ],
)
def test_guidance_by_a_null_caption_that_nothing_trains_is_said(tmp_path, net, loader, objective, dropout, warned):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if dropout is None:
            module = JointDistillation(net, objective, optimization=Optimization(optimizer))
        elif isinstance(objective, FlowGeneratorMatching):
            module = FGM(net, objective, optimization=Optimization(optimizer))
        else:
            module = FlowMapModule(net, objective, caption_dropout=dropout, optimization=Optimization(optimizer))
        fit(module, loader, tmp_path)
    assert any("which no sample trains" in str(one.message) for one in said) == warned
