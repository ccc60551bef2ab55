"""Shards behind HTTP are read ahead, and are those of the disk."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from benchmarks.remote_shards import served
from emf_lightning.data.reading import urls
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.data.reading.tar_samples import TarSample, read_samples
from tests.data.tars import SIDE, noise_image, write_numbered, write_tar


def content(sample: TarSample) -> tuple[object, ...]:
    return sample.number, sample.end, sample.image, sample.text, sample.fault


@pytest.mark.parametrize("block", [1 << 12, 1 << 14, 1 << 22])
def test_samples_and_places_are_those_of_the_disk_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(urls, "BLOCK", block)
    sizes = [(8, 8), (70, 50), (30, 30), (8, 8), (64, 64), (8, 8)]
    members = {f"{n}.png": noise_image(n, size) for n, size in enumerate(sizes)}
    path = write_tar(tmp_path / "x.tar", members)
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    (tmp_path / "cut.tar").write_bytes(Path(path).read_bytes()[:20_000])
    with served(tmp_path) as address:
        for name in ("x.tar", "y.tar.gz", "cut.tar"):
            local = list(map(content, read_samples(str(tmp_path / name))))
            assert list(map(content, read_samples(f"{address}/{name}"))) == local
        whole = list(map(content, read_samples(path)))
        for _, end, *_ in whole[:-1]:
            number = [sample[1] for sample in whole].index(end) + 1
            assert list(map(content, read_samples(f"{address}/x.tar", end, number))) == whole[number:]
        (fault,) = read_samples(f"{address}/none.tar")
        assert fault.fault == "unreadable shard (FileNotFoundError)"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_pass_over_addresses_is_that_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(urls, "BLOCK", 1 << 12)
    paths = write_numbered(tmp_path, [17, 9, 30])

    def loader(shards: list[str]) -> ShardLoader:
        stream = ShardStream(shards, SquareTransform(SIDE), 4, shuffle_block=5, lanes=max(workers, 1), seed=3)
        return ShardLoader(stream, num_workers=workers)

    expected = [(batch.captions, batch.images.tolist()) for batch in loader(paths)]
    with served(tmp_path, 0.01) as address:
        remote = [f"{address}/{Path(path).name}" for path in paths]
        began, found = loader(remote), []
        for batch in began:
            began.acknowledge(batch)
            found.append((batch.captions, batch.images.tolist()))
            if len(found) == 5:
                break
        resumed = loader(remote)
        resumed.load_state_dict(began.state_dict())
        found += [(batch.captions, batch.images.tolist()) for batch in resumed]
    assert found == expected
