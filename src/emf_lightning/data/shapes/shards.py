"""Shapes worlds on disk: WebDataset tar shards of captioned pictures."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from emf_lightning.data.shapes.scenes import TASK_WEIGHTS, training_scene
from emf_lightning.data.shapes.world import World

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class _Order:
    """All that the bytes of a directory's shards depend on."""

    world: World
    seed: int
    count: int
    samples_per_shard: int
    task_weights: dict[str, float]

    @property
    def shards(self) -> int:
        return -(-self.count // self.samples_per_shard)

    def manifest(self) -> dict[str, Any]:
        world = asdict(self.world) | {
            "held_out_pairs": sorted(self.world.held_out_pairs),
            "held_out_shape_pairs": sorted(sorted(pair) for pair in self.world.held_out_shape_pairs),
        }
        # through JSON, so that it compares equal to what is read back
        return json.loads(json.dumps(asdict(self) | {"world": world}))  # type: ignore[no-any-return]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_shard(order: _Order, index: int, path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng([order.seed, index])
    first = index * order.samples_per_shard
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, min(first + order.samples_per_shard, order.count)):
            scene = training_scene(order.world, rng, order.task_weights)
            picture = io.BytesIO()
            Image.fromarray(scene.draw(order.world)).save(picture, "png", compress_level=1)
            record = scene.prompt.metadata() | {"objects": [asdict(thing) for thing in scene.objects]}
            _add(tar, f"{number:09d}.png", picture.getvalue())
            _add(tar, f"{number:09d}.txt", scene.prompt.prompt.encode())
            _add(tar, f"{number:09d}.json", json.dumps(record).encode())
    os.replace(partial, path)  # a shard is there as a whole or not at all


def _claim(directory: Path, order: _Order) -> None:
    """Leaves the manifest in ``directory``, or finds the same one there."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / MANIFEST
    wanted = order.manifest()
    if path.exists():
        found = json.loads(path.read_text())
        changed = [key for key in wanted if found.get(key) != wanted[key]]
        if changed:
            raise ValueError(
                f"write_shards: directory {str(directory)!r} holds shards of another {', '.join(changed)}"
                f" (see its {MANIFEST}); choose another directory, or delete this one"
            )
        return
    if leftover := next(directory.glob("shapes-*.tar"), None):
        raise ValueError(f"write_shards: {str(leftover)!r} has no {MANIFEST} beside it; choose another directory")
    partial = path.with_name(f".{MANIFEST}.{os.getpid()}.partial")
    partial.write_text(json.dumps(wanted, indent=1) + "\n")
    os.replace(partial, path)


def write_shards(
    world: World,
    directory: str | Path,
    count: int,
    *,
    seed: int = 0,
    samples_per_shard: int = 2000,
    task_weights: Mapping[str, float] = TASK_WEIGHTS,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, ...]:
    """The paths of ``count`` training samples as shards ``shapes-000000.tar``, each ``{key}.png``, ``.txt``, ``.json``.

    A shard's bytes depend on (seed, its index) alone, and appear under its name only when complete: a killed call is
    simply repeated, and several processes may write into one directory.

    Args:
        world: what is drawn.
        directory: made if missing; it remembers what it holds in ``manifest.json``.
        count: samples in all shards together.
        seed: of scenes; another one for validation.
        samples_per_shard: the last shard may have fewer.
        task_weights: share of each task.
        workers: processes that draw; 0 draws in this one.
        progress: called with (shards done, shards in all) after each shard.

    Raises:
        ValueError: for counts below 1, or a directory that holds another world, seed or size.
    """
    for name, value in (("count", count), ("samples_per_shard", samples_per_shard)):
        if value < 1:
            raise ValueError(f"write_shards: {name} must be at least 1, got {value}")
    directory = Path(directory)
    order = _Order(world, seed, count, samples_per_shard, dict(task_weights))
    _claim(directory, order)
    paths = tuple(directory / f"shapes-{index:06d}.tar" for index in range(order.shards))
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    done = len(paths) - len(missing)

    def one_more() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(paths))

    if workers == 0:
        for index in missing:
            _write_shard(order, index, paths[index])
            one_more()
        return paths
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_write_shard, order, index, paths[index]) for index in missing]):
            future.result()
            one_more()
    return paths
