"""FGM as Lightning runs it; its mathematics is in tests/flow/test_matching.py."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from emf_lightning.callbacks import TrainingLog
from emf_lightning.flow.objectives.distribution_matching import AlphaMatching, ExactMatching
from emf_lightning.flow.objectives.flow_generator_matching import FlowGeneratorMatching
from emf_lightning.flow.sampling import MultistepSampler
from emf_lightning.flow.times import LogitNormalTimes, Schedule, Times, UniformTimes
from emf_lightning.modules.alternating import Alternation
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.optimization import Optimization, WarmupCosine
from emf_lightning.networks.unet import UNetArchitecture, UNetFlowMap
from tests.callbacks import tiny
from tests.modules.conftest import Batches
from tests.modules.test_modules import spoil, trainer

ALWAYS = LogitNormalTimes(flow_matching_ratio=Schedule(1.0))


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.999))


def weights(module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Watch(Callback):
    """Who has gradients, and how large, when an optimiser steps; and the learning rates after each batch."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.norms: list[float] = []
        self.rates: list[tuple[float, ...]] = []
        self.others: list[bool] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        networks = {"net": module.net, "online_flow": module.online_flow}
        active = "net" if optimizer is trainer.optimizers[0] else "online_flow"
        self.steps.append(active)
        self.others.append(
            any(p.grad is not None for name, n in networks.items() if name != active for p in n.parameters())
        )
        self.norms.append(float(torch.nn.utils.get_total_norm(p.grad for p in networks[active].parameters())))

    def on_train_batch_end(self, trainer, module, *rest):
        self.rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("settings", [{}, {"steps": 3, "loss": ExactMatching(), "teacher_guidance_scale": 2.0}])
def test_both_networks_learn_and_the_teacher_stays_bit_for_bit(tmp_path, net, loader, precision, settings):
    start = weights(net)
    objective = FlowGeneratorMatching(times=ALWAYS, generator_time=0.7, **settings)
    model = FGM(net, objective, optimization=Optimization(adam))
    fit = trainer(tmp_path, precision=precision)
    fit.fit(model, loader)
    for network in (model.net, model.online_flow):
        still = [name for name, value in network.state_dict().items() if torch.equal(value, start[name])]
        assert all(".interval." in name for name in still), "a flow knows no intervals, and a bias cancels"
    assert same(weights(model.teacher.net), start)
    assert all(p.grad is None for p in model.teacher.net.parameters())
    logged = fit.callback_metrics
    assert logged["train/velocity_gap"] > 0
    assert logged["train/online_flow_mse"] > 0
    assert logged["train/nan_rows"] == 0
    fit.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"net", "online_flow"}


def test_steps_are_the_generators_and_the_online_flow_has_its_own_count(tmp_path, net, loader):
    watch = Watch()
    model = FGM(
        net,
        FlowGeneratorMatching(times=ALWAYS),
        optimization=Optimization(adam, lambda optimizer: WarmupCosine(optimizer, total=4, warmup=2)),
        alternation=Alternation(auxiliary_updates=2),
    )
    fit = trainer(tmp_path, max_steps=4, callbacks=[watch])
    fit.fit(model, loader)
    assert (fit.global_step, model.auxiliary_steps) == (4, 8)
    assert watch.steps == ["online_flow", "online_flow", "net"] * 4
    assert not any(watch.others), "a network has gradients in its own turn alone"
    expected = [1e-3 * share for share in (2 / 3, 1, 0.51, 0.02)]
    assert [rates[0] for rates in watch.rates] == pytest.approx(expected)
    assert [rates[1] for rates in watch.rates] == pytest.approx(expected)


def test_each_networks_gradient_has_a_norm_of_its_own_in_the_log(tmp_path, net, loader):
    watch = Watch()
    fit = trainer(tmp_path, max_steps=2, callbacks=[watch, TrainingLog()])
    fit.fit(FGM(net, FlowGeneratorMatching(times=ALWAYS, generator_time=0.7), optimization=Optimization(adam)), loader)
    logged = [float(fit.callback_metrics[f"train/{name}"]) for name in ("auxiliary_gradient_norm", "gradient_norm")]
    assert logged == pytest.approx(watch.norms[-2:])  # of its first batch, Lightning forgets all but the last hook's


def test_each_network_moves_in_its_own_turn_alone(tmp_path, net, loader):
    moved = []

    class Watched(FGM):
        def _update(self, optimizer, batch, loss_of):
            before = weights(self.net), weights(self.online_flow)
            super()._update(optimizer, batch, loss_of)
            moved.append((not same(before[0], weights(self.net)), not same(before[1], weights(self.online_flow))))

    trainer(tmp_path, max_steps=1).fit(
        Watched(net, FlowGeneratorMatching(times=ALWAYS), optimization=Optimization(adam)), loader
    )
    assert moved == [(False, True), (True, False)]


