from __future__ import annotations

import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from emf_lightning.callbacks import ExperimentProgressBar, SelfCheck
from emf_lightning.callbacks.derivative_check import FaultError, check_derivative, points_of
from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.derivative.finite_difference import FiniteDifference
from emf_lightning.flow.derivative.forward_mode import ForwardMode, Fused
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.optimization import Optimization
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval, SummedInterval
from emf_lightning.text.base import TextFeatures
from tests.callbacks import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


def fit(shards, run, model, *callbacks, **arguments):
    trainer = tiny.trainer(run, *callbacks, **{"max_steps": 1, **arguments})
    trainer.fit(model, datamodule=tiny.data(shards))


def line(shards, run, capsys, model, check=None, **arguments) -> str:
    """What the check says."""
    bar = ExperimentProgressBar(seconds_between_lines=1e6)
    fit(shards, run, model, check or SelfCheck(), bar, enable_progress_bar=True, **arguments)
    (said,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("self-check")]
    return said


def figure(said: str) -> float:
    found = re.search(r"du/dt (\S+) of", said)
    assert found
    return float(found.group(1))


def test_a_sound_training_gets_one_line_of_figures(shards, tmp_path, capsys):
    said = line(shards, tmp_path / "run", capsys, tiny.meanflow())
    assert figure(said) < 1e-3
    assert "ForwardMode, 32-true" in said
    assert float(re.search(r"forward mode (\S+) of differences", said).group(1)) < 1e-4
    assert said.endswith("r = t exact")
    assert "ranks" not in said


@pytest.mark.parametrize("derivative", [Fused(), FiniteDifference(1e-5), ForwardMode("fp32"), ForwardMode("bf16")])
def test_the_derivative_is_checked_as_training_takes_it(shards, tmp_path, capsys, derivative):
    model = tiny.meanflow(derivative=derivative)
    said = line(shards, tmp_path / "run", capsys, model, precision="bf16-mixed")
    assert f"({type(derivative).__name__}, bf16-mixed" in said
    exact = derivative.precision == "fp32"
    assert figure(said) < 1e-2 if exact else 1e-4 < figure(said) < 0.25


def test_flow_matching_has_no_derivative_to_check(shards, tmp_path, capsys):
    assert line(shards, tmp_path / "run", capsys, tiny.flow_matching()) == "self-check: r = t exact"


def test_a_network_too_large_to_copy_is_held_against_its_own_differences(shards, tmp_path, capsys):
    said = line(shards, tmp_path / "run", capsys, tiny.meanflow(), SelfCheck(largest_copy=1))
    assert "of fp32 differences" in said
    assert figure(said) < 5e-2
    half = tiny.meanflow()
    half.net.to(torch.bfloat16)
    said = line(shards, tmp_path / "half", capsys, half, SelfCheck(largest_copy=1), precision="bf16-mixed")
    assert "not checked" in said


class Recorder(FlowMapModule):
    """Keeps its losses."""

    def __init__(self) -> None:
        super().__init__(tiny.network())
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_the_same_with_and_without_it(shards, tmp_path, precision):
    without, checked = Recorder(), Recorder()
    for model, callbacks in ((without, ()), (checked, (SelfCheck(),))):
        torch.manual_seed(5)
        fit(shards, tmp_path / "run", model, *callbacks, max_steps=3, precision=precision)
    assert checked.losses == without.losses
    for name, weight in without.state_dict().items():
        assert torch.equal(weight, checked.state_dict()[name]), name


# -- what it is there for ---------------------------------------------------------------------------------------------


class TimesInBf16(SanaFlowMap):
    """As a mixed-precision policy that casts every input."""

    def backbone(self, z, r, t, *rest):
        r, t = ((time * self.time_scale).bfloat16().float() / self.time_scale for time in (r, t))
        return super().backbone(z, r, t, *rest)


class IgnoresInterval(SanaFlowMap):
    def backbone(self, z, r, t, *rest):
        return super().backbone(z, t, t, *rest)


