from __future__ import annotations

import pytest
import torch

from emf_lightning.flow.guidance import TargetGuidance, guided
from emf_lightning.flow.sampling import EulerSampler, FlowMapSampler, MultistepSampler, sample
from tests.flow.gaussian import M, S, average_velocity


def noise(rows: int = 4096) -> torch.Tensor:
    return torch.randn(rows, 1, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_steps_of_the_exact_flow_map_equal_one_step(steps: int):
    e = noise()
    assert torch.allclose(
        FlowMapSampler()(average_velocity, e, steps), FlowMapSampler()(average_velocity, e, 1), atol=1e-5
    )


def test_one_step_of_the_exact_flow_map_samples_the_data():
    x = FlowMapSampler()(average_velocity, noise(), 1)
    assert abs(x.mean() - M) < 0.02
    assert abs(x.std() - S) < 0.02


def test_euler_needs_many_steps():
    e = noise()
    exact = FlowMapSampler()(average_velocity, e, 1)
    errors = [(EulerSampler()(average_velocity, e, k) - exact).abs().max() for k in (1, 4, 64)]
    assert errors[0] > 2 * errors[1] > 20 * errors[2]


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match="at least one step"):
        FlowMapSampler()(average_velocity, noise(), 0)


def test_guidance_extrapolates_from_the_null_velocity():
    u = guided(lambda z, r, t: z + 3, lambda z, r, t: z + 1, 2.0)
    z, t = torch.zeros(2, 1, 1, 1), torch.ones(2)
    assert u(z, t, t).flatten().tolist() == [5.0, 5.0]


def test_target_guidance_mixes_inside_its_interval_and_spares_dropped_rows():
    v = torch.ones(3, 1, 1, 1)
    t = torch.tensor([0.5, 0.9, 0.5])
    guidance = TargetGuidance(scale=0.5, kappa=0.5, interval=(0.0, 0.8))
    vtil = guidance(
        v,
        v,
        t,
        conditional=lambda z, r, t: 3 * torch.ones_like(z),
        unconditional=lambda z, r, t: -torch.ones_like(z),
        dropped=torch.tensor([False, False, True]),
    )
    assert vtil.flatten().tolist() == [0.5 * 1 + 0.5 * 3, 1.0, 1.0]
    assert guidance.effective_scale == 1.0


def test_target_guidance_of_effective_scale_reproduces_guided_velocity_at_the_fixed_point():
    """Where the conditional u is already the guided velocity, vtil returns it (arXiv 2505.13447, appendix)."""
    scale, kappa = 1.0, 0.5
    v, null = 2.0, 0.5
    fixed = null + scale / (1 - kappa) * (v - null)
    ones = torch.ones(1, 1, 1, 1)
    vtil = TargetGuidance(scale, kappa)(
        v * ones,
        ones,
        torch.ones(1),
        conditional=lambda z, r, t: fixed * torch.ones_like(z),
        unconditional=lambda z, r, t: null * torch.ones_like(z),
        dropped=torch.tensor([False]),
    )
    assert vtil.item() == pytest.approx(fixed)


@pytest.mark.parametrize("settings", [{"kappa": 1.0}, {"interval": (0.5, 0.2)}])
def test_target_guidance_refuses_impossible_settings(settings):
    with pytest.raises(ValueError, match="TargetGuidance"):
        TargetGuidance(**settings)


def test_samples_that_are_not_finite_are_counted():
    def net(z, r, t, *_):
        return torch.where(torch.arange(len(z)).view(-1, 1, 1, 1) == 2, torch.nan, z)

    with pytest.warns(UserWarning, match="1 of 4 samples are not finite"):
        sample(net, noise(4))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_guidance_scale_that_is_no_number_is_refused(scale: float):
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        sample(lambda z, r, t, *_: z, noise(2), guidance_scale=scale)


def test_a_sampler_with_fresh_noise_takes_any_number_of_steps() -> None:
    steps = []

    def flow(z, r, t):
        steps.append(t)
        return z

    sample(flow, torch.randn(1, 2), steps=300, sampler=MultistepSampler())
    assert len(steps) == 300


def test_every_step_of_a_sampler_with_fresh_noise_has_noise_of_its_own():
    seen = []

    def to_zero(z, r, t):
        seen.append(z / t.view(-1, 1, 1, 1))
        return seen[-1]

    MultistepSampler()(to_zero, torch.randn(2, 1, 4, 4), 4)
    assert len(seen) == 4
    assert all(not torch.allclose(one, other, atol=0.1) for k, one in enumerate(seen) for other in seen[:k])


def test_a_sampler_that_starts_below_one_shares_its_start_into_equal_steps():
    times = []
    MultistepSampler(start=0.8)(lambda z, r, t: times.append(float(t[0])) or z, torch.zeros(1, 1, 2, 2), 4)
    assert times == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_guidance_ends_with_its_interval_both_ends_included():
    u = guided(lambda z, r, t: 2 * z, lambda z, r, t: z, 3.0, (0.3, 0.7))
    t = torch.tensor([0.2, 0.3, 0.5, 0.7, 0.8])
    assert u(torch.ones(5, 1), torch.zeros(5), t).flatten().tolist() == [2.0, 4.0, 4.0, 4.0, 2.0]
