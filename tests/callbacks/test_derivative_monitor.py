from __future__ import annotations

import time

import pytest
import torch
from lightning.pytorch import Callback

from emf_lightning.callbacks import DerivativeMonitor
from emf_lightning.flow.derivative.forward_mode import ForwardMode, Fused
from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.times import Schedule, UniformTimes
from emf_lightning.modules.flow_map import FlowMapModule
from tests.callbacks import tiny

EDGES = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


def meanflow(derivative=None, share: float = 0.75) -> FlowMapModule:
    return tiny.meanflow(derivative=derivative, times=UniformTimes(Schedule(1 - share)))


class Keeper(Callback):
    """The terms of every batch."""

    def __init__(self) -> None:
        self.terms: list[FlowMapTerms] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.terms.append(pl_module.last_terms)


def fit(shards, run, model, *callbacks, **arguments):
    torch.manual_seed(5)
    tiny.trainer(run, *callbacks, **arguments).fit(model, datamodule=tiny.data(shards))
    return tiny.events(run)


def last(found, tag: str) -> float:
    return found.Scalars(f"train/{tag}")[-1].value


def test_bins_are_means_over_the_rows_since_the_last_logging_step(shards, tmp_path):
    keeper = Keeper()
    found = fit(shards, tmp_path / "run", meanflow(), DerivativeMonitor(EDGES), keeper, log_every_n_steps=2)
    assert [event.step for event in found.Scalars("train/mse_by_length/0-0.5")] == [1, 3]

    rows = {"mse": [], "derivative": [], "cosine": []}
    for terms in keeper.terms[2:]:
        assert not terms.loss.requires_grad
        for row in range(terms.times.n_interval):
            long = bool(terms.times.t[row] - terms.times.r[row] > 0.5)
            rows["mse"].append((long, float(terms.squared_error[row])))
            rows["derivative"].append((long, float(terms.derivative_norm[row])))
            rows["cosine"].append((long, float(terms.cosine[row])))
    for label, wanted in (("0-0.5", False), ("0.5-1", True)):
        for name, power in (("mse", 1), ("derivative", 2), ("cosine", 1)):
            values = [value**power for long, value in rows[name] if long == wanted]
            expected = (sum(values) / len(values)) ** (1 / power)
            assert last(found, f"{name}_by_length/{label}") == pytest.approx(expected, rel=1e-4), (name, label)
        assert last(found, f"nan_rows_by_length/{label}") == 0
    cosines = [float(c) for terms in keeper.terms[2:] for c in terms.cosine[terms.times.n_interval :]]
    assert last(found, "cosine_r_equals_t") == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)


class LongRowsFail(MeanFlow):
    """Rows with t - r > .5 are not finite."""

    def terms(self, u, z, v, times, *rest):
        v = v.clone()
        v[times.t - times.r > 0.5] = float("nan")
        return super().terms(u, z, v, times, *rest)


def test_rows_that_are_not_finite_are_counted_where_they_are_and_spoil_no_mean(shards, tmp_path):
    objective = LongRowsFail(times=UniformTimes(Schedule(0.25)))
    model = FlowMapModule(tiny.network(), objective, nan_patience=99)
    found = fit(shards, tmp_path / "run", model, DerivativeMonitor(EDGES), log_every_n_steps=4)
    assert last(found, "nan_rows_by_length/0.5-1") > 0
    assert last(found, "nan_rows_by_length/0-0.5") == 0
    assert last(found, "mse_by_length/0-0.5") > 0
    assert "train/mse_by_length/0.5-1" not in found.Tags()["scalars"]


class Slow(ForwardMode):
    def jvp(self, *arguments):
        clock.now += 3.0
        return super().jvp(*arguments)


class Paced(Callback):
    def on_train_batch_start(self, *_):
        clock.now += 1.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


def test_share_of_the_derivative_is_its_time_over_the_batchs(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", clock)
    model = meanflow(Slow())
    monitor = DerivativeMonitor(EDGES, time_every_n_steps=2)
    tiny_run = tmp_path / "run"
    torch.manual_seed(5)
    tiny.trainer(tiny_run, monitor, Paced(), log_every_n_steps=2).fit(model, datamodule=tiny.data(shards))
    monkeypatch.undo()
    assert [e.value for e in tiny.events(tiny_run).Scalars("train/derivative_share")] == pytest.approx([0.75, 0.75])
    assert type(model.objective.derivative.timer).__name__ == "nullcontext", "the clock was left running"


def test_a_fused_derivative_has_no_time_of_its_own(shards, tmp_path):
    found = fit(shards, tmp_path / "run", meanflow(Fused()), DerivativeMonitor(time_every_n_steps=1))
    assert "train/derivative_share" not in found.Tags()["scalars"]
    assert any(tag.startswith("train/derivative_by_length/") for tag in found.Tags()["scalars"])


def test_flow_matching_has_only_its_cosine(shards, tmp_path):
    found = fit(shards, tmp_path / "run", tiny.flow_matching(), DerivativeMonitor())
    assert last(found, "cosine_r_equals_t") != 0
    assert not [tag for tag in found.Tags()["scalars"] if "by_length" in tag]


def test_training_is_the_same_with_and_without_it(shards, tmp_path):
    without, watched = meanflow(), meanflow()
    fit(shards, tmp_path / "without", without)
    fit(shards, tmp_path / "with", watched, DerivativeMonitor(time_every_n_steps=1))
    for name, weight in without.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name


def test_rows_of_two_ranks_are_counted_together(shards, tmp_path):
    found = fit(
        shards,
        tmp_path / "run",
        FlowMapModule(tiny.network(), LongRowsFail(times=UniformTimes(Schedule(0.0))), nan_patience=99),
        DerivativeMonitor((0.0, 1.0)),
        Sum(),
        devices=2,
        strategy="ddp_fork",
        max_steps=2,
        log_every_n_steps=2,
    )
    assert last(found, "nan_rows_by_length/0-1") == last(found, "bad_rows_of_all_ranks")


class Sum(Callback):
    """What the monitor should count, by other means."""

    bad = 0.0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.bad += float((~pl_module.last_terms.finite).sum())
        total = trainer.strategy.reduce(torch.tensor(self.bad), reduce_op="sum")
        pl_module.log("train/bad_rows_of_all_ranks", total)


def test_its_charts_have_a_curve_for_each_bin(shards, tmp_path):
    from tensorboard.plugins.custom_scalar import layout_pb2

    found = fit(shards, tmp_path / "run", meanflow(), DerivativeMonitor(EDGES), max_steps=1)
    (written,) = found.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0]).category
    assert category.title == "by the interval's length t - r"
    assert list(category.chart[0].multiline.tag) == ["^train/mse_by_length/0-0.5$", "^train/mse_by_length/0.5-1$"]


@pytest.mark.parametrize("edges", [(0.0, 0.5), (0.2, 1.0), (0.0, 0.6, 0.4, 1.0), (0.0,)])
def test_edges_that_do_not_cover_all_lengths_are_refused(edges):
    with pytest.raises(ValueError, match="edges must rise from 0 to 1"):
        DerivativeMonitor(edges)