def test_gradients_are_clipped_after_they_were_logged(tmp_path, net, loader):
    clipped = []

    class Watched(FGM):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            clipped.append(float(torch.nn.utils.get_total_norm([p.grad for p in optimizer.param_groups[0]["params"]])))

    watch = Watch()
    objective = FlowGeneratorMatching(times=ALWAYS, generator_time=0.7)
    alternation = Alternation(gradient_clip_val=1e-4)
    model = Watched(net, objective, optimization=Optimization(adam), alternation=alternation)
    trainer(tmp_path, max_steps=2, callbacks=[watch]).fit(model, loader)
    assert all(norm > 1.1e-4 for norm in watch.norms)
    assert clipped == pytest.approx([1e-4] * len(clipped), rel=0.02)


class RowTimes(UniformTimes):
    """The same time for every row, so that a part of a batch has those of its rows."""

    def __call__(self, rows, progress, device) -> Times:
        t = torch.full((rows,), 0.6)
        return Times(r=t, t=t, n_interval=0)


NEVER = Schedule(1.0)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_train_as_the_batch_does(tmp_path, net, loader, parts):
    found, logged = [], []
    for count in (1, parts):
        objective = FlowGeneratorMatching(times=RowTimes(NEVER), generator_time=0.7)
        alternation = Alternation(micro_batches=count)
        model = FGM(copy.deepcopy(net), objective, optimization=Optimization(sgd), alternation=alternation)
        with patch("torch.randn_like", lambda x: x.roll(1, -1)):
            (trained := trainer(tmp_path, max_steps=2)).fit(model, loader)
        found.append(weights(model))
        logged.append(trained.callback_metrics)
    for name in ("train/loss", "train/velocity_gap", "train/online_flow_mse"):
        assert logged[1][name] == pytest.approx(float(logged[0][name]), rel=1e-4), name
    assert logged[1]["train/sample_std"].isfinite()
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


def test_weights_cast_for_one_update_do_not_serve_the_next(tmp_path, net):
    """Lightning keeps one autocast context open over all updates of a step, and with it the weights cast to bf16."""
    batch = Batches(1)[0]
    objective = FlowGeneratorMatching(times=RowTimes(NEVER))
    alternation = Alternation(auxiliary_updates=3, gradient_clip_val=None)
    model = FGM(copy.deepcopy(net), objective, optimization=Optimization(sgd), alternation=alternation)
    by_hand = copy.deepcopy(model)
    with patch("torch.randn_like", lambda x: x.roll(1, -1)):
        trainer(tmp_path, max_steps=1, precision="bf16-mixed").fit(model, DataLoader([batch], batch_size=None))
        optimizer = sgd(by_hand.online_flow.parameters())
        by_hand.log = lambda *args, **kwargs: None
        by_hand.trainer = trainer(tmp_path)
        by_hand._planned_steps = 1
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = by_hand.compute_auxiliary_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert same(weights(model.online_flow), weights(by_hand.online_flow))


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    tiny.shards(tmp_path / "shards")

    def run(name: str, **resumed) -> tuple[FGM, dict]:
        model = FGM(
            tiny.network(),
            FlowGeneratorMatching(steps=2),
            optimization=Optimization(adam, lambda optimizer: WarmupCosine(optimizer, total=6, warmup=1)),
            alternation=Alternation(auxiliary_updates=2),
        )
        saver = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=3, save_top_k=-1)
        averages = EMAWeightAveraging(decay=0.5)
        fit = tiny.trainer(tmp_path / f"run-{name}", averages, saver, max_steps=6, enable_checkpointing=True)
        fit.fit(model, datamodule=tiny.data(tmp_path / "shards"), **resumed)
        return model, torch.load(tmp_path / name / "step=6.ckpt", weights_only=True)

    whole, expected = run("whole")
    resumed, found = run("resumed", ckpt_path=tmp_path / "whole/step=3.ckpt")
    assert (resumed.auxiliary_steps, whole.auxiliary_steps) == (12, 12)
    for kind in ("state_dict", "current_model_state"):
        assert same(found[kind], expected[kind])
    for one, other in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        for number, state in other["state"].items():
            assert same(one["state"][number], state)


def test_dropout_of_the_teacher_is_off_in_both_networks(tmp_path, loader):
    """Of a generator that is its teacher's and its online flow's equal, both velocities are the same."""
    architecture = UNetArchitecture([8, 8], [False, True], layers=1, groups=4, dropout=0.5)
    torch.manual_seed(0)
    model = FGM(UNetFlowMap(architecture, latent_size=8), FlowGeneratorMatching())
    trainer(tmp_path, max_steps=1, gradient_clip_val=None).fit(model, loader)
    assert model.training and model.net.training and model.online_flow.training
    parts = [part for part in model.modules() if isinstance(part, torch.nn.Dropout)]
    assert parts and not any(part.training for part in parts)
    for network in (model.net, model.online_flow):
        network.load_state_dict(model.teacher.net.state_dict())
    z, t = torch.randn(4, 3, 8, 8), torch.full((4,), 0.5)
    with torch.no_grad():
        text = torch.zeros(4, 0, 0), torch.ones(4, 0, dtype=torch.bool)
        values = [each(z, t, t, *text) for each in (model.net, model.online_flow, model.teacher)]
    assert torch.allclose(values[0], values[2], atol=1e-5)
    assert torch.allclose(values[1], values[2], atol=1e-5)


