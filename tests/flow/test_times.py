from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from emf_lightning.flow.objectives.improved_meanflow import ImprovedMeanFlow
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.times import AnyStepTimes, LogitNormalTimes, Schedule, UniformTimes

CPU = torch.device("cpu")
EMF = LogitNormalTimes(Schedule(-0.5, 0.5), Schedule(1.0, 2.0), Schedule(0.75, 0.25))


@pytest.mark.parametrize("sampler", [EMF, UniformTimes(Schedule(0.5))])
def test_interval_rows_come_first_and_the_rest_have_r_equal_t(sampler):
    torch.manual_seed(0)
    times = sampler(1000, 0.5, CPU)
    assert times.n_interval == 500
    assert (times.r[:500] < times.t[:500]).all()
    assert torch.equal(times.r[500:], times.t[500:])
    assert times.t.dtype == torch.float32
    assert 0 < times.r.min() and times.t.max() < 1


def test_ratio_and_distribution_follow_progress():
    torch.manual_seed(0)
    early, late = EMF(40_000, 0.0, CPU), EMF(40_000, 1.0, CPU)
    assert (early.n_interval, late.n_interval) == (10_000, 30_000)
    for times, mu, sigma in ((early, -0.5, 1.0), (late, 0.5, 2.0)):
        logits = torch.logit(times.t[times.n_interval :].double())
        assert abs(logits.mean() - mu) < 0.05
        assert abs(logits.std() - sigma) < 0.05


def test_r_may_have_its_own_distribution():
    torch.manual_seed(0)
    times = LogitNormalTimes(Schedule(0.0), Schedule(0.1), Schedule(0.0), Schedule(-4.0), Schedule(0.1))(1000, 0.0, CPU)
    assert abs(torch.logit(times.r).mean() + 4) < 0.05
    assert abs(torch.logit(times.t).mean()) < 0.05


def test_ratio_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="flow_matching_ratio"):
        UniformTimes(Schedule(0.5, 1.5))


@pytest.mark.parametrize("sampler", [UniformTimes, LogitNormalTimes])
def test_some_intervals_end_at_the_data(sampler):
    torch.manual_seed(0)
    times = sampler(flow_matching_ratio=Schedule(0.5), consistency_ratio=0.1)(1000, 0.5, CPU)
    assert times.n_interval == 500
    assert (times.r[:100] == 0).all()
    assert (times.r[100:] > 0).all()
    assert (times.t > 0).all()
    torch.manual_seed(0)
    without = sampler(flow_matching_ratio=Schedule(0.5))(1000, 0.5, CPU)
    assert torch.equal(times.t, without.t)
    assert torch.equal(times.r[100:], without.r[100:])


@pytest.mark.parametrize("ratio", [Schedule(0.95), Schedule(0.5, 0.95)])
def test_more_rows_at_zero_than_intervals_are_refused(ratio):
    with pytest.raises(ValueError, match="consistency_ratio must lie"):
        UniformTimes(ratio, consistency_ratio=0.1)


@pytest.mark.parametrize("sampler", [EMF, UniformTimes(Schedule(0.5))])
def test_times_are_fp32_where_another_dtype_is_the_default(sampler):
    """Lightning's bf16-true makes it so."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        times = sampler(8, 0.5, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert times.t.dtype == times.r.dtype == torch.float32


def test_any_step_times_have_one_step_any_interval_and_none():
    torch.manual_seed(0)
    sampler = AnyStepTimes(0.25, Schedule(0.5))
    times = sampler(40_000, 0.5, CPU)
    one = sampler.one_step(40_000)
    assert (one, times.n_interval) == (10_000, 20_000)
    assert (times.t[:one] == 1).all() and (times.r[:one] == 0).all()
    t, r = times.t[one : times.n_interval], times.r[one : times.n_interval]
    assert (r < t).all()
    assert abs(t.mean() - 1 / 2) < 0.01 and abs(t.std() - 12**-0.5) < 0.01
    assert abs((r / t).mean() - 1 / 2) < 0.01 and abs((r / t).std() - 12**-0.5) < 0.01
    assert torch.equal(times.r[times.n_interval :], times.t[times.n_interval :])
    assert abs(times.t[times.n_interval :].mean() - 1 / 2) < 0.01


@pytest.mark.parametrize("batch", range(1, 20))
def test_any_step_times_of_one_step_are_intervals_at_any_batch(batch):
    sampler = AnyStepTimes()
    assert sampler.one_step(batch) <= sampler(batch, 0.0, CPU).n_interval


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("batch", range(1, 33))
def test_shares_that_make_up_the_whole_are_taken_and_kept_apart(share, batch):
    times = LogitNormalTimes(flow_matching_ratio=Schedule(1 - share), consistency_ratio=share)(batch, 0.0, CPU)
    assert (times.r[times.n_interval :] == times.t[times.n_interval :]).all()
    any_step = AnyStepTimes(share, Schedule(1 - share))
    times = any_step(batch, 0.0, CPU)
    assert any_step.one_step(batch) <= times.n_interval
    assert (times.t[times.n_interval :] < 1).all()


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_batches_too_small_for_both_kinds_of_samples_have_them_in_turn(batch, ratio):
    sampler = LogitNormalTimes(flow_matching_ratio=Schedule(ratio))
    counts = [sampler(batch, step / 4000, CPU).n_interval for step in range(4000)]
    wanted = (1 - ratio) * batch
    if round(wanted) in (0, batch):
        assert np.mean(counts) == pytest.approx(wanted, abs=0.04)
        assert set(counts) == {math.floor(wanted), math.floor(wanted) + 1}
    else:
        assert set(counts) == {round(wanted)}


def test_samples_with_r_equal_0_come_in_turn_as_well():
    sampler = LogitNormalTimes(flow_matching_ratio=Schedule(0.25), consistency_ratio=0.1)
    zeros = [int((sampler(4, step / 4000, CPU).r == 0).sum()) for step in range(4000)]
    assert set(zeros) == {0, 1}
    assert np.mean(zeros) == pytest.approx(0.4, abs=0.04)


def test_a_schedule_is_followed_by_batches_of_one():
    sampler = LogitNormalTimes(flow_matching_ratio=Schedule(0.75, 0.25))
    counts = np.array([sampler(1, step / 8000, CPU).n_interval for step in range(8000)]).reshape(4, 2000).mean(1)
    assert counts == pytest.approx([0.3125, 0.4375, 0.5625, 0.6875], abs=0.04)
    assert all(LogitNormalTimes(flow_matching_ratio=Schedule(1.0))(1, k / 9, CPU).n_interval == 0 for k in range(10))
    assert all(LogitNormalTimes(flow_matching_ratio=Schedule(0.0))(1, k / 9, CPU).n_interval == 1 for k in range(10))


def test_r_has_its_own_spread():
    torch.manual_seed(0)
    times = LogitNormalTimes(Schedule(0.0), Schedule(0.1), Schedule(0.0), Schedule(-4.0), Schedule(0.5))(4000, 0.0, CPU)
    assert abs(torch.logit(times.r).std() - 0.5) < 0.05
    assert abs(torch.logit(times.t).std() - 0.1) < 0.01


@pytest.mark.parametrize("objective", [MeanFlow(), ImprovedMeanFlow()])
def test_by_default_r_equals_t_samples_take_the_larger_of_two_numbers_as_the_paper_does(objective):
    torch.manual_seed(0)
    times = objective.times(40_000, 0.0, CPU)
    logits = torch.logit(times.t[times.n_interval :].double())
    assert abs(logits.mean() - (-0.4 + torch.pi**-0.5)) < 0.03  # the mean of the larger of two unit normals
