"""Conditioning is explicit: a part of a batch gets the conditioning of its own samples, or an error says the remedy."""

from __future__ import annotations

import pytest
import torch

from emf_lightning.flow.objectives.alpha_flow import AlphaFlow, AlphaSchedule
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.split_meanflow import SplitMeanFlow
from emf_lightning.flow.times import Schedule, Times, UniformTimes
from emf_lightning.flow.velocity import AverageVelocity, expand_context, slice_velocity
from emf_lightning.flow.weighting import UniformWeighting

BATCH = 8
HALF = UniformTimes(Schedule(0.5))
MEANS = torch.arange(float(BATCH))
OBJECTIVES = [MeanFlow(times=HALF), AlphaFlow(AlphaSchedule(gamma=1.0), times=HALF), SplitMeanFlow(times=HALF)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
@pytest.mark.parametrize("kind", ["tensor", "tuple", "dictionary"])
def test_every_pass_sees_the_conditioning_of_its_own_samples(objective, kind):
    x = MEANS.double().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)  # double: e divides the rounding of z by t
    seen = []

    def net(z, r, t, mean, other=None):
        seen.append(len(z))
        assert len(mean) == len(z)
        # e = (z - (1 - t) x) / t has the data's mean only with the sample's own conditioning
        e = (z - (1 - t).view(-1, 1, 1, 1) * mean.view(-1, 1, 1, 1)) / t.view(-1, 1, 1, 1)
        return e - mean.view(-1, 1, 1, 1)

    context = {"tensor": MEANS, "tuple": (MEANS, MEANS), "dictionary": {"mean": MEANS, "other": MEANS}}[kind]
    terms = objective(net, x, context, progress=0.5)
    assert terms.squared_error.max() < 1e-8, "straight paths: the velocity is the average velocity"
    assert {BATCH // 2, BATCH} & set(seen)


def test_a_closure_over_the_conditioning_is_refused_with_the_remedy():
    z, t = torch.randn(BATCH, 1), torch.rand(BATCH) + 0.1
    times = Times(torch.cat([t[:3] / 2, t[3:]]), t, n_interval=3)
    with pytest.raises(TypeError, match=r"AverageVelocity\(net, context\) instead of a closure"):
        MeanFlow().terms(lambda z, r, t: z * MEANS[:, None], z, z, times, UniformWeighting(), 0.0)
    with pytest.raises(TypeError, match="AverageVelocity"):
        MeanFlow().terms(lambda z, r, t: z * MEANS[: len(z), None], z, z, times, UniformWeighting(), 0.0)


def test_a_closure_is_evaluated_on_the_whole_batch():
    def u(z, r, t):
        return z

    assert slice_velocity(u, slice(BATCH), BATCH) is u
    assert slice_velocity(u, slice(0, None), BATCH) is u


@pytest.mark.parametrize("context", [MEANS[:5], (MEANS, MEANS[:1]), {"a": torch.tensor(1.0)}])
def test_conditioning_of_another_number_of_samples_is_refused(context):
    with pytest.raises(ValueError, match="for a batch of 8 samples: the first dimension"):
        FlowMatching()(lambda z, r, t, *a, **k: z, torch.randn(BATCH, 1), context)


def test_conditioning_that_cannot_be_sliced_is_refused():
    with pytest.raises(TypeError, match="context must be a tensor, a tuple or dictionary"):
        AverageVelocity(lambda z, r, t, c: z, "a red circle")(torch.zeros(1, 1), torch.zeros(1), torch.ones(1))


def test_conditioning_of_one_sample_is_repeated_without_a_copy():
    one, many = torch.randn(1, 3), torch.randn(4, 2)
    context = expand_context({"one": one, "many": many}, 4)
    assert context["one"].shape == (4, 3)
    assert context["one"].data_ptr() == one.data_ptr()
    assert context["many"] is many
