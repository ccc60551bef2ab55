"""SCFlow as Lightning runs it; its mathematics is in tests/flow/test_consistency.py and test_adversarial.py."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from emf_lightning.flow.objectives.base import LossTerm
from emf_lightning.flow.objectives.self_corrected import SelfCorrectedFlow
from emf_lightning.flow.times import LogitNormalTimes, Schedule, UniformTimes
from emf_lightning.modules.alternating import Alternation
from emf_lightning.modules.optimization import Optimization
from emf_lightning.modules.scflow import SCFlow
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.discriminator import ConvDiscriminator
from tests.callbacks import tiny
from tests.modules.test_fgm import adam, same, weights
from tests.modules.test_modules import trainer

TERMS = ("consistency", "backward", "alignment", "adversarial")


def discriminator(net: FlowMapNetwork) -> ConvDiscriminator:
    torch.manual_seed(0)
    return ConvDiscriminator(net, 4, 8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "settings", [{}, {"teacher_guidance_scale": 1.5, "discriminator_times": UniformTimes(Schedule(1.0))}]
)
def test_both_networks_learn_and_the_teacher_stays_bit_for_bit(tmp_path, net, loader, precision, settings):
    model = SCFlow(net, discriminator, SelfCorrectedFlow(**settings), optimization=Optimization(adam))
    start, untrained = weights(net), weights(model.discriminator)
    fit = trainer(tmp_path, precision=precision)
    fit.fit(model, loader)
    still = [name for name, value in model.net.state_dict().items() if torch.equal(value, start[name])]
    assert all(".interval." in name for name in still), "u(z, t, t) knows no intervals"
    assert not any(torch.equal(value, untrained[name]) for name, value in model.discriminator.state_dict().items())
    assert same(weights(model.teacher.net), start)
    logged = fit.callback_metrics
    assert all(logged[f"train/{name}"] > 0 for name in (*TERMS, "r1", "discriminator_loss"))
    assert 0 <= logged["train/discriminator_accuracy"] <= 1
    assert logged["train/nan_rows"] == 0
    assert (fit.global_step, model.auxiliary_steps) == (6, 6)
    fit.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"net", "discriminator"}


def test_a_term_and_the_discriminator_wait_for_their_time(tmp_path, net, loader):
    logged, learned = [], []

    class Watched(SCFlow):
        def training_step(self, batch, batch_idx):
            logged.append(set())
            before = weights(self.discriminator)
            super().training_step(batch, batch_idx)
            learned.append(not same(before, weights(self.discriminator)))

        def log(self, name, *rest, **settings):
            logged[-1].add(name.removeprefix("train/"))

    model = Watched(
        net,
        discriminator,
        SelfCorrectedFlow(
            backward=LossTerm(0.1, start=1), alignment=LossTerm(0.1, start=2), adversarial=LossTerm(0.1, start=3)
        ),
        optimization=Optimization(adam),
    )
    trainer(tmp_path, max_steps=4).fit(model, loader)
    assert [terms & set(TERMS) for terms in logged] == [set(TERMS[: n + 1]) for n in range(4)]
    assert learned == [False, False, False, True]
    assert model.auxiliary_steps == 1


def test_the_target_is_the_moving_average_of_the_weights(tmp_path, net, loader):
    seen = [weights(net)]

    class Watched(SCFlow):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            seen.append(weights(self.net))

    model = Watched(net, discriminator, optimization=Optimization(adam), target_decay=0.9)
    trainer(tmp_path, max_steps=3).fit(model, loader)
    for name, value in model.target.net.state_dict().items():
        expected = seen[0][name]
        for later in seen[1:]:
            expected = 0.9 * expected + 0.1 * later[name]
        assert torch.allclose(value, expected, atol=1e-6), name
        assert not value.requires_grad


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    tiny.shards(tmp_path / "shards")

    def run(name: str, **resumed) -> dict:
        model = SCFlow(
            tiny.network(),
            discriminator,
            SelfCorrectedFlow(alignment=LossTerm(0.1, start=4)),
            optimization=Optimization(adam),
            alternation=Alternation(auxiliary_updates=2),
        )
        saver = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=3, save_top_k=-1)
        averages = EMAWeightAveraging(decay=0.5)
        fit = tiny.trainer(tmp_path / f"run-{name}", averages, saver, max_steps=6, enable_checkpointing=True)
        fit.fit(model, datamodule=tiny.data(tmp_path / "shards"), **resumed)
        return torch.load(tmp_path / name / "step=6.ckpt", weights_only=True)

    expected = run("whole")
    found = run("resumed", ckpt_path=tmp_path / "whole/step=3.ckpt")
    assert found["auxiliary_steps"] == expected["auxiliary_steps"] == 12
    for kind in ("state_dict", "current_model_state", "target"):
        assert same(found[kind], expected[kind])
    assert not same(
        expected["target"], {name[4:]: v for name, v in expected["state_dict"].items() if name[:3] == "net"}
    )


def test_few_steps_are_eulers(net):
    model = SCFlow(net, discriminator)
    batch_text = tiny_text()
    noise = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        u, half, one = model.average_velocity(batch_text), torch.full((2,), 0.5), torch.ones(2)
        middle = noise - 0.5 * u(noise, one, one)
        expected = middle - 0.5 * u(middle, half, half)
    assert torch.allclose(model.sample_latents(batch_text, batch_text[:1], noise, 2), expected, atol=1e-6)


def tiny_text():
    from emf_lightning.text.words import WordEncoder

    return WordEncoder(width=16, length=4)(["a red circle", "two circles"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r1": -1.0}, "r1 must not be negative"),
        ({"times": LogitNormalTimes()}, "flow_matching_ratio of times to 1"),
        ({"discriminator_times": LogitNormalTimes()}, "flow_matching_ratio of discriminator_times to 1"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SelfCorrectedFlow(**settings)


def test_a_target_that_never_moves_is_refused(net):
    with pytest.raises(ValueError, match="decay must lie in"):
        SCFlow(net, discriminator, target_decay=1.0)
