"""What a user's own loop hands to objectives and samplers: odd networks, precisions, conditioning and progress."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from emf_lightning.flow.derivative.finite_difference import FiniteDifference
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.guidance import ConditionedGuidance
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.improved_meanflow import ImprovedMeanFlow
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.rcgm import RCGM
from emf_lightning.flow.objectives.refined_meanflow import RefinedMeanFlow, Refinement
from emf_lightning.flow.objectives.self_corrected import SelfCorrectedFlow
from emf_lightning.flow.objectives.split_meanflow import SplitMeanFlow
from emf_lightning.flow.sampling import EulerSampler, FlowMapSampler, MultistepSampler, sample
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule, UniformTimes
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import UniformWeighting

SHAPE = (8, 3, 4, 6)


class Net(nn.Module):
    """A perceptron of the state, the times and a conditioning ``[B, 5]``."""

    def __init__(self, channels: int = 3, heads: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(nn.Linear(72 + 2 + 5, 16), nn.SiLU(), nn.Linear(16, 72 * heads))

    def forward(self, z, r, t, context=None, conditions=None):
        context = z.new_zeros(len(z), 5) if context is None else context
        inputs = torch.cat([z.flatten(1), (t - r)[:, None].to(z.dtype), t[:, None].to(z.dtype), context], 1)
        return self.layers(inputs).view(len(z), -1, *z.shape[2:])


class AutocastNet(Net):
    """Computes in bf16 and gives fp32, as a network that accelerate prepared."""

    def forward(self, *inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(*inputs).float()


def intervals(share: float) -> UniformTimes:
    return UniformTimes(Schedule(1 - share))


def test_a_batch_of_one_has_both_kinds_of_samples_also_at_one_progress():
    times, device = intervals(0.25), torch.device("cpu")
    found = [times(1, 0.0, device).n_interval for _ in range(400)]
    assert 70 <= sum(found) <= 130
    again = copy.deepcopy(intervals(0.25))
    assert found == [again(1, 0.0, device).n_interval for _ in range(400)], "all ranks draw alike"


def test_a_new_progress_draws_as_in_a_run_that_resumed_there():
    device = torch.device("cpu")
    whole, resumed = intervals(0.5), intervals(0.5)
    steps = [step / 40 for step in range(40)]
    expected = [whole(1, progress, device).n_interval for progress in steps]
    assert expected[20:] == [resumed(1, progress, device).n_interval for progress in steps[20:]]


def test_batches_of_one_learn_the_mean_without_progress():
    torch.manual_seed(0)
    mean = nn.Parameter(torch.zeros(1))
    objective = SplitMeanFlow(times=UniformTimes(Schedule(0.75)), weighting=UniformWeighting())
    optimizer = torch.optim.Adam([mean], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        objective(lambda z, r, t: (z - mean) / t.clamp(min=0.2).view(-1, 1), torch.full((1, 1), 3.0)).loss.backward()
        optimizer.step()
    assert mean.item() == pytest.approx(3, abs=0.6)


@pytest.mark.parametrize("progress", [2.0, -0.1, float("nan"), 100])
def test_progress_outside_its_range_is_refused(progress):
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\], as optimiser steps taken over"):
        MeanFlow()(Net(), torch.randn(SHAPE), progress=progress)


def test_progress_may_be_any_number():
    for progress in (torch.tensor(0.5), 1, 1.0 + 1e-9):
        assert MeanFlow()(Net(), torch.randn(SHAPE), progress=progress).loss.isfinite()


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dictionary"])
@pytest.mark.parametrize(
    "objective",
    [
        FlowMatching(),
        MeanFlow(times=intervals(0.5)),
        RefinedMeanFlow(times=intervals(0.5), refinement=Refinement(start=0.0, starts=(1.0, 0.5))),
        JointObjective(regression=MeanFlow(times=intervals(0.5))),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_conditioning_that_is_not_finite_spoils_no_gradient(objective, kind):
    objective, net, x = copy.deepcopy(objective), Net(), torch.randn(SHAPE)
    if isinstance(objective, RefinedMeanFlow):
        objective.velocity = TeacherVelocity(copy.deepcopy(net))
    context = torch.randn(8, 5)
    context[2, 1] = float("inf")
    context = {"tensor": context, "tuple": (context,), "dictionary": {"context": context}}[kind]
    others = {"teacher": net, "online_flow": copy.deepcopy(net)} if isinstance(objective, JointObjective) else {}
    terms = objective(net, x, context, progress=0.5, null_context=torch.zeros(1, 5), **others)
    terms.loss.backward()
    assert terms.finite.tolist() == [row != 2 for row in range(8)]
    assert all(weight.grad.isfinite().all() for weight in net.parameters())
    assert any(weight.grad.abs().max() > 0 for weight in net.parameters())


def test_masks_and_labels_of_the_conditioning_stay_as_they_are():
    context = torch.randn(8, 5).half(), torch.rand(8, 5) < 0.5, torch.arange(8)
    context[0][3, 0] = float("nan")
    seen = []

    def net(z, r, t, *conditioning):
        seen.append(conditioning)
        return z * 0

    assert FlowMatching()(net, torch.randn(SHAPE), context).finite.tolist() == [row != 3 for row in range(8)]
    (features, mask, labels) = seen[0]
    assert (features.dtype, mask.dtype, labels.dtype) == (torch.float16, torch.bool, torch.int64)
    assert torch.equal(mask, context[1]) and torch.equal(labels, context[2])


def test_conditioning_that_is_not_finite_spoils_no_gradient_of_two_heads():
    net, context = Net(heads=2), torch.randn(8, 5)
    context[2, 1] = float("nan")
    terms = ImprovedMeanFlow()(net, torch.randn(SHAPE), context, null_context=torch.zeros(1, 5))
    terms.loss.backward()
    assert terms.finite.tolist() == [row != 2 for row in range(8)]
    assert all(weight.grad.isfinite().all() for weight in net.parameters())


def test_conditioning_that_is_not_finite_spoils_no_gradient_of_a_self_corrected_flow():
    net, context = Net(), torch.randn(8, 5)
    context[2, 1] = float("nan")
    others = {"teacher": Net(), "target": Net(), "discriminator": lambda z, t, c: z.flatten(1).sum(1)}
    loss = SelfCorrectedFlow()(net, torch.randn(SHAPE), context, **others)
    loss.loss.backward()
    assert all(weight.grad.isfinite().all() for weight in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sampler", [FlowMapSampler(), EulerSampler(), MultistepSampler()])
@pytest.mark.parametrize("steps", [1, 2])
def test_samples_are_of_the_noises_dtype_and_so_are_the_states(dtype, sampler, steps):
    net, noise = Net().to(dtype), torch.randn(SHAPE, dtype=dtype)
    found = sample(net, noise, steps=steps, sampler=sampler)
    assert found.dtype == dtype
    single = sample(Net().float(), noise.float(), steps=steps, sampler=sampler)
    assert single.dtype == torch.float32


def test_the_grid_of_steps_is_fp32_where_another_dtype_is_the_default():
    seen = []
    noise = torch.zeros(1, 1, dtype=torch.float32)

    def net(z, r, t):
        seen.append((t.dtype, t.item()))
        return z

    torch.set_default_dtype(torch.bfloat16)
    try:
        sample(net, noise, steps=30)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen[1] == (torch.float32, pytest.approx(29 / 30, abs=1e-6))


@pytest.mark.parametrize("method", [FiniteDifference(), RCGM(times=None)], ids=lambda one: type(one).__name__)
def test_a_network_that_casts_inside_is_found(method):
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    for net, refused in ((Net(), False), (AutocastNet(), True)):
        objective = MeanFlow(derivative=copy.deepcopy(method)) if isinstance(method, FiniteDifference) else method
        objective = copy.deepcopy(objective)
        if refused:
            with pytest.raises(ValueError, match=r"in torch.bfloat16: rounding .* no autocast inside the network"):
                objective(net, x)
        else:
            assert objective(net, x).loss.isfinite()


def test_round_numbers_are_no_coarse_network():
    objective = MeanFlow(derivative=FiniteDifference(), times=intervals(1.0))
    assert objective(lambda z, r, t: torch.ones_like(z), torch.randn(SHAPE)).loss.isfinite()


@pytest.mark.parametrize("fast", [True, False])
def test_a_compiled_derivative_is_the_derivative(fast):
    torch.manual_seed(0)
    u, method = AverageVelocity(Net(), torch.randn(8, 5)), ForwardMode(fast=fast)
    z, v, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(8)
    compiled = torch.compile(lambda *a: method.jvp(u, *a), backend="eager")
    assert torch.allclose(compiled(z, 0.5 * t, t, v), method.jvp(u, z, 0.5 * t, t, v), atol=1e-6)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda z: SimpleNamespace(sample=z), "must return a tensor, got SimpleNamespace: return its .sample"),
        (lambda z: (z,), "must return a tensor, got tuple"),
        (lambda z: None, "must return a tensor, got NoneType"),
        (lambda z: z[:1], r"must return a tensor like z, \[8, 3, 4, 6\], got \[1, 3, 4, 6\]"),
        (lambda z: z[:, :1], r"got \[8, 1, 4, 6\]"),
        (lambda z: z[..., :1, :1], r"got \[8, 3, 1, 1\]"),
        (lambda z: z.flatten(2), r"got \[8, 3, 24\]"),
    ],
)
def test_an_output_that_is_no_velocity_is_named(output, said):
    net, x = (lambda z, r, t: output(z)), torch.randn(SHAPE)
    for use in (lambda: FlowMatching()(net, x), lambda: sample(net, x)):
        with pytest.raises((TypeError, ValueError), match=said):
            use()


@pytest.mark.parametrize("context", [torch.zeros(8, 5), None])
def test_objectives_are_evaluated_without_a_graph(context):
    net, x, null = Net(), torch.randn(SHAPE), torch.zeros(1, 5)
    refined = RefinedMeanFlow(velocity=TeacherVelocity(Net()), refinement=Refinement(start=0.0))
    for grad in (torch.no_grad, torch.inference_mode):
        with grad():
            assert refined(net, x, context, progress=1.0, null_context=null).loss.isfinite()
            terms = JointObjective()(net, x, context, teacher=net, online_flow=net, progress=1.0, null_context=null)
            assert terms.loss.isfinite()


def test_an_adversarial_term_asks_for_its_discriminator():
    objective = JointObjective(adversarial_weight=copy.deepcopy(JointObjective().matching_weight))
    with pytest.raises(ValueError, match="adversarial_weight counts, so it needs a discriminator"):
        objective(Net(), torch.randn(SHAPE), teacher=Net(), online_flow=Net(), step=10**9)


def test_conditions_are_where_the_conditioning_is():
    context = torch.zeros(2, 5, device="meta")
    velocity = ConditionedGuidance()(lambda *inputs, conditions: inputs[0], context, None, 2, 2.0)
    assert velocity.conditions["conditions"].device.type == "meta"


def test_a_logit_normal_sampler_counts_repeats_as_well():
    found = {LogitNormalTimes(flow_matching_ratio=Schedule(0.5)).counts(1, 0.3, repeats)[0] for repeats in range(20)}
    assert found == {0, 1}
