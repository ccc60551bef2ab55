from __future__ import annotations

import io
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.reading.decoding import SquareTransform, image_key
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.picture_folders import PictureFolders
from emf_lightning.data.reading.raw_batch import Position, RawBatch
from emf_lightning.data.reading.sources import Source
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.data.reading.tar_samples import TarSample, read_samples
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.words import WordEncoder
from tests.data.tars import SIDE, noise_image, write_numbered, write_tar


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


@pytest.mark.parametrize(("shards", "ranks", "lanes"), [(300, 64, 4), (5, 2, 2), (9, 1, 4), (257, 64, 4)])
def test_shards_that_do_not_divide_evenly_are_read_by_few_lanes(shards: int, ranks: int, lanes: int) -> None:
    names, parts = [str(number) for number in range(shards)], set[tuple[str | Source, int, int]]()
    for rank in range(ranks):
        for lane in range(lanes):
            stream = ShardStream(names, SquareTransform(SIDE), 4, rank=rank, ranks=ranks, lanes=lanes, shuffle_block=2)
            read = stream.lane_shards(0, lane)
            assert len(read) <= shards // (ranks * lanes) + 2
            for shard, part, of, width in read:
                mine = {(shard, residue, of) for residue in range(part, part + width)}
                assert not mine & parts
                parts |= mine
    whole = {shard for shard, _, of in parts if of == 1}
    split = {shard for shard, _, of in parts if of > 1}
    assert len(whole) + len(split) == shards and not whole & split
    assert len(parts) == len(whole) + len(split) * ranks * lanes, "every sample of a split shard is in one lane"


@pytest.mark.parametrize("shuffle_block", [0, 4])
@pytest.mark.parametrize(("ranks", "lanes"), [(1, 1), (2, 2), (8, 1)])
def test_folders_of_pictures_beside_shards_are_read_by_all_lanes(tmp_path: Path, ranks, lanes, shuffle_block) -> None:
    shards = write_numbered(tmp_path / "shards", [10] * 16)
    for number in range(160, 480):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / f"pictures/{number}.png").write_bytes(noise_image(SIDE))
        (tmp_path / f"pictures/{number}.txt").write_text(f"sample {number}")
    sources = [PictureFolders([str(tmp_path / "pictures")]), *shards]

    read = [
        captions(one_lane(sources, rank, ranks, lane, lanes, shuffle_block=shuffle_block))
        for rank in range(ranks)
        for lane in range(lanes)
    ]
    assert sorted(itertools.chain(*read)) == sorted(f"sample {number}" for number in range(480))
    folder = [[int(caption.split()[1]) >= 160 for caption in part] for part in read]
    assert max(map(sum, folder)) - min(map(sum, folder)) <= 1
    if shuffle_block and ranks * lanes > 1:  # a batch of all ranks mixes them with the shards
        assert len({part.index(True) for part in folder}) > 1


def test_a_worker_holds_one_block(tmp_path: Path) -> None:
    stream = ShardStream(write_numbered(tmp_path, [12, 12, 12]), SquareTransform(SIDE), 4, shuffle_block=6)
    read, made, held = stream._read, list[weakref.ref[TarSample]](), list[int]()

    def counted(lane: int, position: Position) -> Iterator[tuple[Position, TarSample]]:
        for after, sample in read(lane, position):
            made.append(weakref.ref(sample))
            held.append(sum(one() is not None for one in made))
            yield after, sample

    stream._read = counted
    assert sum(1 for _ in stream._samples(0, Position())) == 36
    assert max(held) <= 7  # and the one that was given last


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


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_take_equal_parts_of_many_small_validation_shards(tmp_path: Path, ranks: int) -> None:
    shards = write_numbered(tmp_path, [1] * 12)
    seen = [captions(one_lane(shards, rank, ranks, 0, 1, limit=100)) for rank in range(ranks)]
    assert sorted(itertools.chain(*seen)) == sorted(f"sample {number}" for number in range(12))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


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


