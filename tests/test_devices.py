"""DDP and FSDP2 on two processes train, average, save and sample as one process does; ``ranks.py`` runs them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaFlowMap
from tests import ranks
from tests.forked import Forked
from tests.ranks import STEPS


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The folder with the files of all runs."""
    out = tmp_path_factory.mktemp("ranks")
    assert Forked(ranks.main, out, folder=root).wait() == 0
    return out


def found(out: Path, name: str) -> dict[str, Any]:
    return torch.load(out / f"{name}.pt", weights_only=True)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative error over all tensors."""
    assert one.keys() == other.keys()
    error = sum((one[name] - other[name]).square().sum() for name in other)
    return float((error / sum(tensor.square().sum() for tensor in other.values())).sqrt())


def test_every_process_ends_well_but_the_killed_ones(out):
    statuses = json.loads((out / "statuses.json").read_text())
    assert signal.SIGKILL in statuses.pop("killed")
    assert set(map(tuple, statuses.values())) == {(0,), (0, 0)}


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("ddp", "alone"),
        ("ddp-accumulated", "alone"),
        ("ddp-teacher", "alone-teacher"),
        ("fsdp2", "alone"),
        ("fsdp2-parts", "alone"),
        ("fsdp2-once", "alone"),
        ("fsdp2-accumulated", "alone"),
        ("fsdp2-teacher", "alone-teacher"),
    ],
)
def test_two_ranks_train_as_one_process_does_on_both_batches(out, name, same_as):
    two, one = found(out, name), found(out, same_as)
    assert difference(two["gradient"], one["gradient"]) < 1e-6
    assert difference(two["weights"], one["weights"]) < 1e-6
    assert two["logged"]["train/gradient_norm"] == pytest.approx(one["logged"]["train/gradient_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "same_as"),
    [("fgm-ddp", "fgm-alone"), ("fgm-ddp-parts", "fgm-alone"), ("scflow-ddp", "scflow-alone")],
)
def test_two_ranks_train_two_networks_in_turn_as_one_process_does(out, name, same_as):
    assert difference(found(out, name)["weights"], found(out, same_as)["weights"]) < 1e-6


def test_times_stay_fp32_where_a_sharded_network_computes_in_bf16(out):
    mixed = found(out, "fsdp2-mixed")
    assert set(mixed["times"]) == {"torch.float32"}
    assert difference(mixed["gradient"], found(out, "alone")["gradient"]) < 2e-2


@pytest.mark.parametrize("name", ["ddp", "ddp-lightning", "fsdp2", "fsdp2-parts", "alone-lightning"])
def test_averages_follow_the_weights_wherever_these_are(out, name):
    averaged, one = found(out, name), found(out, "alone")
    assert difference(averaged["averages"], one["averages"]) < 1e-6
    assert difference(averaged["averages"], averaged["weights"]) > 1e-3
    assert difference(averaged["after"], averaged["weights"]) == 0, "looking at the averages changes no weight"


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_saved_network_is_whole_and_averaged(out, name):
    settings = {"prediction": PredictData(), "time_scale": 10.0, "context_width": 16, "latent_size": 8}
    saved = SanaFlowMap(pretrained=str(out / name / "network"), **settings)
    assert difference(dict(saved.named_parameters()), found(out, "alone")["averages"]) < 1e-6


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_sharded_network_generates_the_images_of_a_whole_one(out, name):
    assert difference({"x": found(out, name)["latents"]}, {"x": found(out, "alone")["latents"]}) < 1e-5


def test_few_step_sampling_leaves_sharded_training_as_it_was(out):
    watched, unwatched = found(out, "watched"), found(out, "unwatched")
    for kind in ("weights", "averages"):
        assert difference(watched[kind], unwatched[kind]) == 0
    records = [json.loads(line) for line in (out / "watched/shapes/scores.jsonl").read_text().splitlines()]
    assert [(r["step"], r["steps"]) for r in records] == [(0, 1), (0, 2), (2, 1), (2, 2), (STEPS, 1), (STEPS, 2)]
    assert all(sum(record["scores"]["images"].values()) == 15 for record in records), "each image once"


def test_the_self_check_goes_through_a_sharded_network_on_all_ranks_together(out):
    for rank in range(2):
        said = (out / f"check-{rank}.txt").read_text()
        assert "of fp32 differences" in said and "r = t exact" in said and "each rank has its own part" in said


@pytest.mark.parametrize("resumed", ["one-from-one", "two-from-one", "one-from-parts", "two-from-parts"])
def test_a_checkpoint_of_two_ranks_goes_on_with_one_or_two(out, resumed):
    whole, part = found(out, "alone"), found(out, resumed)
    for kind in ("weights", "averages"):
        assert difference(part[kind], whole[kind]) < 1e-6


def test_a_run_killed_on_two_ranks_resumes_to_the_weights_of_an_uninterrupted_one(out):
    resumed, whole = found(out, "killed"), found(out, "unkilled")
    for kind in ("weights", "averages"):
        assert difference(resumed[kind], whole[kind]) == 0


def test_what_cannot_be_sharded_is_refused_with_the_remedy(out):
    said = json.loads((out / "refused.json").read_text())
    assert "set data_parallel_size: 2, tensor_parallel_size: 1" in said["auto"]
    assert "name WeightEMA" in said["averages"]
    assert "sharded over 1 of 2 ranks" in said["apart"]
    assert "--trainer.strategy auto, or ddp" in said["prediction"]
    assert "ModelParallelStrategy shards one network" in said["alternating"]
    assert "set it to 0, or train with ddp" in said["summary"]
