"""Shapes worlds on disk: WebDataset tar shards of captioned images."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from emf_lightning.data.shapes.scenes import TASK_WEIGHTS, training_scene
from emf_lightning.data.shapes.world import World
from emf_lightning.files import read_json, remove_partial, replacing

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class _ShardSpec:
    """Everything that the bytes of a directory's shards depend on."""

    world: World
    seed: int
    count: int
    samples_per_shard: int
    task_weights: dict[str, float]

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


def _write_shard(spec: _ShardSpec, index: int, path: Path) -> Path:
    from PIL import Image

    rng = np.random.default_rng([spec.seed, index])
    first = index * spec.samples_per_shard
    # a killed process leaves no part of a shard under its name
    with replacing(path, shared=True) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, min(first + spec.samples_per_shard, spec.count)):
            scene = training_scene(spec.world, rng, spec.task_weights)
            png = io.BytesIO()
            Image.fromarray(scene.render(spec.world)).save(png, "png", compress_level=1)
            record = scene.prompt.metadata() | {"objects": [asdict(item) for item in scene.objects]}
            _add(tar, f"{number:09d}.png", png.getvalue())
            _add(tar, f"{number:09d}.txt", scene.prompt.prompt.encode())
            _add(tar, f"{number:09d}.json", json.dumps(record).encode())
    return path


def _ensure_manifest(directory: Path, spec: _ShardSpec) -> None:
    """Writes the manifest into ``directory``, or checks that the one there is the same."""
    directory.mkdir(parents=True, exist_ok=True)
    remove_partial(directory)
    path = directory / MANIFEST
    wanted = spec.manifest()
    if path.exists():
        found = read_json(path, "delete it with the shards beside it, or choose another directory")
        changed = [key for key in wanted if found.get(key) != wanted[key]]
        if changed:
            raise ValueError(
                f"write_shards: directory {str(directory)!r} holds shards of another {', '.join(changed)}"
                f" (see its {MANIFEST}); choose another directory, or delete it with its shards"
            )
        return
    if leftover := next(directory.glob("shapes-*.tar"), None):
        raise ValueError(f"write_shards: {str(leftover)!r} has no {MANIFEST} beside it; choose another directory")
    with replacing(path, shared=True) as partial:
        partial.write_text(json.dumps(wanted, indent=1) + "\n")


def write_shards(
    world: World,
    directory: str | Path,
    count: int,
    *,
    seed: int = 0,
    samples_per_shard: int = 2000,
    task_weights: Mapping[str, float] = TASK_WEIGHTS,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, ...]:
    """Writes ``count`` training samples as shards ``shapes-000000.tar``: ``{key}.png``, ``.txt``, ``.json`` each.

    A shard's bytes depend on (seed, its index) alone, and it gets its name only when complete: repeat a killed call to
    finish it. Several processes may write into one directory.

    Args:
        world: whose scenes are rendered.
        directory: made if missing; its ``manifest.json`` records these arguments.
        count: samples in all shards together.
        seed: of scenes; another one for validation.
        samples_per_shard: the last shard may have fewer.
        task_weights: share of each task.
        workers: rendering processes; 0 renders in this one.
        progress: called with (shards done, shards in all) after each shard.

    Returns:
        The paths of all shards.

    Raises:
        ValueError: for counts below 1, or a directory that holds another world, seed or size.
    """
    for name, value in {"count": count, "samples_per_shard": samples_per_shard}.items():
        if value < 1:
            raise ValueError(f"write_shards: {name} must be at least 1, got {value}")
    directory = Path(directory)
    spec = _ShardSpec(world, seed, count, samples_per_shard, dict(task_weights))
    _ensure_manifest(directory, spec)
    paths = tuple(directory / f"shapes-{index:06d}.tar" for index in range(-(-count // samples_per_shard)))
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    jobs = [(spec, index, paths[index]) for index in missing]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else nullcontext() as pool:
        if pool is None:
            written = (_write_shard(*job) for job in jobs)
        else:
            written = (future.result() for future in as_completed([pool.submit(_write_shard, *job) for job in jobs]))
        for done, _ in enumerate(written, len(paths) - len(missing) + 1):
            progress(done, len(paths))
    return paths
