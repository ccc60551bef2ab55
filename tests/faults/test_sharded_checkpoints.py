"""Sharded checkpoints are whole or not used: damage on one rank is seen by all, a kill in saving loses nothing.

``sharded_ranks.py`` runs them on two processes.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from emf_lightning.modules.sharded_checkpoint import _remove, check_index
from tests.faults import sharded_ranks
from tests.forked import Forked

POINTS = range(1, 10)
"""A save renames its digests, the folder that it replaces, and its own: the fourth ends in the ninth."""


def ranks(out: Path, names: str, *points: int) -> Path:
    assert Forked(sharded_ranks.main, out, names, points).wait() == 0
    return out


def check_damage(out: Path) -> None:
    said, other = (json.loads((out / "damaged" / f"damaged-{rank}.json").read_text()) for rank in (0, 1))
    assert said == other  # all ranks use the same checkpoint, or refuse it
    for case, found in said.items():
        target = case.rpartition(": ")[2]
        if case.startswith("no damage"):
            assert found == (5 if target == "last.ckpt" else 4)
        elif target == "last.ckpt":
            assert found == 4, case  # the newest whole one
        else:
            assert found.startswith("ckpt_path: /step=4.ckpt: "), case
            assert found.endswith("; give another checkpoint"), case
    assert not list((out / "damaged").rglob("canary"))
    assert not list((out / "damaged" / "run").glob(".*"))


def check_kill(out: Path, point: int) -> None:
    (killed, other), resumed = json.loads((out / "statuses.json").read_text())[f"killed-{point}"]
    assert killed == signal.SIGKILL
    assert other
    assert resumed == [0, 0]
    assert (out / f"killed-{point}" / "run" / "step=6.ckpt" / "digests.json").is_file()
    assert not list((out / f"killed-{point}" / "run").glob(".*"))  # nothing is left of the killed one


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks(tmp_path_factory.mktemp("few"), "few", 9)


def test_damage_and_a_kill_between_the_two_renames_lose_nothing(few):
    check_damage(few)
    check_kill(few, 9)


def test_all_ranks_refuse_to_save_what_is_not_finite_on_one(few):
    said, other = ((few / "poisoned" / f"said-{rank}.txt").read_text() for rank in (0, 1))
    assert said == other
    assert said.startswith("at step 4 the weights are not finite (")
    assert sorted(path.name for path in (few / "poisoned" / "run").iterdir()) == ["last.ckpt", "step=2.ckpt"]


@pytest.mark.slow
def test_no_damage_of_any_file_is_used(tmp_path):
    check_damage(ranks(tmp_path, "all"))


@pytest.mark.slow
def test_a_kill_at_any_rename_loses_nothing(tmp_path):
    points = [0, *POINTS[4:]]  # the first saves have no last.ckpt to go on from
    out = ranks(tmp_path, "few", *points)
    for point in points:
        check_kill(out, point)


class Calls:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch canary",)),
        (print, ("canary",)),
        (getattr, (os, "system")),
        (pickle.loads, (b"",)),
        (subprocess.Popen, (["touch", "canary"],)),
        (check_index, (Path("."),)),
    ],
)
def test_an_index_calls_nothing(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    if call[0] is getattr:
        content = b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."
    else:
        content = pickle.dumps(Calls(*call))
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read as part of a sharded checkpoint .*it names "):
        check_index(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("module", ["pathlib", type(Path()).__module__])  # an earlier Python's name and this one's
def test_an_index_names_paths(tmp_path, module):
    (tmp_path / ".metadata").write_bytes(f"c{module}\nPosixPath\n(S'a'\ntR.".encode())
    torch.save({}, tmp_path / "meta.pt")
    check_index(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "torch.distributed.checkpoint.filesystem os.system",
        "torch.distributed.checkpoint.filesystem os",
        "torch.distributed.checkpoint.filesystem FileSystemWriter",
        "torch.distributed.checkpoint.metadata Metadata.__init__",
        "torch load",
        "torch hub",
        "torch.serialization load",
        "pathlib Path.touch",
    ],
)
def test_an_index_reaches_nothing_through_torch(tmp_path, name):
    module, name = name.split()
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(ValueError, match=f"it names {module}.{name}"):
        check_index(tmp_path)


def test_a_link_to_a_sharded_checkpoint_is_removed_and_not_what_it_names(tmp_path):
    (tmp_path / "step=6.ckpt").mkdir()
    (tmp_path / "last.ckpt").symlink_to("step=6.ckpt")
    _remove(tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step=6.ckpt"]
