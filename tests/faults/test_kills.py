"""A command that is killed at any write to the disk leaves nothing torn, and the same command ends it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature

from benchmarks import fault_runner
from benchmarks.damage_tries import Table, copied
from benchmarks.interruption_tries import VERBS, Verb, interruption_try, prepare
from tests.data.tars import noise_image
from tests.test_report_verb import trained

POINTS = ("replace", "fsync")
"""Functions of ``os`` at which a command is killed: before a file gets its name, before it is on the disk."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quick commands read."""
    world = tmp_path_factory.mktemp("world")
    (world / "prompts.txt").write_text("".join(f"a photo of {number} circles\n" for number in range(24)))
    for name in ("a", "b"):
        trained(world / "scored" / name, 0.5)
    pictures = {"image": [{"bytes": noise_image(number), "path": None} for number in range(24)]}
    Dataset.from_dict(pictures, Features({"image": ImageFeature()})).save_to_disk(str(world / "pictures"))
    return world


def killed(command: Callable[[], object], point: str, number: int) -> Callable[[], object]:
    """``command``, which dies at the given call of a function of ``os``."""

    def run() -> None:
        function, calls = getattr(os, point), []

        def die(*arguments: object, **options: object) -> object:
            calls.append(arguments)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        setattr(os, point, die)
        command()

    return run


@pytest.mark.parametrize("name", ["captions", "images", "report"])
@pytest.mark.parametrize("point", POINTS)
def test_a_command_killed_at_a_write_is_ended_by_the_same_command(world, tmp_path, name, point):
    verb: Verb = next(verb for verb in VERBS if verb.name == name)
    results = []
    for number in (10**9, 1, 2, 4):  # the first is not killed
        place = tmp_path / str(number)
        place.mkdir()
        for needed in verb.needs:
            copied(world / needed, place)
        ending = fault_runner.run(killed(verb.command(place), point, number), place)
        assert ending.status == (0 if number > 4 else -signal.SIGKILL), ending.output
        if number <= 4:
            whole = [path for path in place.rglob("*") if path.is_file() and not path.name.endswith(".partial")]
            assert all(path.stat().st_size for path in whole)
            again = fault_runner.run(verb.command(place), place)
            assert again.status == 0, again.output
        assert not list(place.rglob("*.partial"))
        results.append(verb.result(place))
    assert results[0] is not None and all(result == results[0] for result in results)


@pytest.mark.slow
def test_every_verb_survives_kills_at_random_moments(tmp_path):
    table, world = Table(), tmp_path / "world"
    world.mkdir()
    healthy = prepare(world)
    for verb in VERBS:
        for how in ("SIGKILL", "SIGTERM"):
            place = tmp_path / f"{verb.name}-{how}"
            place.mkdir()
            interruption_try(table, place, random.Random(f"{verb.name} {how}"), world, verb, how, healthy[verb.name])
    assert not table.bad
    assert len(table.rows) == 2 * len(VERBS)