class DetachedLength(SanaFlowMap):
    """du/dt of u(z, t - r, t) that takes the interval's length for a constant."""

    def backbone(self, z, r, t, *rest):
        return super().backbone(z, t - (t - r).detach(), t, *rest)


class LengthInBf16(SanaFlowMap):
    """t and r in fp32, their difference not."""

    def backbone(self, z, r, t, *rest):
        return super().backbone(z, t - (t - r).bfloat16().to(t), t, *rest)


class Broken(SanaFlowMap):
    def backbone(self, z, r, t, *rest):
        return super().backbone(z, r, t, *rest) * float("nan")


class SummedAsAnchored(AnchoredInterval):
    def __call__(self, *args):
        return SummedInterval()(*args)


class PlainSumCalledAnchored(SanaFlowMap):
    """An anchored network whose interval embedding does not vanish at length 0."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.two_times.rule = SummedAsAnchored()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (TimesInBf16, r"times are rounded.*cast_forward_inputs=False"),
        (IgnoresInterval, r"does not change with r"),
        (LengthInBf16, r"forward mode is .* away from finite differences, in float64.*more than 0\.003.*rounded"),
        (DetachedLength, r"away from finite differences, in float64.*\.detach\(\)"),
        (Broken, r"not finite before the first step"),
        (PlainSumCalledAnchored, r"away from the flow.*AnchoredInterval"),
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_network_that_would_fail_in_silence_is_refused(shards, tmp_path, kind, named, precision):
    torch.manual_seed(0)
    model = FlowMapModule(kind(tiny.SIZE, context_width=16))
    with pytest.raises(ValueError, match=f"SelfCheck: .*{named}"):
        fit(shards, tmp_path / "run", model, SelfCheck(), precision=precision)


@pytest.mark.parametrize("kind", [TimesInBf16, IgnoresInterval])
def test_it_is_refused_without_a_float64_copy_too(shards, tmp_path, kind):
    with pytest.raises(ValueError, match="SelfCheck"):
        fit(shards, tmp_path / "run", FlowMapModule(kind(tiny.SIZE, context_width=16)), SelfCheck(largest_copy=1))


class OneNaN(Callback):
    """Latents of the first sample and features of the second are not finite, as of a damaged file."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch.latents[0] = torch.nan
        batch.text.context[1] = torch.inf


def test_samples_that_training_leaves_out_do_not_end_it(shards, tmp_path):
    fit(shards, tmp_path / "run", tiny.meanflow(), OneNaN(), SelfCheck())


class Passes(Callback):
    """The number of forward passes before the first step."""

    count = 0

    def on_fit_start(self, trainer, module):
        module.net.register_forward_hook(self._more)

    def _more(self, *_):
        self.count += 1


def test_a_fault_takes_as_many_passes_as_none(shards, tmp_path):
    # ranks that share a sharded network and do not all find the fault would wait for each other
    counts = []
    for kind in (SanaFlowMap, PlainSumCalledAnchored):
        passes = Passes()
        with pytest.raises(ValueError) if kind is not SanaFlowMap else nullcontext():
            fit(shards, tmp_path / "run", FlowMapModule(kind(tiny.SIZE, context_width=16)), passes, SelfCheck())
        counts.append(passes.count)
    assert 0 < counts[1] <= counts[0] < counts[1] + 4  # the training step's own follow


def test_a_derivative_too_coarse_for_the_network_is_refused(shards, tmp_path):
    model = tiny.meanflow(derivative=FiniteDifference(0.1))
    with pytest.raises(ValueError, match=r"du/dt as training takes it \(FiniteDifference, 32-true\).*another step"):
        fit(shards, tmp_path / "run", model, SelfCheck())


# -- the statistic: the median over samples ---------------------------------------------------------------------------


def batch_of(size: int, seed: int = 0) -> CaptionImageBatch:
    generator = torch.Generator().manual_seed(seed)
    text = TextFeatures(torch.randn(size, 6, 16, generator=generator), torch.ones(size, 6, dtype=torch.bool))
    return CaptionImageBatch(torch.randn(size, 3, 36, 36, generator=generator), text, text[:1], ("",) * size)


