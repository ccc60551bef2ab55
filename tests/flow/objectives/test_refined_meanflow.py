from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.refined_meanflow import RefinedMeanFlow, Refinement
from emf_lightning.flow.sampling import FlowMapSampler
from emf_lightning.flow.target_velocity import TeacherVelocity

POINT = 0.3


def to_point(z: Tensor, r: Tensor, t: Tensor, samples: Tensor | None = None) -> Tensor:
    """The flow of data that are one point; along its straight paths u = v."""
    return (z - POINT) / t.view(-1, *[1] * (z.ndim - 1))


def to_two_points(z: Tensor, r: Tensor, t: Tensor, samples: Tensor | None = None) -> Tensor:
    """The flow of data at -1 and 1 in one dimension, each with probability 1/2: v = (z - E[x | z]) / t."""
    t = t.view(-1, *[1] * (z.ndim - 1))
    return (z - torch.tanh(z * (1 - t) / t**2)) / t


SCALE = torch.ones((), requires_grad=True)


def shows(z: Tensor, r: Tensor, t: Tensor, samples: Tensor) -> Tensor:
    """A network whose one-step samples are its conditioning: u = e - x there, and a constant at all other times."""
    one = ((t == 1) & (r == 0)).view(-1, *[1] * (z.ndim - 1))
    return torch.where(one, z - samples, 0.1 * SCALE + 0 * z)


def pull(objective: RefinedMeanFlow, samples: Tensor) -> Tensor:
    """The gradient of the loss at one-step samples; the regression has none there."""
    torch.manual_seed(1)
    samples = samples.clone().requires_grad_()
    return torch.autograd.grad(objective(shows, torch.zeros_like(samples), samples).loss, samples)[0]


def refined(of=to_point, **settings) -> RefinedMeanFlow:
    settings = {"start": 0.0, "solver_steps": 32} | settings
    return RefinedMeanFlow(velocity=TeacherVelocity(of), refinement=Refinement(**settings))


def test_an_image_that_the_teacher_keeps_has_no_error():
    samples = torch.full((16, 3), POINT)
    assert refined()(shows, torch.zeros(16, 3), samples).metrics["refinement_error"] < 1e-6
    assert refined()(shows, torch.zeros(16, 3), samples + 0.1).metrics["refinement_error"] > 0.09


def test_the_target_is_the_teachers_euler_path_from_the_sample_on_its_own_noise():
    objective = refined(to_two_points, times=(0.5, 0.5), solver_steps=2)
    sample, noise = torch.tensor([[0.4], [-0.1]]), torch.tensor([[0.8], [0.2]])
    z = 0.5 * sample + 0.5 * noise
    for t in (0.5, 0.25):
        z = z - 0.25 * (z - torch.tanh(z * (1 - t) / t**2)) / t
    assert torch.allclose(objective.refined(nn.Identity(), sample, noise), z, atol=1e-6)


def test_the_refinement_has_the_targets_guidance_or_its_own():
    def teacher(z: Tensor, r: Tensor, t: Tensor, point: Tensor) -> Tensor:
        return (z - point) / t[:, None]

    def image(own: TargetGuidance | None) -> Tensor:
        objective = RefinedMeanFlow(
            velocity=TeacherVelocity(teacher),
            guidance=TargetGuidance(scale=1.5),
            refinement=Refinement(times=(0.5, 0.5), guidance=own),
        )
        sample = noise = torch.zeros(2, 3)
        return objective.refined(nn.Identity(), sample, noise, torch.ones(2, 3), torch.zeros(1, 3))

    # guidance of a point at 1 against one at 0 is the flow to the point at its scale
    assert torch.allclose(image(None), torch.full((2, 3), 1.5))
    assert torch.allclose(image(TargetGuidance(scale=2.0)), torch.full((2, 3), 2.0))
    assert torch.allclose(image(TargetGuidance(scale=2.0, interval=(0.9, 1.0))), torch.ones(2, 3))


