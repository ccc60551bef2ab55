"""TwinFlow on Gaussians: data N(M, S^2), one-step samples N(mean, S^2), both flows in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emf_lightning.flow.objectives.rcgm import RCGM
from emf_lightning.flow.objectives.twin_flow import TwinFlow
from emf_lightning.flow.times import AnyStepTimes, Schedule
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import UniformWeighting
from tests.flow.gaussian import M, S, average_velocity, sigma, velocity

f64 = torch.float64


def gain(t: Tensor) -> Tensor:
    """Of the velocity of N(mean, S^2), -mean + gain (z - (1 - t) mean)."""
    return (t - (1 - t) * S**2) / sigma(t) ** 2


class Net(nn.Module):
    """The exact flow map of the data with its one-step samples moved by ``shift``, and at negative times the flow of
    N(M + ``fake``, S^2)."""

    def __init__(self, shift: float = 0.0, fake: float = 0.0) -> None:
        super().__init__()
        self.shift, self.fake = (nn.Parameter(torch.tensor(value, dtype=f64)) for value in (shift, fake))

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(r[t < 0], t[t < 0]), "the fake flow has one time"
        length = t.abs().to(z.dtype)
        real = average_velocity(z, torch.where(t < 0, length, r.to(z.dtype)), length)
        one_step = ((t == 1) & (r == 0)).view(-1, 1, 1, 1)
        fakes = velocity(z, length) - self.fake * (1 + gain(length) * (1 - length)).view(-1, 1, 1, 1)
        return torch.where((t < 0).view(-1, 1, 1, 1), fakes, real - torch.where(one_step, self.shift, 0.0))


def data(rows: int = 4096, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return M + S * torch.randn(rows, 1, 2, 2, dtype=f64)


def twin(**settings) -> TwinFlow:
    return TwinFlow(weighting=UniformWeighting(), **settings)


def gradients(objective: TwinFlow, net: Net, rows: int = 4096) -> dict[str, float]:
    loss = objective(net, data(rows)).loss
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return {name: 0.0 if g is None else float(g) for (name, _), g in zip(net.named_parameters(), found, strict=True)}


def rectification_alone(net: nn.Module, **settings) -> dict[str, float]:
    """Its gradients: those with it, less those without, at the same random numbers."""
    both, without = (gradients(twin(rectification=Schedule(w), **settings), net) for w in (0.5, 0.0))
    return {name: both[name] - without[name] for name in both}


def test_exact_student_is_a_fixed_point_of_both_new_terms():
    net = Net()
    terms = twin()(net, data())
    assert terms.metrics["velocity_gap"] < 1e-12
    assert rectification_alone(net) == {"shift": pytest.approx(0, abs=1e-6), "fake": 0.0}
    found = [gradients_of_fakes(net, seed) for seed in range(8)]
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 8**0.5
    assert abs(mean) < 4 * error, "the fake flow of samples that are distributed as the data is the data's"


def gradients_of_fakes(net: Net, seed: int, rows: int = 4096) -> float:
    like = data(rows, seed)
    terms = twin().fake_flow_terms(AverageVelocity(net), like)
    return float(torch.autograd.grad(terms.loss, net.fake)[0])


@pytest.mark.parametrize("shift", [-0.3, 0.2])
def test_fake_flow_is_at_rest_where_it_is_the_samples_own(shift):
    """The samples have mean M + shift. Their flow at fake = shift has no gradient, at other values one towards it."""
    for fake, sign in ((shift, 0), (shift + 0.3, 1), (shift - 0.3, -1)):
        found = torch.tensor([gradients_of_fakes(Net(shift, fake), seed) for seed in range(8)])
        mean, error = found.mean(), found.std() / 8**0.5
        assert (mean * sign > 10 * error) if sign else (abs(mean) < 4 * error)


@pytest.mark.parametrize("fake", [-0.3, 0.2])
def test_rectification_is_its_closed_form_and_moves_samples_back_to_the_data(fake):
    """d = -fake (1 + gain(s) (1 - s)) for any sample: the loss is 4 d^2, its gradient with respect to u is 2 d."""
    s = (torch.arange(100_000, dtype=f64) + 0.5) / 100_000
    d = (-fake * (1 + gain(s) * (1 - s))).mean()
    found = rectification_alone(Net(fake, fake))
    # u_one_step = ... - shift, four dimensions, weight .5; fake samples are a quarter of the batch
    expected = float(0.5 * 2 * d * -4)
    assert found["shift"] == pytest.approx(expected, rel=0.05)
    assert found["shift"] * fake > 0, "descent takes the shift to 0"
    assert found["fake"] == 0, "neither flow has a gradient from it"


def test_rectification_notices_a_network_that_does_not_know_negative_times():
    class Blind(Net):
        def forward(self, z, r, t):
            return super().forward(z, r.abs(), t.abs())

    assert abs(rectification_alone(Net(0.2, 0.2))["shift"]) > 0.1
    assert rectification_alone(Blind(0.2, 0.2))["shift"] == pytest.approx(0, abs=1e-6)


def test_difference_is_of_the_samples_own_noised_states():
    """For a network u = z at negative times and 0 else, d is x_s: its mean over noise is (1 - s) x."""
    x = torch.linspace(-0.5, 0.5, 3, dtype=f64).repeat_interleave(20_000).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    d = twin().difference(lambda z, r, t: torch.where(t.view(-1, 1, 1, 1) < 0, 0.1 * z, 0 * z), x)
    means = d.view(3, -1).mean(1)
    assert torch.allclose(means, torch.tensor([-0.025, 0.0, 0.025]), atol=3e-3)
    assert not d.requires_grad


def test_difference_is_taken_at_the_one_step_samples():
    taken = []

    class Spy(TwinFlow):
        def difference(self, u, x):
            taken.append(x)
            return super().difference(u, x)

    Spy()(lambda z, r, t: z - 3.0, data(64))
    assert taken[0].shape == (16, 1, 2, 2)
    assert torch.allclose(taken[0], torch.tensor(3.0, dtype=f64))


def test_difference_is_bounded():
    d = twin().difference(lambda z, r, t: torch.where(t.view(-1, 1, 1, 1) < 0, 9 + 0 * z, 0 * z), data(64))
    assert (d == 1).all()


def test_rest_of_the_batch_is_rcgms():
    """Of 64 samples 48 are real ones, of which 16 have t = 1 and r = 0, 16 any interval, and 16 r = t."""
    x, c = data(64), torch.arange(64.0)
    seen = []

    def net(z, r, t, c):
        seen.append((len(z), sorted(set(c.tolist()))))
        return z

    torch.manual_seed(3)
    terms = twin(rectification=Schedule(0.0))(net, x, c)
    assert terms.times.n_interval == 32
    assert terms.times.t[:16].tolist() == [1.0] * 16 and terms.times.r[:16].tolist() == [0.0] * 16
    fakes = [float(i) for i in range(48, 64)]
    assert [captions == fakes for rows, captions in seen if rows == 16 and captions[0] > 15] == [True, True]
    torch.manual_seed(3)
    expected = RCGM(weighting=UniformWeighting())(net, x[:48], c[:48])
    assert torch.equal(terms.squared_error, expected.squared_error)
    fake = terms.metrics["fake_flow_mse"] * 4
    assert terms.loss.item() == pytest.approx(0.75 * expected.loss.item() + 0.25 * fake.item(), rel=1e-5)


def test_weight_follows_training():
    net = Net(0.2, 0.2)
    objective = twin(rectification=Schedule(0.0, 1.0))
    losses = []
    for progress in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        losses.append(objective(net, data(64), progress=progress).loss.item())
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_fake_samples_and_targets_are_without_a_graph():
    """The student's one-step samples train by the rectification alone, not through the fake flow's error."""
    net = Net(0.2, 0.0)
    terms = twin().fake_flow_terms(AverageVelocity(net), data(64))
    assert torch.autograd.grad(terms.loss, net.shift, allow_unused=True)[0] in (None, torch.tensor(0.0, dtype=f64))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_too_small_is_refused(rows):
    with pytest.raises(ValueError, match=f"TwinFlow: of a batch of {rows} samples"):
        twin()(Net(), data(rows))
    assert twin()(Net(), data(4)).loss.isfinite()


@pytest.mark.parametrize("settings", [{"fake_ratio": 0.0}, {"fake_ratio": 1.0}, {"rectification": Schedule(-0.1)}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="TwinFlow"):
        TwinFlow(**settings)


def test_times_without_one_step_are_refused():
    with pytest.raises(ValueError, match="one_step_ratio"):
        twin(times=AnyStepTimes(one_step_ratio=0.0))(Net(), data(16))