@torch.no_grad()
def said_of(model: FlowMapModule, batch: CaptionImageBatch, bf16: bool = True) -> str:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return check_derivative(model.eval(), points_of(batch), "bf16-mixed", SelfCheck().tolerance, 10**9)


def test_healthy_networks_and_samples_pass():
    for seed in range(10):
        torch.manual_seed(seed)
        model = FlowMapModule(SanaFlowMap(tiny.SIZE, context_width=16))
        assert figure(said_of(model, batch_of(128, seed))) < 0.1, seed


def test_a_batch_smaller_than_the_statistic_gives_its_samples_several_noises():
    points = points_of(batch_of(3))
    assert [len(point.z) for point in points] == [1] * 16
    assert len({point.z.sum().item() for point in points}) == 16
    assert figure(said_of(tiny.meanflow(), batch_of(3))) < 0.1


def test_nothing_depends_on_how_many_samples_are_evaluated_at_once():
    batch = batch_of(128)
    assert len(points_of(batch)) == 1
    (z, parts) = points_of(batch)[0].z, [point.z for point in points_of(batch.parts(4)[0])]
    assert len(parts) == 4
    assert torch.equal(torch.cat(parts), z)


class DoubledInBf16(ForwardMode):
    """Wrong at the first samples, in the training's precision alone."""

    wrong = 0

    def jvp(self, u, z, r, t, v):
        dudt = super().jvp(u, z, r, t, v)
        if torch.is_autocast_enabled("cpu"):
            dudt[: self.wrong] *= 2
        return dudt


def test_some_ill_conditioned_samples_are_no_fault_and_most_are():
    derivative = DoubledInBf16()
    derivative.wrong = 7
    assert figure(said_of(tiny.meanflow(derivative=derivative), batch_of(128))) < 0.1
    derivative.wrong = 9
    message = r"DoubledInBf16, bf16-mixed\) is (1\.0e\+00|9\.\de-01) of itself .*median of 16 samples.*tolerance 0\.25"
    with pytest.raises(FaultError, match=message):
        said_of(tiny.meanflow(derivative=derivative), batch_of(128))


class OneTenthMore(ForwardMode):
    exact = False

    def jvp(self, *args):
        return 1.1 * super().jvp(*args)


def test_a_derivative_that_says_it_approximates_is_judged_by_the_tolerance():
    assert 0.09 < figure(said_of(tiny.meanflow(derivative=OneTenthMore()), batch_of(128))) < 0.13


# -- planted faults of the derivative ---------------------------------------------------------------------------------


class WrongSign(ForwardMode):
    def jvp(self, *args):
        return -super().jvp(*args)


class OnePercentMore(ForwardMode):
    def jvp(self, *args):
        return 1.01 * super().jvp(*args)


class NoTangentOfZ(ForwardMode):
    def jvp(self, u, z, r, t, v):
        return super().jvp(u, z, r, t, 0 * v)


class LengthHeld(ForwardMode):
    """du/dt with r moving along: t - r stays."""

    def jvp(self, u, z, r, t, v):
        return super().jvp(lambda z_, r_, t_: u(z_, t_ - (t - r), t_), z, r, t, v)


class TimesRounded(ForwardMode):
    def jvp(self, u, z, r, t, v):
        return super().jvp(u, z, r.bfloat16().to(r), t.bfloat16().to(t), v)


class AnotherNetwork(ForwardMode):
    """du/dt of a network with other weights."""

    def jvp(self, u, z, r, t, v):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            other = SanaFlowMap(tiny.SIZE, context_width=16).to(z.dtype)
        return super().jvp(replace(u, net=other), z, r, t, v)


class AnotherNetworksValue(ForwardMode):
    """The right du/dt beside another network's u."""

    def __call__(self, u, z, r, t, v, n):
        value, dudt = super().__call__(u, z, r, t, v, n)
        return 2 * value, dudt


class LosesABlock(ForwardMode):
    """Takes the block's output for a constant, while it differentiates."""

    def jvp(self, u, z, r, t, v):
        with lost_tangent(u.net.transformer.transformer_blocks[0]):
            return super().jvp(u, z, r, t, v)


