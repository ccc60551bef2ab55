"""Every backbone trains on two processes as on one, by DDP and by FSDP2, also with checkpointing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import two_processes
from benchmarks.tiny_backbones import BACKBONES
from benchmarks.two_processes import FOUND, WAYS
from tests.forked import Forked


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, dict[str, Any]]:
    """Backbone -> way -> the greatest relative difference of a parameter."""
    out = tmp_path_factory.mktemp("two_processes")
    assert Forked(two_processes.measure, out, folder=root).wait() == 0
    return json.loads((out / FOUND).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("way", "checkpointing"), [*itertools.product(WAYS, ("", ", checkpointing"))])
@pytest.mark.parametrize("name", BACKBONES)
def test_two_processes_train_a_backbone_as_one_does(found, name, way, checkpointing):
    assert found[name]["moved"] > 1e-3
    assert found[name][way + checkpointing] < 1e-5
