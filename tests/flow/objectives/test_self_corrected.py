"""SCFlow's terms on flows that are known: straight ones, on which every term is 0, and Gaussian ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from emf_lightning.flow.objectives.base import LossTerm
from emf_lightning.flow.objectives.self_corrected import (
    SelfCorrectedFlow,
    VelocityConsistency,
    one_step,
    predict_x0,
    pseudo_huber,
    step_alignment,
)
from emf_lightning.flow.times import LogitNormalTimes, Schedule
from tests.flow.gaussian import M, S, average_velocity, velocity

A, B = 0.4, 0.7
ROWS = 256


def straight(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """The velocity where data are A e + B of their own noise: constant along every path."""
    t = t.view(-1, 1, 1, 1)
    e = (z - (1 - t) * B) / ((1 - t) * A + t)
    return (1 - A) * e - B


def inputs(rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(rows, 1, 2, 2, dtype=torch.float64, generator=generator)
    t = torch.rand(rows, dtype=torch.float64, generator=generator) * 0.9 + 0.05
    return A * e + B, e, t


def gaussian(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return velocity(z, t)


def to_data(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """The exact jump to t = 0, whatever r is."""
    return average_velocity(z, torch.zeros_like(t), t)


def test_every_term_is_zero_on_a_straight_flow():
    x, e, t = inputs()
    objective = VelocityConsistency(max_step=0.3, truncation=0.4)
    terms = objective(straight, straight, straight, x, e, t, backward=True)
    assert terms.forward.abs().max() < 1e-9
    assert terms.backward.abs().max() < 1e-9
    assert torch.allclose(one_step(straight, e).double(), x, atol=1e-6)
    assert step_alignment(straight, x, e, t).max() < 1e-12


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_the_teachers_step_leaves_an_error_of_second_order_in_its_length(part):
    def error(max_step: float) -> float:
        torch.manual_seed(0)
        _, e, t = inputs()
        x = M + S * torch.randn_like(e)
        objective = VelocityConsistency(max_step, truncation=0.0, huber_c=1e-12)
        terms = objective(to_data, to_data, gaussian, x, e, t, backward=True)
        return float(getattr(terms, part).mean())

    assert math.log2(error(0.02) / error(0.01)) == pytest.approx(2, abs=0.1)
    assert error(0.01) < 1e-3


def written_out(x: Tensor, e: Tensor, t: Tensor, **wrong: float) -> Tensor:
    """The forward term of the formula itself, at the exact flow; ``wrong`` is a mistake to make."""
    torch.manual_seed(0)
    down, up = torch.rand(2, len(t), dtype=t.dtype)[0] * t.clamp(max=0.1), 0
    z = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * e
    sign = wrong.get("sign", 1.0)
    after = z - sign * down.view(-1, 1, 1, 1) * straight(z, t, t)
    time = t - down if wrong.get("time", True) else t
    target = predict_x0(straight, after, time)
    return pseudo_huber(predict_x0(straight, z, t), target, 1e-12).mean() + up


def test_a_step_the_wrong_way_or_a_time_that_stays_is_seen():
    x, e, t = inputs()
    assert written_out(x, e, t) < 1e-9
    assert written_out(x, e, t, sign=-1.0) > 1e-2
    assert written_out(x, e, t, time=False) > 1e-2


def test_truncation_is_the_rows_own():
    x, e, _ = inputs(4)
    t = torch.tensor([0.05, 0.9, 0.15, 0.6], dtype=torch.float64)
    off = x + 100.0  # data that are on no path show where they are the target
    torch.manual_seed(0)
    terms = VelocityConsistency(max_step=1e-6, truncation=0.2)(
        lambda z, r, t: 0 * z, lambda z, r, t: 0 * z, lambda z, r, t: 0 * z, off, e, t, backward=False
    )
    z = (1 - t.view(-1, 1, 1, 1)) * off + t.view(-1, 1, 1, 1) * e
    expected = pseudo_huber(z, off, 0.01)
    assert torch.allclose(terms.forward[[0, 2]], expected[[0, 2]], rtol=1e-4)
    assert terms.forward[[1, 3]].max() < 1e-9, "the target is X a moment later, which is z itself here"


def test_steps_end_inside_the_path():
    seen = []

    def target(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return straight(z, r, t)

    x, e, t = inputs()
    objective = VelocityConsistency(max_step=1.0, truncation=0.0)
    objective(straight, target, straight, x, e, t, backward=True)
    after, before = seen
    assert ((after >= 0) & (after < t)).all()
    assert ((before > t) & (before <= 1)).all()


def test_gradient_flows_through_the_student_at_t_alone():
    x, e, t = inputs(8)
    parameters = {name: torch.ones((), dtype=torch.float64, requires_grad=True) for name in ("s", "m", "t")}

    def scaled(name: str):
        return lambda z, r, t: (1.1 if name == "s" else 1.0) * parameters[name] * straight(z, r, t)

    terms = VelocityConsistency()(scaled("s"), scaled("m"), scaled("t"), x, e, t, backward=True)
    (terms.forward + terms.backward).sum().backward()
    assert parameters["s"].grad != 0
    assert parameters["m"].grad is None
    assert parameters["t"].grad is None


def test_alignment_moves_the_line_and_not_its_end():
    _, e, t = inputs(8)
    a = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)

    def student(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return a * straight(z, r, t)

    x = one_step(student, e)
    errors = step_alignment(student, x, e, t)
    z = (1 - t.view(-1, 1, 1, 1)) * x.detach() + t.view(-1, 1, 1, 1) * e
    by_hand = (z - t.view(-1, 1, 1, 1) * a * straight(z, t, t).float() - x.detach()).square().mean((1, 2, 3))
    assert torch.allclose(errors, by_hand, rtol=1e-5)
    (gradient,) = torch.autograd.grad(errors.sum(), a)
    (expected,) = torch.autograd.grad(by_hand.sum(), a)
    assert gradient == pytest.approx(float(expected), rel=1e-5)


def test_pseudo_huber_is_a_distance_far_away_and_a_square_near():
    a, b = torch.zeros(2, 1, 1, 1), torch.tensor([100.0, 1e-4]).view(2, 1, 1, 1)
    far, near = pseudo_huber(a.double(), b.double(), 0.01).tolist()
    assert far == pytest.approx(100, rel=1e-3)
    assert near == pytest.approx(1e-8 / 0.02, rel=1e-3)


@pytest.mark.parametrize("settings", [{"max_step": 0.0}, {"truncation": 1.0}, {"huber_c": 0.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"VelocityConsistency: {next(iter(settings))}"):
        VelocityConsistency(**settings)


def to_point(z, r, t, c):
    """The flow to data of one point, the caption."""
    return (z - c.view(-1, 1, 1, 1)) / t.view(-1, 1, 1, 1)


def test_the_teacher_is_guided_by_its_scale():
    """Guidance 2 of the caption at 1 against the one at 0 is the flow to the point 2."""
    seen, x, scale, off = [], torch.ones(64, 1, 2, 2), 2.0, LossTerm(0.0)

    def target(z, r, t, c):
        seen.append((z, t))
        return to_point(z, r, t, c)

    objective = SelfCorrectedFlow(
        consistency=VelocityConsistency(max_step=0.5, truncation=0.0),
        backward=off,
        alignment=off,
        adversarial=off,
        teacher_guidance_scale=scale,
    )
    caption, null = torch.ones(64), torch.zeros(1)
    torch.manual_seed(0)
    objective(to_point, x, caption, teacher=to_point, target=target, discriminator=None, null_context=null)

    torch.manual_seed(0)
    t, _, e = torch.rand(64), torch.rand(64), torch.randn_like(x)
    z = x + t.view(-1, 1, 1, 1) * (e - x)
    after, s = seen[0]
    expected = z - ((t - s) / t).view(-1, 1, 1, 1) * (z - scale)
    assert torch.allclose(after, expected, atol=1e-4)


@pytest.mark.parametrize(("mu", "time", "spread"), [(-9.0, 0.0, 0.0), (9.0, 1.0, 1.0)])
def test_the_discriminator_sees_latents_at_its_noise(mu, time, spread):
    seen, data = [], torch.full((256, 1, 2, 2), 5.0)
    times = LogitNormalTimes(Schedule(mu), Schedule(0.1), flow_matching_ratio=Schedule(1.0))

    def discriminator(z, t):
        seen.append((z, t))
        return z.flatten(1).sum(1)

    objective = SelfCorrectedFlow(r1=0.0, discriminator_times=times)
    objective.discriminator_loss(lambda z, r, t: z - 5.0, data, discriminator=discriminator)
    assert seen
    for z, t in seen:
        assert abs(float(z.std()) - spread) < 0.1
        assert (t - time).abs().max() < 0.01


def test_truncation_is_where_the_step_ends_and_lengths_are_uniform():
    ends, t = [], torch.full((4000,), 0.6)

    def target(z, r, t):
        ends.append(t)
        return 0 * z

    def still(z, r, t):
        return 0 * z

    x, e = torch.full((4000, 1, 1, 1), 100.0), torch.zeros(4000, 1, 1, 1)
    torch.manual_seed(0)
    terms = VelocityConsistency(max_step=0.4, truncation=0.5)(still, target, still, x, e, t, backward=True)

    after, before = ends
    for length in (t - after, before - t):
        assert abs(length.mean() - 0.2) < 0.01
        assert abs(length.std() - 0.4 / 12**0.5) < 0.01
    assert torch.equal(terms.forward > 1, after < 0.5), "X is z = 40 itself, and the data are 100"
    assert 0.7 < (after < 0.5).float().mean() < 0.8