def with_damaged_images(folder: Path, count: int, damaged: set[int]) -> str:
    """A shard of samples "sample 0", "sample 1", ..., some of them with half an image."""
    members = {}
    for number in range(count):
        image = noise_image(number)
        image = image[: len(image) // 2] if number in damaged else image
        members |= {f"{number:06d}.png": image, f"{number:06d}.txt": f"sample {number}".encode()}
    return write_tar(folder / "part.tar", members)


@pytest.mark.parametrize("damaged", [set(), {1}, {0, 1, 2, 3}, {3, 4, 5, 11}, set(range(0, 23, 2)), {22}], ids=str)
@pytest.mark.parametrize("latents", [False, True])
def test_batches_stay_full_and_in_order_where_images_of_cached_captions_are_damaged(
    tmp_path: Path, damaged: set[int], latents: bool
) -> None:
    encoder, shard = WordEncoder(width=8, length=4), with_damaged_images(tmp_path, 23, damaged)
    cache, latent_cache = FeatureCache(tmp_path / "f", 0.01), LatentCache(tmp_path / "l", 0.01)
    cache.open(encoder)
    latent_cache.open(Pixels(), SIDE, str(SquareTransform(SIDE)))
    held = [f"sample {number}" for number in range(23) if number % 3]
    cache.store(held, encoder(held))
    latent_cache.store([image_key(sample, False) for sample in list(read_samples(shard))[:3]], torch.randn(3, 3, 8, 8))
    stream = ShardStream([shard], SquareTransform(SIDE), 4, feature_cache=cache, shuffle_block=3)
    stream.latent_cache = latent_cache if latents else None
    plain = {sample.location: sample.text for sample in read_samples(shard)}
    order = [plain[sample.location].decode() for _, sample, _ in stream._samples(0, Position())]
    usable = [caption for caption in order if int(caption[7:]) not in damaged - (set(range(3)) if latents else set())]
    batches = list(stream)
    assert [batch.captions for batch in batches if len(batch)] == [
        tuple(usable[first : first + 4]) for first in range(0, len(usable), 4)
    ]
    assert sum(batch.skipped.get("corrupt image", 0) for batch in batches) == 23 - len(usable)
    for batch in batches[:-1]:
        found = [caption for caption in batch.captions if caption in held]
        assert batch.features.found.tolist() == [caption in held for caption in batch.captions]
        assert found == [] or torch.equal(batch.features.hits.context, encoder(found).context)
        needed = [
            int(c[7:]) for c, cached in zip(batch.captions, batch.latents.found.tolist(), strict=True) if not cached
        ]
        pictures = [np.asarray(Image.open(io.BytesIO(noise_image(number)))) for number in needed]
        assert len(batch.images) == len(pictures)
        for image, picture in zip(batch.images, pictures, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), picture)
    for index, batch in enumerate(batches[:-1]):  # a run that goes on after any batch sees the same
        stream.start(0, [batch.position], 0)
        assert [rest.captions for rest in stream] == [rest.captions for rest in batches[index + 1 :]]


def test_a_worker_s_batch_lies_in_memory_that_the_trainer_reads(tmp_path: Path) -> None:
    shards, encoder = write_numbered(tmp_path, [8]), WordEncoder(width=8, length=4)
    cache = FeatureCache(tmp_path / "f", 0.01)
    cache.open(encoder)
    cache.store(["sample 1"], encoder(["sample 1"]))
    stream = SharedMemory(shards, SquareTransform(SIDE), 4, feature_cache=cache)
    with pytest.warns(UserWarning, match="left out"):  # the notes are in the place of reasons
        shared = list(ShardLoader(stream, num_workers=1))
    assert [each.examples for each in shared] == [{"images": "True", "features": "True"}, {"images": "True"}]


class SharedMemory(ShardStream):
    """Notes in the worker which tensors of a batch are in shared memory before torch sends them."""

    def __iter__(self) -> Iterator[RawBatch]:
        for batch in super().__iter__():
            if len(batch):
                batch.examples = {"images": str(batch.images.is_shared())}
                if batch.features.hits is not None:
                    batch.examples["features"] = str(batch.features.hits.context.is_shared())
                yield batch