@pytest.mark.parametrize("step", range(5))
def test_a_batch_takes_the_first_jumps_of_the_grid_that_sampling_takes(step):
    """With four steps, training meets sampling's times 1, 3/4, 1/2, 1/4 and no other, each as the last one in turn."""
    times, graphs = [], []

    def net(z, r, t, context=None):
        times.append(float(t[0]))
        graphs.append(torch.is_grad_enabled())
        return 0.5 * z * scale

    scale = torch.ones((), requires_grad=True)
    FlowGeneratorMatching(steps=4)(net, torch.zeros(2, 1, 2, 2), teacher=net, online_flow=net, step=step)
    count = 1 + step % 4
    assert times[:count] == [1.0, 0.75, 0.5, 0.25][:count]
    assert graphs[:count] == [False] * (count - 1) + [True]
    sampled = []
    MultistepSampler()(lambda z, r, t: sampled.append(float(t[0])) or z, torch.zeros(1, 1, 2, 2), 4)
    assert sampled == [1.0, 0.75, 0.5, 0.25]


def test_samples_that_share_a_number_have_noise_of_their_own():
    noise = torch.randn(3, 1, 4, 4)
    noise[1, 0, 0, 1] = noise[0, 0, 0, 1]
    noise[2] = noise[0]
    seen = []
    MultistepSampler()(lambda z, r, t: seen.append(z) or z, noise, 2)
    second = seen[1] / 0.5  # x = 0 after the first jump
    assert not torch.equal(second[0], second[1])
    assert torch.equal(second[0], second[2])


def test_few_steps_are_sampled_with_noise_of_the_row_alone(net):
    model = FGM(net, FlowGeneratorMatching(steps=4, generator_time=0.7))
    batch = Batches(1)[0]
    noise = torch.randn(8, 3, 8, 8)
    whole = model.sample_latents(batch.text, batch.null, noise, 3)
    part = model.sample_latents(batch.text[2:5], batch.null, noise[2:5], 3)
    assert torch.allclose(whole[2:5], part, atol=1e-6)
    assert model.nfe(3) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_clip_val": 1.0}, "model.init_args.alternation.gradient_clip_val to 1.0"),
        ({"accumulate_grad_batches": 2}, "model.init_args.alternation.micro_batches to 2"),
    ],
)
def test_what_lightning_does_for_one_optimiser_is_refused_with_the_remedy(tmp_path, net, loader, settings, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, **settings).fit(FGM(net, optimization=Optimization(adam)), loader)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((FlowGeneratorMatching, {"steps": 0}), "steps must be at least 1"),
        ((FlowGeneratorMatching, {"generator_time": 0.0}), "generator_time must lie in"),
        ((Alternation, {"auxiliary_updates": 0}), "auxiliary_updates must be at least 1"),
        ((Alternation, {"micro_batches": 0}), "micro_batches must be at least 1"),
        ((FlowGeneratorMatching, {"times": LogitNormalTimes()}), "flow_matching_ratio of its times to 1"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    kind, arguments = settings
    with pytest.raises(ValueError, match=said):
        kind(**arguments)


def test_training_stops_where_rows_stay_bad(tmp_path, net, loader):
    torch.nn.init.constant_(net.transformer.proj_out.bias, float("nan"))
    model = FGM(net, FlowGeneratorMatching(loss=AlphaMatching(1.0)), optimization=Optimization(adam))
    model._non_finite.patience = 2
    with pytest.raises(ValueError, match="not finite, 2 batches in a row"):
        trainer(tmp_path).fit(model, loader)


def test_parts_of_one_sample_show_no_deviation(tmp_path, net, loader):
    objective = FlowGeneratorMatching(times=ALWAYS, generator_time=0.7)
    model = FGM(net, objective, optimization=Optimization(adam), alternation=Alternation(micro_batches=8))
    (trained := trainer(tmp_path, max_steps=1)).fit(model, loader)
    assert trained.callback_metrics["train/online_flow_mse"].isfinite()
    assert "train/sample_std" not in trained.callback_metrics


@pytest.mark.parametrize("name", ["net", "online_flow"])
def test_a_step_of_either_network_whose_gradient_is_not_finite_is_left_out(tmp_path, net, loader, name):
    model = FGM(net, FlowGeneratorMatching(times=ALWAYS), optimization=Optimization(sgd))
    model._non_finite.patience = 2
    spoil(getattr(model, name).transformer.proj_out.weight, {1, 3})
    trainer(tmp_path, max_steps=6).fit(model, loader)
    assert all(weight.isfinite().all() for weight in (*model.net.parameters(), *model.online_flow.parameters()))
    spoil(getattr(model, name).transformer.proj_out.weight, {0, 1})
    with pytest.raises(ValueError, match="2 batches in a row"):
        trainer(tmp_path, max_steps=6).fit(model, loader)
