"""The joint objective: gradients held at ratios, the fixed point at the exact student, and who gets a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emf_lightning.flow.objectives.base import LossTerm
from emf_lightning.flow.objectives.distribution_matching import DMD, AlphaMatching, DistributionMatching, ExactMatching
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.sampling import FlowMapSampler, flow_map_rollout
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule
from emf_lightning.flow.weighting import UniformWeighting
from tests.flow import gaussian


class Student(nn.Module):
    """u = a z + b (t - r) + c, per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(value)) for value in (0.3, -0.2, 0.1))

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return self.a * z + self.b * (t - r).view(-1, 1, 1, 1) + self.c


def teacher(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return 0.8 * z - 0.5


def online_flow(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return 0.6 * z


def logits(z: Tensor, t: Tensor) -> Tensor:
    return z.flatten(1).sum(1).tanh()


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    return torch.stack(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))


def spy(found: list[Tensor]):
    """A hook that keeps the gradients of a rollout's samples."""

    def rollout(*arguments):
        samples = flow_map_rollout(*arguments)
        if samples.requires_grad:
            samples.register_hook(found.append)
        return samples

    return rollout


@pytest.mark.parametrize(
    ("matching", "adversarial"),
    [(2.0, 0.0), (0.0, 0.5), (3.0, 0.0)],
)
@pytest.mark.parametrize("loss", [DMD(), DMD(project=True), ExactMatching(), AlphaMatching(1.2)])
def test_gradient_at_the_samples_has_the_given_ratio_to_the_regressions(monkeypatch, matching, adversarial, loss):
    found: list[Tensor] = []
    monkeypatch.setattr("emf_lightning.flow.objectives.joint.flow_map_rollout", spy(found))
    net, x = Student(), torch.randn(16, 2, 3, 3)
    objective = JointObjective(
        matching=DistributionMatching(loss=loss),
        matching_weight=LossTerm(matching),
        adversarial_weight=LossTerm(adversarial),
    )
    terms = objective(net, x, teacher=teacher, online_flow=online_flow, discriminator=logits)
    terms.loss.backward()
    (gradient,) = found
    reference = float(terms.metrics["regression_gradient"])
    assert float(gradient.norm()) == pytest.approx((matching + adversarial) * reference, rel=1e-4)
    assert float(terms.loss.detach()) == pytest.approx(float(terms.regression.loss.detach()))


def test_regressions_gradient_norm_is_the_one_at_the_networks_output():
    net, x = Student(), torch.randn(16, 2, 3, 3)
    objective = JointObjective(regression=MeanFlow(weighting=UniformWeighting()))
    terms = objective(net, x, teacher=teacher, online_flow=online_flow)
    # d/du of sum((u - u_tgt)^2) / B
    wanted = 2 * (terms.regression.squared_error.sum() * x[0].numel()).sqrt() / len(x)
    assert float(terms.metrics["regression_gradient"]) == pytest.approx(float(wanted), rel=1e-5)


def test_gradient_is_the_sum_of_the_terms():
    net, x = Student(), torch.randn(16, 2, 3, 3)

    def found(**values: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        weights = {name: LossTerm(value) for name, value in values.items()}
        terms = JointObjective(**weights)(net, x, teacher=teacher, online_flow=online_flow, discriminator=logits)
        return gradients(terms.loss, net), gradients(terms.regression.loss, net)

    one, regression = found(matching_weight=1.0)
    two, again = found(matching_weight=2.0)
    assert torch.equal(regression, again)
    assert torch.allclose(two - regression, 2 * (one - regression), atol=1e-6)
    assert (one - regression).abs().max() > 1e-3


@pytest.mark.parametrize(("online_error", "student_error"), [(0.0, 0.0), (0.0, 0.1), (0.1, 0.1)])
def test_exact_student_is_a_fixed_point_of_the_gaussian_world(online_error, student_error):
    def student(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return gaussian.average_velocity(z, r, t) + shift

    def flow(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return gaussian.velocity(z, t)

    x = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    shift = torch.full((), student_error, dtype=torch.float64, requires_grad=True)
    terms = JointObjective(
        regression=MeanFlow(velocity=TeacherVelocity(flow), weighting=UniformWeighting()),
        rollout_steps=(2,),
        gradient_jumps=2,
    )(student, x, teacher=flow, online_flow=lambda z, r, t: flow(z, r, t) + online_error)
    gradient = float(torch.autograd.grad(terms.loss, shift)[0].abs())
    if student_error:
        assert gradient > 0.1
    else:
        assert gradient < 1e-5
    assert (float(terms.metrics["velocity_gap"]) > 1e-3) == (online_error > 0)


@pytest.mark.parametrize(("steps", "jumps", "graphs"), [(1, 1, 1), (4, 1, 1), (4, 2, 2), (2, 5, 2), (3, 0, 0)])
def test_rollouts_are_the_samplers_and_their_last_jumps_have_a_graph(steps, jumps, graphs):
    calls = []

    def u(z, r, t):
        calls.append(torch.is_grad_enabled())
        return 0.5 * z * (1 + t - r).view(-1, 1) + scale

    scale, noise = torch.zeros(1, requires_grad=True), torch.randn(3, 2)
    x = flow_map_rollout(u, noise, steps, jumps)
    assert calls == [False] * (steps - graphs) + [True] * graphs
    assert x.requires_grad == (graphs > 0)
    assert torch.equal(x, FlowMapSampler()(u, noise, steps))
    assert not FlowMapSampler()(u, noise, steps).requires_grad


def test_batches_take_the_rollouts_in_turn():
    class Counting(Student):
        jumps = 0

        def forward(self, z, r, t):
            self.jumps += bool(((t - r) > 0).all()) and len(set(t.tolist())) == 1
            return super().forward(z, r, t)

    objective = JointObjective(rollout_steps=(1, 2, 4))
    taken = []
    for step in range(4):
        net = Counting()
        objective.online_flow_loss(net, torch.randn(4, 1, 2, 2), online_flow=online_flow, step=step)
        taken.append(net.jumps)
    assert taken == [1, 2, 4, 1]


def test_terms_count_from_their_steps_on():
    objective = JointObjective(matching_weight=LossTerm(2.0, start=10), adversarial_weight=LossTerm(1.0, start=5))
    found = []
    for step in (0, 5, 10):
        terms = objective(
            Student(),
            torch.randn(4, 1, 2, 2),
            teacher=teacher,
            online_flow=online_flow,
            discriminator=logits,
            step=step,
        )
        found.append({"matching_gradient", "adversarial_gradient"} & terms.metrics.keys())
    assert found == [set(), {"adversarial_gradient"}, {"matching_gradient", "adversarial_gradient"}]


def test_samples_that_are_not_finite_are_left_out():
    spoiled = torch.tensor([True, False, False, False]).view(-1, 1, 1, 1)

    class Spoiled(Student):
        def forward(self, z, r, t):
            one_step = (t == 1) & (r == 0)
            bad = spoiled[: len(z)] & one_step.view(-1, 1, 1, 1)
            return torch.where(bad, float("nan"), super().forward(z, r, t))

    net = Spoiled()
    terms = JointObjective()(net, torch.randn(4, 1, 2, 2), teacher=teacher, online_flow=online_flow)
    assert terms.finite.tolist() == [False, True, True, True]
    assert gradients(terms.loss, net).isfinite().all()


def test_real_images_of_the_discriminator_are_the_datas_or_the_teachers():
    seen: list[Tensor] = []

    def watching(z, t):
        seen.append(z)
        return z.flatten(1).mean(1)

    x = torch.full((64, 1, 2, 2), 5.0)
    clean = LogitNormalTimes(mu=Schedule(-9.0), sigma=Schedule(0.1), flow_matching_ratio=Schedule(1.0))
    for real_steps, mean in ((None, 5.0), (50, gaussian.M)):
        seen.clear()
        objective = JointObjective(real_steps=real_steps, discriminator_times=clean, adversarial_weight=LossTerm(1.0))
        terms = objective.discriminator_loss(
            lambda z, r, t: gaussian.average_velocity(z, r, t) + 3.0,
            x,
            teacher=lambda z, r, t: gaussian.velocity(z, t),
            discriminator=watching,
        )
        real, fake = seen
        assert float(real.mean()) == pytest.approx(mean, abs=0.1)
        assert float(fake.mean()) == pytest.approx(gaussian.M - 3.0, abs=0.1)
        assert terms.loss.isfinite()


def test_samples_take_captions_of_their_own():
    rows = {"data": set(), "samples": set()}

    def watching(name):
        def net(z, r, t, c):
            rows[name].add(float(c[0, 0]))
            return z * torch.ones((), requires_grad=True)

        return net

    objective = JointObjective(matching_weight=LossTerm(1.0), regression=MeanFlow())
    context, other = torch.zeros(4, 1), torch.ones(4, 1)
    for sampling_context, seen in ((None, {0.0}), (other, {1.0})):
        rows = {"data": set(), "samples": set()}
        matching = {"teacher": watching("samples"), "online_flow": watching("samples")}
        objective(watching("data"), torch.randn(4, 2), context, sampling_context=sampling_context, **matching)
        assert rows == {"data": {0.0} | seen, "samples": seen}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"matching_weight": LossTerm(-1.0)}, "matching_weight must not be negative"),
        ({"adversarial_weight": LossTerm(-1.0)}, "adversarial_weight must not be negative"),
        ({"rollout_steps": ()}, "must be at least 1"),
        ({"rollout_steps": (0,)}, "must be at least 1"),
        ({"gradient_jumps": 0}, "must be at least 1"),
        ({"r1": -1.0}, "r1 >= 0"),
        ({"real_steps": 0}, "real_steps >= 1"),
        ({"discriminator_times": LogitNormalTimes()}, "discriminator_times"),
    ],
)
def test_values_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        JointObjective(**settings)
