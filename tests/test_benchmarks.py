"""What the benchmarks compare is the same computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import small_latent
from benchmarks.backbones import BACKBONES, Measurement
from benchmarks.data_path import photograph, shard, table
from benchmarks.derivative import RECORDED, SEPARATE, Bench, Size, least
from benchmarks.pages import rows, write_tables
from benchmarks.readers import Copies, Emf, Files
from benchmarks.scale import exponent, measured, shares, uneven_shards
from benchmarks.training_step import AllRows
from emf_lightning.flow.derivative.forward_mode import ForwardMode, Fused
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.latents.kl import KLAutoencoder
from emf_lightning.networks.sana import SanaArchitecture

TINY = SanaArchitecture(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    patch_size=2,
)
SIZE = Size("tiny", TINY, channels=3, side=8, rows=4, tokens=3)
EXACT = ["ForwardMode(fast=False) 0.5", "Fused 0.5", RECORDED, SEPARATE]


def gradients(bench: Bench, name: str) -> torch.Tensor:
    bench.clear()
    bench.steps()[name]()
    parameters = [p for net in (bench.net, bench.half) for p in net.parameters() if p.grad is not None]
    return torch.cat([p.grad.float().flatten() for p in parameters])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_every_way_gives_the_same_gradient(name, precision, bound):
    bench = Bench(SIZE, torch.device("cpu"), precision)
    expected = gradients(bench, "ForwardMode 0.5")
    assert (gradients(bench, name) - expected).norm() < bound * expected.norm()


def test_recording_in_bf16_leaves_the_weights_in_bf16():
    bench = Bench(SIZE, torch.device("cpu"), "bf16")
    before = [p.clone() for p in bench.half.parameters()]
    bench.steps()[RECORDED]()
    assert all(torch.equal(a, b) for a, b in zip(before, bench.half.parameters(), strict=True))


def test_a_backbones_cells_are_what_they_say():
    measurement = Measurement(BACKBONES["PixArt-Sigma"])
    assert measurement.parent() == measurement.export() == "bit for bit"
    assert measurement.graph().startswith("bit for bit")  # torch 2.10: of one batch size
    assert 0.9 < float(measurement.memory()) < 3
    assert float(measurement.whole_batch()) < 1e-6
    assert measurement.parameters() == "610.9 M"
    assert all(0.9 < float(ratio) < 1.03 for ratio in measurement.operations())
    fp32, autocast, weights = map(float, measurement.errors())
    assert fp32 < 1e-4 < autocast < 0.05 and weights < 0.05


def test_the_least_is_three_passes_and_two_of_the_interval_rows():
    assert [least(share) for share in (0.0, 0.75)] == pytest.approx([1, 1.5])


def test_all_readers_of_the_data_path_read_every_sample(tmp_path: Path):
    pictures = {f"{number}.jpg": photograph(number, (48, 32)) for number in range(5)}
    texts = {f"{number}.txt": b"%d" % number for number in range(5)}
    assert Emf().pictures(shard(tmp_path / "pictures.tar", dict(sorted((pictures | texts).items()))), 16) == 5
    path = shard(tmp_path / "5.tar", texts)
    for dtype in ("bfloat16", "float8"):
        Emf().fill(path, dtype, 12, 16)
        assert Emf().read(path, dtype, 12, 16, 2) == Files().read(path, dtype, 12, 16, 2) == 5
    assert Copies().read(path, "bfloat16", 12, 16, 5) == 5


def test_a_table_of_readers_states_ratios_and_leaves_out_what_was_not_measured():
    lines = table({"a": {"x": 0.002, "y": 0.001}, "b": {"y": 0.004}}, "row", rate=True, against="x")
    assert lines == ["| row | x | y |", "|---|---:|---:|", "| a | 500 | 1000 (2.00) |", "| b |  | 250 |"]


def test_tables_go_between_their_marks_and_nothing_else_changes(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- X -->\nold\n<!-- /X -->\nb\n")
    for _ in range(2):
        write_tables(page, {"X": rows(["name", "n"], [["x", 1234], ["y", 0.12345], ["z", 12345.6]])})
        table = "| name | n |\n|---|---:|\n| x | 1,234 |\n| y | 0.123 |\n| z | 12,346 |"
        assert page.read_text() == f"a\n<!-- X -->\n{table}\n<!-- /X -->\nb\n"


def test_an_exponent_is_the_power_of_growth():
    sizes = [10, 100, 1000, 10_000]
    assert [exponent(sizes, [float(size) ** power for size in sizes]) for power in (0, 0.5, 1)] == [
        "0.00",
        "0.50",
        "1.00",
    ]


def test_ranks_of_the_simulated_stream_read_every_sample_once(tmp_path: Path):
    share = shares(uneven_shards(tmp_path, 70))
    assert len(share) == 64 and min(share) > 0


@pytest.mark.parametrize("megabytes", [20, 100])
def test_what_a_call_holds_is_measured_although_the_process_has_freed_as_much(megabytes: int):
    freed = [np.ones(1_000) for _ in range(20_000)]  # 160 MB in pieces, which the C library keeps
    last = np.ones(1_000)  # behind them, so that their end is not the heap's
    del freed
    _, held = measured(torch.ones, megabytes * 250_000)
    assert megabytes * 0.95 < held < megabytes * 1.2 + 5, held
    del last


@pytest.mark.parametrize("released", [AllRows(ForwardMode(fast=False)), AllRows(Fused())])
def test_the_releases_derivatives_are_the_projects(released):
    torch.manual_seed(0)
    weight = torch.randn(4, 4, requires_grad=True)

    def u(z, r, t):
        return torch.tanh(z @ weight) * (t - r)[:, None]

    z, v, t = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6)
    r = torch.cat([0.5 * t[:2], t[2:]])
    found, expected = (derivative(AverageVelocity(u), z, r, t, v, 2) for derivative in (released, ForwardMode()))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    gradients = [torch.autograd.grad(each[0].sum(), weight)[0] for each in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)
    assert not found[1].requires_grad


def test_the_small_autoencoder_gives_latents_of_mean_0_and_variance_1(tmp_path: Path) -> None:
    model = small_latent.small_autoencoder()
    small_latent.train(model, steps=2, size=4, seed=0)
    small_latent.normalize(model.eval(), 64, seed=0)
    model.save_pretrained(tmp_path)

    images = next(small_latent.batches(64, seed=1))
    latents = KLAutoencoder(str(tmp_path)).encode(images)
    assert latents.shape == (64, 8, 9, 9)
    assert abs(latents.mean()) < 1e-4
    assert latents.std() == pytest.approx(1, abs=1e-3)
