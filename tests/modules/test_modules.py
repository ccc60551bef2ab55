from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from emf_lightning.flow.derivative.forward_mode import Fused
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.target_velocity import SelfVelocity, TeacherVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.optimization import Optimization, WarmupCosine
from emf_lightning.text.words import WordEncoder
from tests.callbacks import tiny


def trainer(tmp_path, **kwargs) -> Trainer:
    settings = {
        "max_steps": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return Trainer(**(settings | kwargs))


def optimizer(params):
    return torch.optim.AdamW(params, lr=1e-3)


ADAMW = Optimization(optimizer)


@pytest.mark.parametrize("objective", [FlowMatching, MeanFlow])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_moves_the_weights_and_logs_raw_errors(tmp_path, net, loader, objective, precision):
    before = copy.deepcopy(net.state_dict())
    model = FlowMapModule(net, objective(), optimization=ADAMW)
    fit = trainer(tmp_path, precision=precision)
    fit.fit(model, loader)
    assert any(not torch.equal(before[name], value) for name, value in net.state_dict().items())
    logged = fit.callback_metrics
    assert logged["train/mse_r_equals_t"] > 0
    if objective is MeanFlow:
        assert logged["train/mse_r_below_t"] > 0
        assert logged["train/derivative_norm"] > 0
        assert logged["train/nan_rows"] == 0


def test_progress_counts_optimiser_steps_not_batches(tmp_path, net, loader):
    seen, of_batches = [], []

    class Watched(FlowMapModule):
        def compute_loss(self, batch):
            seen.append(self.progress)
            of_batches.append(self.progress_of_batch)
            return super().compute_loss(batch)

    trainer(tmp_path, max_steps=3, accumulate_grad_batches=2).fit(Watched(net, optimization=ADAMW), loader)
    assert seen == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert of_batches == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6])


def test_target_guidance_changes_the_objective(tmp_path, net, loader):
    batch = next(iter(loader))
    losses = []
    for guidance in (None, TargetGuidance(scale=2.0, kappa=0.3)):
        model = FlowMapModule(copy.deepcopy(net), MeanFlow(guidance=guidance), caption_dropout=0.0)
        model.trainer = trainer(tmp_path)
        model._planned_steps = 6
        model.log = lambda *args, **kwargs: None
        torch.manual_seed(0)
        losses.append(model.compute_loss(batch).item())
    assert losses[0] != losses[1]


def test_teacher_is_the_network_at_the_start_and_never_saved(tmp_path, net, loader):
    before = copy.deepcopy(net.state_dict())
    objective = MeanFlow(velocity=TeacherVelocity(), guidance=TargetGuidance(scale=2.0))
    model = FlowMapModule(net, objective, optimization=ADAMW)
    fit = trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)])
    fit.fit(model, loader)
    assert any(not torch.equal(before[name], value) for name, value in net.state_dict().items())
    for name, value in objective.velocity.teacher.net.state_dict().items():
        assert torch.equal(value, before[name]), name
    fit.save_checkpoint(tmp_path / "run.ckpt")
    assert set(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]) == {f"net.{name}" for name in before}


@pytest.mark.parametrize("velocity", [SelfVelocity, TeacherVelocity])
def test_velocity_of_a_network_takes_the_place_of_the_conditional_one(net, loader, monkeypatch, velocity):
    batch = next(iter(loader))
    seen = {}

    class Spy(MeanFlow):
        def terms(self, u, z, v, times, *rest):
            seen.update(z=z, v=v, t=times.t, u=u)
            return super().terms(u, z, v, times, *rest)

    model = FlowMapModule(net, Spy(velocity=velocity()), caption_dropout=0.0)
    monkeypatch.setattr(FlowMapModule, "progress", 0.0)
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    with torch.no_grad():
        net.transformer.proj_out.bias += 1.0
    model.compute_loss(batch)
    own = seen["u"](seen["z"], seen["t"], seen["t"])
    assert not seen["v"].requires_grad
    assert torch.equal(seen["v"], own) == (velocity is SelfVelocity)


def test_a_teacher_that_nobody_gave_is_asked_for(net, loader):
    batch = next(iter(loader))
    with pytest.raises(ValueError, match="TeacherVelocity has no teacher"):
        MeanFlow(velocity=TeacherVelocity())(net, batch.latents, (batch.text.context, batch.text.mask))


def test_caption_dropout_makes_rows_null(net, loader):
    batch = next(iter(loader))
    text, dropped = FlowMapModule(net, caption_dropout=0.5).drop_captions(batch)
    assert dropped.any() and not dropped.all()
    for row in range(len(batch)):
        expected = batch.null if dropped[row] else batch.text[row : row + 1]
        assert torch.equal(text.context[row], expected.context[0])
        assert torch.equal(text.mask[row], expected.mask[0])


