from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.raw_batch import RawBatch
from emf_lightning.data.reading.streams import ShardStream
from tests.data.tars import SIDE, write_numbered


def captions(batches: list[RawBatch]) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


def one_lane(shards: list[str], rank: int, ranks: int, lane: int, lanes: int, **options: int) -> list[RawBatch]:
    """All batches of one lane of one rank."""
    stream = ShardStream(shards, SquareTransform(SIDE), 4, rank=rank, ranks=ranks, lanes=lanes, **options)
    stream.start(0, stream._positions, lane)
    return list(stream)


@pytest.mark.parametrize("sizes", [[5, 9, 4, 7, 6, 5, 8], [30, 11], [23], [1, 1, 1]])
def test_each_sample_is_in_exactly_one_lane_of_two_ranks_with_two_workers(tmp_path: Path, sizes: list[int]) -> None:
    shards = write_numbered(tmp_path, sizes)
    seen = []
    for rank in range(2):
        for lane in range(2):
            seen += captions(one_lane(shards, rank, 2, lane, 2, shuffle_block=3))
    assert sorted(seen) == sorted(f"sample {number}" for number in range(sum(sizes)))


def test_lanes_are_within_one_shard_and_one_sample_of_each_other(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [8] * 5)
    lengths = [len(captions(one_lane(shards, rank, 2, lane, 2, shuffle_block=3))) for rank in (0, 1) for lane in (0, 1)]
    assert lengths == [10, 10, 10, 10]


def test_without_a_shuffle_samples_come_in_the_order_of_the_shards(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [5, 6])
    assert captions(list(ShardStream(shards, SquareTransform(SIDE), 4))) == [f"sample {number}" for number in range(11)]


def test_order_is_a_function_of_seed_and_pass(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [6, 6, 6])

    def order(seed: int, epoch: int) -> list[str]:
        stream = ShardStream(shards, SquareTransform(SIDE), 4, shuffle_block=8, seed=seed)
        stream.start(epoch, stream._positions, 0)
        return captions(list(stream))

    assert order(1, 0) == order(1, 0)
    orders = [order(1, 0), order(1, 1), order(2, 0)]
    assert len({tuple(each) for each in orders}) == 3
    assert all(sorted(each) == sorted(orders[0]) for each in orders)


def test_limit_is_the_first_samples_dealt_to_the_ranks(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [20])
    seen = [captions(one_lane(shards, rank, 2, 0, 1, limit=7)) for rank in range(2)]
    assert [len(each) for each in seen] == [4, 3]
    assert set(seen[0] + seen[1]) == {f"sample {number}" for number in range(7)}


def test_images_are_the_captions_images(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [6, 6])
    plain = list(ShardStream(shards, SquareTransform(SIDE), 3))
    shuffled = list(ShardStream(shards, SquareTransform(SIDE), 5, shuffle_block=7))
    images = {c: image for batch in plain for c, image in zip(batch.captions, batch.images, strict=True)}
    for batch in shuffled:
        for caption, image in zip(batch.captions, batch.images, strict=True):
            assert torch.equal(image, images[caption])


def test_flip_mirrors_some_images_and_repeats_itself(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [16])
    plain = torch.cat([batch.images for batch in ShardStream(shards, SquareTransform(SIDE), 4)])
    first, second = (
        torch.cat([b.images for b in ShardStream(shards, SquareTransform(SIDE), 4, flip=True)]) for _ in range(2)
    )
    assert torch.equal(first, second)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(first, plain, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(first, plain, strict=True)]
    assert any(mirrored)
    assert any(same)
    assert all(a or b for a, b in zip(mirrored, same, strict=True))


def test_resume_reads_no_more_than_one_block_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_numbered(tmp_path, [64])
    loader = ShardLoader(ShardStream(shards, SquareTransform(SIDE), 4, shuffle_block=8))
    batches = iter(loader)
    for _ in range(15):
        loader.acknowledge(next(batches))
    state = loader.state_dict()

    from emf_lightning.data.reading import streams

    read: list[str] = []
    original = streams.read_samples

    def counting(*arguments):  # type: ignore[no-untyped-def]
        for sample in original(*arguments):
            read.append(sample.location)
            yield sample

    monkeypatch.setattr(streams, "read_samples", counting)
    resumed = ShardLoader(ShardStream(shards, SquareTransform(SIDE), 4, shuffle_block=8))
    resumed.load_state_dict(state)
    assert captions(list(resumed)) == captions(list(batches))
    assert len(read) == 8
