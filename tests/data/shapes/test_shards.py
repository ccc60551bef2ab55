from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emf_lightning.data.reading.tar_samples import read_samples
from emf_lightning.data.shapes.scenes import TASK_WEIGHTS, training_scene
from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import SMALL


def contents(paths: tuple[Path, ...]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


def test_shards_hold_the_count_in_order_with_image_caption_and_record(tmp_path: Path) -> None:
    paths = write_shards(SMALL, tmp_path, 25, samples_per_shard=10, seed=5)
    assert [path.name for path in paths] == ["shapes-000000.tar", "shapes-000001.tar", "shapes-000002.tar"]
    samples = [list(read_samples(str(path))) for path in paths]
    assert [len(shard) for shard in samples] == [10, 10, 5]
    assert [sample.location[-9:] for shard in samples for sample in shard] == [f"{n:09d}" for n in range(25)]
    rng = np.random.default_rng([5, 1])
    for sample in samples[1]:
        scene = training_scene(SMALL, rng)
        assert sample.text is not None
        assert sample.text.decode() == scene.prompt.prompt
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image or b""))), scene.render(SMALL))
        record = json.loads(sample.json or b"")
        assert record["tag"] == scene.prompt.tag
        assert record["prompt"] == scene.prompt.prompt
        assert [thing["shape"] for thing in record["objects"]] == [thing.shape for thing in scene.objects]


def test_bytes_do_not_depend_on_who_writes_them(tmp_path: Path) -> None:
    alone = write_shards(SMALL, tmp_path / "alone", 12, samples_per_shard=4)
    together = write_shards(SMALL, tmp_path / "together", 12, samples_per_shard=4, workers=2)
    assert contents(alone) == contents(together)


def test_another_seed_gives_other_samples(tmp_path: Path) -> None:
    assert contents(write_shards(SMALL, tmp_path / "a", 5)) != contents(write_shards(SMALL, tmp_path / "b", 5, seed=1))


def test_repeated_call_writes_only_what_is_missing(tmp_path: Path) -> None:
    paths = write_shards(SMALL, tmp_path, 12, samples_per_shard=4)
    before = contents(paths)
    paths[1].unlink()
    times = [paths[0].stat().st_mtime_ns, paths[2].stat().st_mtime_ns]
    calls: list[tuple[int, int]] = []
    write_shards(SMALL, tmp_path, 12, samples_per_shard=4, progress=lambda *call: calls.append(call))
    assert contents(paths) == before
    assert [paths[0].stat().st_mtime_ns, paths[2].stat().st_mtime_ns] == times
    assert calls == [(3, 3)]


def test_failed_call_leaves_no_shard_under_its_name(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_shards(replace(SMALL, colours=("no such colour",) * 8), tmp_path, 5)
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("change", ["world", "seed", "count", "samples_per_shard", "task_weights"])
def test_folder_of_other_shards_is_refused_and_left_alone(tmp_path: Path, change: str) -> None:
    before = contents(write_shards(SMALL, tmp_path, 4))
    arguments = {"world": SMALL, "count": 4, "seed": 0, "samples_per_shard": 2000}
    others = {"world": replace(SMALL, canvas=48), "seed": 1, "count": 5, "samples_per_shard": 3}

    others["task_weights"] = TASK_WEIGHTS | {"colors": 9.0}
    with pytest.raises(ValueError, match=f"shards of another {change}"):
        write_shards(**(arguments | {change: others[change]}), directory=tmp_path)  # type: ignore[arg-type]
    assert contents(tuple(tmp_path.glob("*.tar"))) == before


def test_shards_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shapes-000000.tar").touch()
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        write_shards(SMALL, tmp_path, 4)


@pytest.mark.parametrize("argument", ["count", "samples_per_shard"])
def test_counts_below_one_are_refused(tmp_path: Path, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        write_shards(SMALL, tmp_path, **({"count": 4} | {argument: 0}))  # type: ignore[arg-type]