@pytest.mark.parametrize(("scale", "evaluations"), [(1.0, 2), (1.5, 4)])
def test_a_teacher_without_guidance_is_evaluated_once_a_solver_step_and_needs_no_null_caption(scale, evaluations):
    calls: list[Tensor] = []

    def teacher(z: Tensor, r: Tensor, t: Tensor, point: Tensor) -> Tensor:
        calls.append(point)
        return (z - point) / t[:, None]

    refinement = Refinement(solver_steps=2, guidance=TargetGuidance(scale=scale))
    objective = RefinedMeanFlow(velocity=TeacherVelocity(teacher), guidance=TargetGuidance(2.0), refinement=refinement)
    sample = noise = torch.zeros(2, 3)
    null = torch.zeros(1, 3) if scale != 1 else None
    objective.refined(nn.Identity(), sample, noise, torch.ones(2, 3), null)
    assert len(calls) == evaluations


def test_samples_are_those_of_the_sampler_of_one_or_two_steps():
    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * z) + (t - 2 * r)[:, None]

    noise = torch.randn(64, 2)
    one, two = (FlowMapSampler()(u, noise, steps) for steps in (1, 2))
    assert torch.allclose(refined().sample(u, noise), one)
    assert torch.allclose(refined(starts=(0.5,)).sample(u, noise), two, atol=1e-6)
    both = refined(starts=(1.0, 0.5)).sample(u, noise)
    rows = torch.isclose(both, one).all(1), torch.isclose(both, two, atol=1e-6).all(1)
    assert (rows[0] ^ rows[1]).all() and 16 < rows[0].sum() < 48


def test_the_graph_of_a_two_step_sample_is_that_of_its_second_jump():
    scale = torch.ones((), requires_grad=True)
    sample = refined(starts=(0.5,)).sample(lambda z, r, t: scale * z, torch.ones(1, 2))
    assert torch.allclose(torch.autograd.grad(sample.sum(), scale)[0], torch.tensor(-0.5), atol=1e-6)


def test_a_blend_is_pulled_to_the_image_that_it_shows_best_however_faint_the_other():
    samples = torch.tensor([[0.5], [-0.5], [0.9], [-0.9]]).repeat(256, 1)
    gradient = pull(refined(to_two_points, times=(0.2, 0.2), softness=1e-3), samples)
    assert (torch.sign(-gradient) == torch.sign(samples)).float().mean() > 0.9, "at t = .2 noise turns few decisions"
    strong, faint = (gradient[samples.abs() == size].abs().median() for size in (0.5, 0.9))
    assert torch.allclose(strong, faint, rtol=0.05), "the gradient of |d|; that of d^2 / 2 would be a fifth"


def test_its_gradient_has_the_norm_that_the_weight_says_and_no_part_through_the_target():
    samples = torch.randn(64, 2)
    one, four = (pull(refined(weight=weight), samples) for weight in (1.0, 4.0))
    assert torch.allclose(four, 4 * one, atol=1e-7)
    torch.manual_seed(1)
    terms = MeanFlow(velocity=TeacherVelocity(to_point))(shows, torch.zeros(64, 2), samples)
    assert torch.allclose(one.norm(), torch.autograd.grad(terms.loss, terms.u)[0].norm(), rtol=1e-4)
    expected = torch.sign(samples - POINT) / samples.numel() ** 0.5 * one.norm()
    assert torch.allclose(pull(refined(weight=1.0, softness=1e-6), samples), expected, atol=1e-3 * one.norm())


def test_before_its_start_it_is_meanflow_bit_for_bit():
    net = nn.Linear(3, 3)

    def loss(objective: MeanFlow, progress: float) -> Tensor:
        torch.manual_seed(0)
        return objective(lambda z, r, t: net(z), torch.randn(32, 3), progress=progress).loss

    alone, joined = MeanFlow(velocity=TeacherVelocity(to_point)), refined(start=0.5)
    assert torch.equal(loss(alone, 0.49), loss(joined, 0.49))
    assert torch.equal(loss(alone, 0.5), loss(joined, 0.5)), "the value stays the regression's"


def test_samples_and_their_teacher_take_captions_of_their_own():
    def teacher(z: Tensor, r: Tensor, t: Tensor, point: Tensor) -> Tensor:
        return (z - point) / t[:, None]

    objective, data = refined(of=teacher), torch.zeros(8, 3)
    own = torch.rand(8, 3)
    terms = objective(shows, data, data + 9.0, sampling_context=own, dropped=torch.ones(8, dtype=torch.bool))
    assert terms.metrics["refinement_error"] < 1e-5, "both take the sampling context: the teacher keeps each sample"
    assert torch.allclose(terms.metrics["sample_std"], own.std(0).mean())
    torch.manual_seed(0)
    alone = MeanFlow(velocity=TeacherVelocity(teacher))(shows, data, data + 9.0).squared_error
    torch.manual_seed(0)
    assert torch.equal(objective(shows, data, data + 9.0, sampling_context=own).squared_error, alone)