def test_flow_matching_starts_meanflow_from_its_checkpoint(tmp_path, net, loader):
    fit = trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)])
    parent = FlowMapModule(net, FlowMatching(), optimization=ADAMW)
    fit.fit(parent, loader)
    fit.save_checkpoint(tmp_path / "parent.ckpt")
    child = copy.deepcopy(net)
    torch.nn.init.normal_(child.transformer.proj_out.weight)
    model = FlowMapModule(child, init_from=str(tmp_path / "parent.ckpt"))
    averaged = torch.load(tmp_path / "parent.ckpt", weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged[name]), name


def test_checkpoint_of_another_configuration_is_refused(tmp_path, net, loader):
    torch.save({"state_dict": {"net.transformer.proj_out.weight": torch.zeros(2, 2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="another configuration"):
        FlowMapModule(net, init_from=str(tmp_path / "other.ckpt"))
    with pytest.raises(ValueError, match="no checkpoint at"):
        FlowMapModule(net, init_from=str(tmp_path / "none.ckpt"))


def test_weights_that_mean_something_else_are_refused(tmp_path, net, loader):
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(FlowMapModule(net, FlowMatching(), optimization=ADAMW), loader)
    fit.save_checkpoint(tmp_path / "parent.ckpt")
    other = copy.deepcopy(net)
    other.time_scale = 1.0

    class Descendant(FlowMapModule):
        pass

    for model, named in (
        (
            FlowMapModule(net, MeanFlow(), optimization=ADAMW),
            "its objective is FlowMatching, not MeanFlow",
        ),
        (FlowMapModule(other, FlowMatching(), optimization=ADAMW), "its time_scale is 10.0, not 1.0"),
        (
            FlowMapModule(net, FlowMatching(), optimization=Optimization(torch.optim.SGD)),
            "its optimizer is AdamW, not SGD",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            trainer(tmp_path).fit(model, loader, ckpt_path=tmp_path / "parent.ckpt")
    with pytest.raises(ValueError, match=r"init_from: .*its time_scale is 10\.0, not 1\.0"):
        FlowMapModule(other, init_from=str(tmp_path / "parent.ckpt"))
    model = Descendant(net, FlowMatching(), optimization=ADAMW)
    trainer(tmp_path, max_steps=2).fit(model, loader, ckpt_path=tmp_path / "parent.ckpt")


def test_unbounded_training_is_refused(tmp_path, net):
    from torch.utils.data import IterableDataset

    from tests.modules.conftest import Batches

    class Stream(IterableDataset):
        def __iter__(self):
            yield from (Batches(2)[i] for i in range(2))

    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path, max_steps=-1, max_epochs=2).fit(
            FlowMapModule(net, optimization=ADAMW),
            torch.utils.data.DataLoader(Stream(), batch_size=None),
        )


@pytest.mark.parametrize(
    ("precision", "said"), [("bf16-true", "set bf16-mixed"), ("16-true", "set bf16-mixed"), ("64-true", "set 32-true")]
)
def test_precisions_that_cannot_train_are_refused(tmp_path, net, loader, precision, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, precision=precision).fit(FlowMapModule(net, optimization=ADAMW), loader)


def test_flow_matching_refuses_interval_rows(net):
    with pytest.raises(ValueError, match="r < t"):
        FlowMatching(times=LogitNormalTimes(flow_matching_ratio=Schedule(0.75)))


def test_guidance_doubles_the_evaluations(net):
    model = FlowMapModule(net, guidance_scale=2.0)
    assert (model.nfe(4), model.nfe(4, guidance_scale=1.0)) == (8, 4)
    calls = []
    net.register_forward_hook(lambda *args: calls.append(1))
    encoder = WordEncoder(width=16, length=4)
    model.sample_latents(encoder(["a red circle"]), encoder([""]), torch.randn(1, 3, 8, 8), steps=2)
    assert len(calls) == 4


def test_meanflow_stops_when_most_rows_are_not_finite(tmp_path, net, loader):
    torch.nn.init.constant_(net.transformer.proj_out.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite, 3 batches in a row: lower the learning rate"):
        trainer(tmp_path).fit(FlowMapModule(net, optimization=ADAMW, nan_patience=3), loader)


class Hiccup(MeanFlow):
    """No finite row in two batches of four."""

    calls = 0

    def terms(self, u, z, v, *rest):
        self.calls += 1
        return super().terms(u, z, v * float("nan") if self.calls % 4 > 1 else v, *rest)


def test_meanflow_goes_on_when_bad_batches_pass(tmp_path, net, loader):
    model = FlowMapModule(net, Hiccup(), optimization=ADAMW, nan_patience=3)
    fit = trainer(tmp_path, max_steps=6)
    fit.fit(model, loader)
    assert fit.global_step == 6
    assert fit.callback_metrics["train/nan_rows"] == 8
    assert all(p.isfinite().all() for p in net.parameters())


class Failing(MeanFlow):
    """No finite row from the second batch on."""

    calls = 0

    def terms(self, u, z, v, *rest):
        self.calls += 1
        return super().terms(u, z, v * float("nan") if self.calls > 1 else v, *rest)


@pytest.mark.parametrize(("patience", "stops_at"), [(2, 3), (3, 4)])
def test_bad_batches_are_counted_also_where_nobody_looks(tmp_path, net, loader, patience, stops_at):
    """The bad step 2 is counted on the device; the count is asked for at step 3, and at each step from there on."""
    model = FlowMapModule(net, Failing(), optimization=ADAMW, nan_patience=patience)
    with pytest.raises(ValueError, match=f"at step {stops_at} .* {patience} batches in a row"):
        trainer(tmp_path, log_every_n_steps=3).fit(model, loader)


def spoil(weight, steps):
    """Makes the gradient of a weight not finite at some of its steps, counted from 0."""
    seen = iter(range(10**6))
    weight.register_hook(lambda gradient: gradient * float("inf" if next(seen) in steps else 1))


def test_a_step_whose_gradient_is_not_finite_changes_no_weights(tmp_path, net, loader):
    other = copy.deepcopy(net)
    for network, spoiled, steps in ((net, {2}, 3), (other, (), 2)):
        spoil(network.transformer.proj_out.weight, spoiled)
        sgd = Optimization(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        fit = trainer(tmp_path, max_steps=steps, gradient_clip_val=1.0)
        fit.fit(FlowMapModule(network, MeanFlow(), optimization=sgd), loader)
        assert fit.global_step == steps
    for (name, weight), twin in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, twin), name


@pytest.mark.parametrize(("spoiled", "patience", "stops_at"), [((1, 2), 2, 3), ((1, 3, 4, 5), 3, 6)])
def test_training_stops_where_the_gradient_stays_not_finite(tmp_path, net, loader, spoiled, patience, stops_at):
    spoil(net.transformer.proj_out.weight, spoiled)
    with pytest.raises(ValueError, match=f"at step {stops_at} .* or their gradient, are not finite, {patience} batch"):
        trainer(tmp_path, max_steps=9).fit(FlowMapModule(net, optimization=ADAMW, nan_patience=patience), loader)
    assert all(weight.isfinite().all() for weight in net.parameters())


def test_schedule_warms_up_and_ends_at_its_final_share():
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=2.0)
    schedule = WarmupCosine(sgd, total=100, warmup=10, final=0.1)
    rates = []
    for _ in range(100):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert rates[0] == pytest.approx(2.0 / 11)
    assert max(rates) == pytest.approx(2.0)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="max_steps"):
        WarmupCosine(sgd, total=-1)


def test_the_fused_derivative_and_gradient_checkpointing_are_refused_together(net):
    net.gradient_checkpointing = True
    with pytest.raises(ValueError, match="take ForwardMode, or set net"):
        FlowMapModule(net, MeanFlow(derivative=Fused()))


def test_a_network_that_ignores_r_is_refused_when_the_module_is_built():
    from emf_lightning.networks.unet import UNetArchitecture, UNetFlowMap

    unet = UNetFlowMap(UNetArchitecture([8, 8], [False, True], layers=1, groups=4), latent_size=8)
    with pytest.raises(ValueError, match="u of this UNetFlowMap ignores r: give it a second time input"):
        FlowMapModule(unet, MeanFlow())
    assert FlowMapModule(unet, FlowMatching()).nfe(4) == 4


def test_a_module_built_in_python_keeps_no_copy_of_its_networks(net, recwarn):
    model = FlowMapModule(net, MeanFlow(velocity=TeacherVelocity(copy.deepcopy(net))))
    assert not model.hparams
    assert not [one for one in recwarn if "save_hyperparameters" in str(one.message)]


def test_epochs_that_end_before_the_schedules_are_told(tmp_path, net):
    data = tiny.data(tiny.shards(tmp_path / "shards"))
    with pytest.warns(UserWarning, match=r"max_epochs=1 may end training before step 1000.*set trainer.max_steps"):
        trainer(tmp_path, max_steps=1000, max_epochs=1).fit(tiny.meanflow(), datamodule=data)


def test_each_rank_validates_with_noise_of_its_own(tmp_path):
    from tests.callbacks import tiny

    def error(rank: int) -> float:
        class OfRank(FlowMapModule):
            global_rank = rank

        data = tiny.data(tiny.shards(tmp_path / f"{rank}"), validation_shards=str(tmp_path / f"{rank}"))
        (found,) = tiny.trainer(tmp_path).validate(OfRank(tiny.network(), FlowMatching()), data, verbose=False)
        return found["validation/mse_v_at_0.5"]

    assert error(0) == error(0)
    assert error(0) != error(1)
