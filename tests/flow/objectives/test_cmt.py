from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.cmt import CMT
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule, Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import UniformWeighting
from tests.flow.gaussian import average_velocity, flow_map, rms, velocity

f64 = torch.float64
K = 8


def teacher(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """The exact flow of Gaussian data."""
    assert torch.equal(r, t), "a flow-matching network has one time"
    return velocity(z, t.to(z.dtype))


def linear(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """A velocity with constant coefficients, whose Euler paths have a closed form."""
    return 2.0 * z - 1.0


def linear_map(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """The average velocity of ``linear``'s Euler path: z - 1/2 shrinks by 1 - 2 / K a step."""
    steps = (t - r) * K
    same = (steps == 0).view(-1, 1, 1, 1)
    kept = ((1 - 2.0 / K) ** steps).view(-1, 1, 1, 1)
    length = torch.where(same, 1.0, (t - r).view(-1, 1, 1, 1))
    return torch.where(same, linear(z, t, t), (z - 0.5) * (1 - kept) / length)


def cmt(of=teacher, **settings) -> CMT:
    times = LogitNormalTimes(Schedule(1.2), Schedule(2.0), flow_matching_ratio=Schedule(0.25))
    return CMT(velocity=TeacherVelocity(of), times=times, weighting=UniformWeighting(), **settings)


def noise(rows: int = 256) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, 1, 2, 2, dtype=f64)


@pytest.mark.parametrize("samples_per_path", [1, 3, K, 1000])
def test_flow_map_of_the_solvers_own_paths_has_zero_error(samples_per_path):
    objective = cmt(linear, solver_steps=K, samples_per_path=samples_per_path)
    terms = objective(linear_map, noise())
    assert terms.squared_error.max() < 1e-10
    assert 0 < terms.times.n_interval < 256
    assert (terms.times.r <= terms.times.t).all() and (terms.times.t > 0).all()
    assert torch.equal((terms.times.t * K).round(), terms.times.t * K), "times on the grid"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z, r, t: -linear_map(z, r, t),
        lambda z, r, t: linear(z, t, t),
        lambda z, r, t: linear_map(z, (r - 1 / K).clamp(min=0), t),
        lambda z, r, t: linear_map(z, torch.zeros_like(r), t),
    ],
    ids=["sign", "velocity", "neighbour", "always to the data"],
)
def test_other_maps_have_an_error(wrong):
    assert cmt(linear, solver_steps=K)(wrong, noise()).squared_error.mean() > 1e-3


def test_error_of_the_exact_flow_map_is_the_solvers_and_falls_with_its_steps():
    few, many = (
        cmt(solver_steps=steps, samples_per_path=1)(average_velocity, noise()).squared_error.mean().sqrt()
        for steps in (32, 64)
    )
    assert few / many == pytest.approx(2, rel=0.25)
    assert many < 0.05


def test_path_leads_from_noise_to_the_flow_maps_data():
    e = noise(16)
    path = cmt(solver_steps=400).path(lambda *_: 1 / 0, e)
    assert path.shape == (401, 16, 1, 2, 2)
    assert torch.equal(path[-1], e)
    zero, one = torch.zeros(16, dtype=f64), torch.ones(16, dtype=f64)
    assert rms(path[0] - flow_map(e, one, zero)) < 0.01
    middle = torch.full((16,), 0.25, dtype=f64)
    assert rms(path[100] - flow_map(e, one, middle)) < 0.01, "time runs along the path's index"


def test_target_is_the_paths_average_velocity_between_grid_points():
    """Written out for samples one by one."""
    objective = cmt(solver_steps=K)
    path = objective.path(teacher, noise(3))
    times = Times(
        r=torch.tensor([0.01, 0.26, 0.3, 0.5, 0.01]), t=torch.tensor([0.99, 0.27, 0.9, 0.5, 0.01]), n_interval=3
    )
    owners = torch.tensor([0, 1, 2, 0, 1])
    seen = []

    def net(z, r, t):
        seen.append((z, r, t))
        return torch.zeros_like(z)

    terms = objective.path_terms(AverageVelocity(net), path, owners, times)
    ((z, r, t),) = seen
    # (start, end) on the grid; r = t takes the step that starts there
    for row, (start, end) in enumerate([(8, 0), (3, 2), (8, 2), (4, 3), (1, 0)]):
        assert torch.equal(z[row], path[start, owners[row]])
        assert t[row] == start / K
        assert r[row] == (end / K if row < 3 else start / K)
        target = (path[start, owners[row]] - path[end, owners[row]]) * K / (start - end)
        assert terms.squared_error[row].item() == pytest.approx(target.square().mean().item(), rel=1e-5)


def test_gradient_reaches_the_network_alone():
    student, frozen = (torch.tensor(value, dtype=f64, requires_grad=True) for value in (0.9, 1.1))
    objective = cmt(lambda z, r, t: frozen * teacher(z, r, t), solver_steps=4)
    objective(lambda z, r, t: student * average_velocity(z, r, t), noise(16)).loss.backward()
    assert student.grad is not None and student.grad != 0
    assert frozen.grad is None


def test_paths_are_guided_and_each_sample_has_its_paths_caption():
    """Captions are means of the data: the guided velocity is that of the mean 1.5 c, so paths tell whose they are."""

    def flow(z, r, t, c):
        return (z - c[:, None, None, None].to(z)) / t.view(-1, 1, 1, 1)  # all data at c

    def net(z, r, t, c):
        return (z - 1.5 * c[:, None, None, None].to(z)) / t.view(-1, 1, 1, 1)

    objective = cmt(flow, samples_per_path=3)
    objective.guidance = TargetGuidance(scale=1.5)
    captions = torch.arange(1.0, 65.0)
    terms = objective(net, noise(64), captions, null_context=torch.zeros(1))
    assert terms.squared_error.max() < 1e-8
    assert objective(flow, noise(64), captions, null_context=torch.zeros(1)).squared_error.mean() > 1
    dropped = torch.ones(64, dtype=torch.bool)  # the flow's own velocity where there is no caption
    assert objective(flow, noise(64), captions, null_context=torch.zeros(1), dropped=dropped).squared_error.max() < 1e-8
    with pytest.raises(ValueError, match="null_context"):
        objective(net, noise(64), captions)


def test_meanflow_follows_after_the_share():
    x = noise(32)
    objective = cmt(solver_steps=4, share=0.5)
    after = MeanFlow(times=objective.times, weighting=objective.weighting, velocity=objective.velocity)
    for progress, same in ((0.0, False), (0.49, False), (0.5, True), (1.0, True)):
        torch.manual_seed(1)
        terms = objective(average_velocity, x, progress=progress)
        torch.manual_seed(1)
        expected = after(average_velocity, x, progress=progress)
        assert (terms.derivative_norm.numel() > 0) == same
        assert torch.equal(terms.squared_error, expected.squared_error) == same
    assert cmt(share=1.0)(average_velocity, x, progress=1.0).derivative_norm.numel() == 0


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.1}, {"solver_steps": 1}, {"samples_per_path": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="CMT"):
        CMT(**settings)
