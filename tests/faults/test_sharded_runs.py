"""A damaged sharded checkpoint, given to a verb of the command line, is one sentence, and its weights are not used."""

from __future__ import annotations

import pickle
import shutil
import sys
import warnings
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from benchmarks import fault_runner
from emf_lightning.cli import main
from tests.cli.world import BASE
from tests.faults.sharded_ranks import Bomb, flip, short

RUN = "runs/tiny/version_0"
NAMED = ("--config", f"{RUN}/config.yaml", "--ckpt_path", f"{RUN}/checkpoints/last.ckpt")
STRATEGY = """trainer:
  strategy:
    class_path: ModelParallelStrategy
    init_args: {data_parallel_size: 1, tensor_parallel_size: 1}
"""
SHARD = "__0_0.distcp"
DAMAGE = {
    "a bit of a shard": lambda folder: flip(folder / SHARD, 0.5),
    "a short shard": lambda folder: short(folder / SHARD),
    "a shard is missing": lambda folder: (folder / SHARD).unlink(),
    "a short index": lambda folder: short(folder / ".metadata"),
    "an empty index": lambda folder: (folder / ".metadata").write_bytes(b""),
    "a stranger's index": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Bomb())),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "a bit of the rest": lambda folder: flip(folder / "meta.pt", 0.5),
    "digests of a stranger": lambda folder: (folder / "digests.json").write_text('["__0_0.distcp"]'),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def told(arguments: list[str]) -> None:
    """Runs the command line, and prints its warnings, which pytest would take."""
    with warnings.catch_warnings(record=True) as warned:
        try:
            main(arguments)
        finally:
            sys.stdout.writelines(f"{one.message}\n" for one in warned)


def call(place: Path, *arguments: str) -> fault_runner.Ending:
    return fault_runner.run(partial(told, list(arguments)), place)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of two steps lies, with a sharded checkpoint of each."""
    place = tmp_path_factory.mktemp("sharded")
    saver = "{save_last: true, every_n_train_steps: 1, save_top_k: -1}"
    text = BASE.replace("{save_last: true}", saver).replace("trainer:\n", STRATEGY, 1)
    (place / "run.yaml").write_text(text.replace("  shards: shards", "  shards: shards\n  validation_shards: shards"))
    assert call(place, "shards", "--out", "shards", "--count", "16", "--samples_per_shard", "8").status == 0
    ending = call(place, "fit", "--config", "run.yaml")
    assert ending.status == 0, ending.output
    assert (place / "runs/tiny/version_0/checkpoints/last.ckpt/.metadata").is_file()
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


QUICK = [("validate", "a bit of a shard"), ("test", "a stranger's index")]


@pytest.mark.parametrize(
    ("verb", "damage"),
    QUICK
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in product(("validate", "test"), DAMAGE)
        if case not in QUICK
    ],
)
def test_damage_of_the_last_checkpoint_ends_in_the_one_before_or_in_a_sentence(place, verb, damage):
    checkpoints = place / RUN / "checkpoints"
    DAMAGE[damage](checkpoints / "last.ckpt")

    ending = call(place, verb, *(NAMED if verb == "validate" else ("--run", RUN)))
    assert ending.status == 0, ending.output
    assert "the newest whole checkpoint beside it, is used instead" in ending.output

    for other in checkpoints.glob("epoch*"):
        shutil.rmtree(other)
    for options in (NAMED, ("--run", RUN)):
        ending = call(place, verb, *options)
        said = [line for line in ending.output.splitlines() if line.startswith(f"emf {verb}: ")]
        assert ending.status == 2 and not ending.traceback, ending.output
        assert len(said) == 1 and f"{RUN}/checkpoints/last.ckpt" in said[0], ending.output
        assert "mse_v_at" not in ending.output  # no number of damaged weights
    assert not (place / "canary").exists()


def test_a_whole_one_is_validated_through_both_options(place):
    for options in (NAMED, ("--run", RUN)):
        ending = call(place, "validate", *options)
        assert ending.status == 0 and "mse_v_at" in ending.output, ending.output