def test_one_sample_that_is_not_finite_leaves_the_others_as_they_are():
    samples = torch.randn(8, 2)
    samples[3] = torch.nan
    net = nn.Linear(2, 2)
    context = torch.zeros(8, 2)
    context[3] = torch.nan
    terms = refined(of=lambda z, r, t, c: z)(lambda z, r, t, c: net(z) + c, samples.nan_to_num(), context)
    assert terms.finite.tolist() == [row != 3 for row in range(8)]
    gradient = torch.autograd.grad(terms.loss, net.weight)[0]
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_share_refines_the_first_rows_alone_with_their_own_conditioning_and_the_whole_weight():
    def gradient(share: float, dropped: Tensor | None = None) -> Tensor:
        torch.manual_seed(1)
        samples = torch.linspace(-1, 1, 20).view(10, 2).requires_grad_()
        guidance = TargetGuidance(scale=2.0)
        objective = RefinedMeanFlow(
            velocity=TeacherVelocity(lambda z, r, t, c: to_point(z, r, t) + 0.1 * c),
            guidance=guidance,
            refinement=Refinement(start=0.0, share=share, softness=10.0),  # in proportion to the error
        )
        terms = objective(shows, torch.zeros(10, 2), samples, null_context=torch.ones(1, 2), dropped=dropped)
        assert terms.finite.shape == (10,)
        return torch.autograd.grad(terms.loss, samples)[0]

    part, whole = gradient(0.35), gradient(1.0)
    assert part.abs().sum(1).bool().tolist() == [True] * 4 + [False] * 6, "3.5 of 10, rounded up"
    assert torch.allclose(part.norm(), whole.norm(), rtol=1e-4), "weight is the norm of all refined rows together"

    def direction(dropped: list[bool]) -> Tensor:
        gradient_ = gradient(0.35, torch.tensor(dropped))
        return gradient_ / gradient_.norm()  # the norm is the regression's, which all dropped captions change

    others = direction([False] * 4 + [True] * 6)
    assert torch.allclose(others, direction([False] * 10), atol=1e-6), "captions of the rows left out do not matter"
    assert not torch.allclose(others, direction([True] * 2 + [False] * 8), atol=1e-4)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_captions_for_another_number_of_samples_are_refused(number, share):
    data = torch.zeros(8, 3)
    with pytest.raises(ValueError, match="8"):
        refined(of=to_point, share=share)(shows, data, data, sampling_context=torch.zeros(number, 3))


def test_a_row_that_is_not_finite_counts_among_the_share_or_not_at_all():
    samples = torch.zeros(8, 2)
    finite = []
    for row in (1, 6):
        context = samples.clone()
        context[row] = torch.nan
        objective = refined(of=lambda z, r, t, c: 0 * z, share=0.5)
        net = lambda z, r, t, c: torch.where((t == 1)[:, None], z - c, 0.1 * SCALE + 0 * z)  # noqa: E731
        finite.append(objective(net, samples, samples, sampling_context=context).finite.tolist())
    assert finite[0][1] is False and all(finite[1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"share": 0.0}, r"share must lie in \(0, 1\]"),
        ({"share": 1.5}, r"share must lie in \(0, 1\]"),
        ({"starts": ()}, "starts must be"),
        ({"starts": (1.0, 0.0)}, "starts must be"),
        ({"times": (0.7, 0.4)}, "times must be"),
        ({"times": (0.0, 0.4)}, "times must be"),
        ({"times": (0.4, 1.0)}, "times must be"),
        ({"weight": 0.0}, "weight above 0"),
        ({"start": 1.0}, r"start in \[0, 1\)"),
        ({"solver_steps": 0}, "solver_steps of at least 1"),
        ({"softness": 0.0}, "softness above 0"),
    ],
)
def test_values_out_of_range_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        Refinement(**settings)