class OtherRows(ForwardMode):
    def jvp(self, *args):
        return super().jvp(*args).roll(1, 0)


@contextmanager
def lost_tangent(part):
    handle = part.register_forward_hook(lambda module, inputs, output: output.detach())
    yield
    handle.remove()


FAULTS = {
    WrongSign: r"2\.0e\+00",
    OnePercentMore: r"1\.0e-02",
    NoTangentOfZ: ".*",
    LengthHeld: ".*",
    TimesRounded: ".*",
    AnotherNetwork: ".*",
    AnotherNetworksValue: r"1\.0e\+00",
    LosesABlock: ".*",
    OtherRows: ".*",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_derivative_is_refused_whatever_the_samples(kind):
    for seed in range(3):
        message = rf"u or du/dt by {kind.__name__} is {FAULTS[kind]} of itself .*median of 16.*more than 0\.003"
        with pytest.raises(FaultError, match=message):
            said_of(tiny.meanflow(derivative=kind()), batch_of(128, seed))


@pytest.mark.parametrize("part", ["attn1", "attn2", "ff"])
def test_one_branch_without_tangent_is_refused_whatever_the_samples(part):
    model = tiny.meanflow()
    for weight in model.net.transformer.transformer_blocks.parameters():
        weight.data *= 3  # at first the branches hardly matter
    with lost_tangent(getattr(model.net.transformer.transformer_blocks[0], part)):
        for seed in range(3):
            with pytest.raises(FaultError, match=r"forward mode is .* in the median of 16 samples, more than 0\.003"):
                said_of(model, batch_of(128, seed))


def test_a_faulty_derivative_ends_the_run(shards, tmp_path):
    with pytest.raises(ValueError, match=r"SelfCheck: u or du/dt by WrongSign is 2\.0e\+00 .*more than 0\.003"):
        fit(shards, tmp_path / "run", tiny.meanflow(derivative=WrongSign()), SelfCheck(), precision="bf16-mixed")


class OneRankAlone(FlowMapModule):
    """Rank 1 scales its gradients after they were averaged: as good as gradients that were not."""

    def on_after_backward(self):
        if self.global_rank == 1:
            for parameter in self.net.transformer.proj_out.parameters():
                parameter.grad *= 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_equal_on_two_ranks_are_said_to_be(shards, tmp_path, capfd, accumulate):
    ranks = {"devices": 2, "strategy": "ddp_fork", "accumulate_grad_batches": accumulate}
    bar = ExperimentProgressBar(seconds_between_lines=1e6)
    fit(shards, tmp_path / "run", tiny.meanflow(), SelfCheck(), bar, enable_progress_bar=True, **ranks)
    assert "r = t exact, gradients equal on 2 ranks\n" in capfd.readouterr().out


def test_gradients_that_differ_between_ranks_are_refused(shards, tmp_path):
    with pytest.raises(Exception, match=r"SelfCheck.*rank 1 has other gradients than rank 0 in 2 of .*proj_out"):
        fit(shards, tmp_path / "run", OneRankAlone(tiny.network()), SelfCheck(), devices=2, strategy="ddp_fork")


def test_of_two_networks_each_ones_gradients_are_compared_when_it_has_them(shards, tmp_path, monkeypatch):
    compared = []

    def compare(trainer, parameters):
        assert all(parameter.grad is not None for _, parameter in parameters)
        compared.append({name.partition(".")[0] for name, _ in parameters})
        return "compared"

    class TwoRanks(SelfCheck):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            with monkeypatch.context() as patch:
                patch.setattr(type(trainer), "world_size", 2)
                super().on_before_optimizer_step(trainer, pl_module, optimizer)

    monkeypatch.setattr("emf_lightning.callbacks.self_check._compare_gradients", compare)
    module = FGM(tiny.network(), optimization=Optimization(torch.optim.AdamW))
    check = TwoRanks()
    tiny.trainer(tmp_path / "run", check, max_steps=2).fit(module, datamodule=tiny.data(shards))
    assert compared == [{"online_flow"}, {"net"}]
    assert check.message.count("compared") == 1
