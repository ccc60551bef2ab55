from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.streams import ShardStream
from tests.data.tars import SIDE, noise_image, write_numbered, write_tar


def make(shards: list[str], num_workers: int = 0, **options: object) -> ShardLoader:
    options = {"shuffle_block": 8, "drop_last": True, "seed": 3, **options}
    stream = ShardStream(shards, SquareTransform(SIDE), 4, lanes=max(num_workers, 1), **options)  # type: ignore[arg-type]
    return ShardLoader(stream, num_workers=num_workers)


def passes(loader: ShardLoader, count: int) -> Iterator[tuple[str, ...]]:
    """The captions of each batch of the next ``count`` passes, each acknowledged before the next is asked for."""
    for _ in range(count):
        for batch in loader:
            loader.acknowledge(batch)
            yield batch.captions


@pytest.mark.parametrize(("sizes", "num_workers"), [([19, 11, 14], 0), ([19, 11, 14], 2), ([44], 0)])
def test_resumed_batches_are_those_of_an_uninterrupted_run(tmp_path: Path, sizes: list[int], num_workers: int) -> None:
    shards = write_numbered(tmp_path, sizes)
    whole = list(passes(make(shards, num_workers), 2))
    for stop in (1, 4, 5, 9, len(whole) // 2, len(whole) // 2 + 3):
        loader = make(shards, num_workers)
        before = list(islice(passes(loader, 2), stop))
        resumed = make(shards, num_workers)
        resumed.load_state_dict(loader.state_dict())
        after = list(islice(passes(resumed, 2), len(whole) - stop))
        assert before + after == whole


def test_batches_that_were_fetched_but_not_used_come_again(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [40])
    loader = make(shards)
    fetched = list(islice(loader, 5))
    loader.acknowledge(fetched[2])
    assert [batch.captions for batch in loader][:2] == [fetched[3].captions, fetched[4].captions]


def test_last_batch_fetched_ahead_does_not_end_the_pass_before_it_is_used(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [16])
    loader = make(shards)
    fetched = list(loader)
    loader.acknowledge(fetched[2])
    assert not loader.state_dict()["ranks"][0]["finished"]
    loader.acknowledge(fetched[3])
    assert loader.state_dict()["ranks"][0]["finished"]


def test_second_pass_has_another_order_and_the_same_samples(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [16, 16])
    loader = make(shards)
    first, second = list(passes(loader, 1)), list(passes(loader, 1))
    assert first != second
    assert sorted(sum(first, ())) == sorted(sum(second, ()))


@pytest.mark.parametrize("size", [19, 23, 30])
def test_every_sample_of_a_single_source_is_in_some_pass(tmp_path: Path, size: int) -> None:
    loader = make(write_numbered(tmp_path, [size]), shuffle_block=16)
    seen = [caption for batch in passes(loader, 30) for caption in batch]
    assert len(set(seen)) == size


def test_a_pass_that_an_earlier_version_began_goes_on_and_the_next_ones_are_cut(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [40])
    earlier = make(shards, shuffle_block=16)
    earlier.stream.whole_pass = 0  # as it was
    batches = iter(earlier)
    earlier.acknowledge(next(batches))
    state = earlier.state_dict()
    rest = [batch.captions for batch in batches]
    del state["whole_pass"]
    resumed = make(shards, shuffle_block=16)
    resumed.load_state_dict(state)
    assert list(passes(resumed, 1)) == rest
    new = make(shards, shuffle_block=16)
    first = list(passes(new, 1))
    assert first[1:] != rest, "the first block is cut"
    assert list(passes(resumed, 1)) == list(passes(new, 1))


def test_state_survives_a_weights_only_load(tmp_path: Path) -> None:
    loader = make(write_numbered(tmp_path, [16]))
    loader.acknowledge(next(iter(loader)))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == loader.state_dict()


def test_other_data_than_the_checkpoints_starts_the_next_pass_with_a_warning(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [16, 16])
    loader = make(shards)
    loader.acknowledge(next(iter(loader)))
    other = make(shards, seed=4)
    with pytest.warns(UserWarning, match="other seed than the checkpoint's"):
        other.load_state_dict(loader.state_dict())
    reference = make(shards, seed=4)
    list(passes(reference, 1))
    assert list(passes(other, 1)) == list(passes(reference, 1))


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    loader = make(write_numbered(tmp_path, [16]))
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def broken_shard(path: Path) -> str:
    good = {f"{n:03d}.{e}": d for n in range(9) for e, d in (("png", noise_image(n)), ("txt", b"fine %d" % n))}
    return write_tar(
        path,
        good
        | {
            "a.png": noise_image(0)[:-40],
            "a.txt": b"cut image",
            "b.png": b"no image at all",
            "b.txt": b"no image",
            "c.png": noise_image(1),
            "d.png": noise_image(1),
            "d.txt": b"  \n",
            "e.png": noise_image(1),
            "e.json": b"{broken",
            "f.png": noise_image(1),
            "f.json": b'{"prompt": 3}',
            "g.txt": b"no image",
            "h.png": noise_image(1),
            "h.txt": b"\xff\xfe\xff",
        },
    )


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_unusable_samples_are_left_out_counted_by_reason_and_warned_of(tmp_path: Path, num_workers: int) -> None:
    loader = make([broken_shard(tmp_path / "x.tar")], num_workers)
    with pytest.warns(UserWarning, match="corrupt image; left out"):
        batches = list(passes(loader, 1))
    assert len(batches) == 2
    assert all(caption.startswith("fine") for batch in batches for caption in batch)
    assert loader.skipped == {
        "corrupt image": 2,
        "missing caption": 2,
        "empty caption": 1,
        "broken JSON": 1,
        "missing image": 1,
        "caption not UTF-8": 1,
    }


@pytest.mark.filterwarnings("ignore:.*left out")
def test_counts_are_part_of_the_state_and_not_counted_twice(tmp_path: Path) -> None:
    shards = [broken_shard(tmp_path / "x.tar"), broken_shard(tmp_path / "y.tar")]
    whole = make(shards, shuffle_block=5)
    list(passes(whole, 1))
    first = make(shards, shuffle_block=5)
    list(islice(passes(first, 1), 3))
    second = make(shards, shuffle_block=5)
    second.load_state_dict(first.state_dict())
    list(passes(second, 1))
    assert 0 < first.skipped.total() < 16
    assert second.skipped == whole.skipped
    assert whole.skipped.total() == 16


def test_cut_shard_gives_its_readable_samples_and_a_warning_with_its_name(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [16, 16])
    data = Path(shards[0]).read_bytes()
    Path(shards[0]).write_bytes(data[: data.index(b"000009.png") + 600])
    loader = make(shards, drop_last=False)
    with pytest.warns(UserWarning, match=r"part-0\.tar from byte 18,432 to the end: truncated shard"):
        batches = list(passes(loader, 1))
    kept = {f"sample {n}" for n in [*range(9), *range(16, 32)]}
    assert {caption for batch in batches for caption in batch} == kept
    assert loader.skipped == {"truncated shard": 1}


def test_data_without_one_usable_sample_is_an_error_that_counts_them(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {f"{n}.{e}": b"?" for n in range(5) for e in ("png", "txt")})
    with pytest.warns(UserWarning, match="corrupt image"), pytest.raises(ValueError, match="5 x corrupt image"):
        next(iter(make([shard])))


def test_data_smaller_than_one_batch_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no batch of 4 samples"):
        next(iter(make(write_numbered(tmp_path, [3]))))


def run_rank(rank: int, port: int, shards: list[str], results: mp.SimpleQueue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    loader = make(shards, rank=rank, ranks=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        before = list(passes(loader, 2))
    told = [str(one.message) for one in said if "of the data" in str(one.message)]
    assert [line.partition(" of the data")[0] for line in told] == ["a pass trains on about 62%"] * (rank == 0)
    same = True
    for stop in (2, 4, 5):  # in a pass, between two, in the next
        half = make(shards, rank=rank, ranks=2)
        first = list(islice(passes(half, 2), stop))
        resumed = make(shards, rank=rank, ranks=2)
        resumed.load_state_dict(half.state_dict())
        same &= first + list(islice(passes(resumed, 2), 8 - stop)) == before
    results.put((rank, len(before), same))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_with_unequal_shards_stop_together_and_resume_each_at_its_own_place(tmp_path: Path) -> None:
    import socket

    shards = write_numbered(tmp_path, [40, 16])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=run_rank, args=(rank, port, shards, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(results.get() for _ in processes) == [(0, 8, True), (1, 8, True)]


def test_a_pass_whose_last_shards_were_dealt_otherwise_ends_with_the_checkpoint(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [8] * 5)

    def loader() -> ShardLoader:
        return ShardLoader(ShardStream(shards, SquareTransform(SIDE), 4, ranks=3))

    state = loader().state_dict()
    del state["identity"]["dealing of shards"]
    with pytest.warns(UserWarning, match="other dealing of shards than the checkpoint's.*at the start of pass 1"):
        loader().load_state_dict(state)


def test_fewer_validation_samples_than_processes_are_named(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [8])
    loader = ShardLoader(ShardStream(shards, SquareTransform(SIDE), 4, rank=3, ranks=4, limit=2))
    with pytest.raises(ValueError, match="raise validation_samples: 2 leave some of 4 processes without one"):
        list(loader)


@pytest.mark.parametrize(
    ("name", "other"), [("shards", {}), ("shuffle_block", {"shuffle_block": 4}), ("workers", {"num_workers": 2})]
)
def test_positions_of_another_reading_do_not_apply(tmp_path, name, other):
    shards = write_numbered(tmp_path, [16, 16, 16])
    loader = make(shards)
    loader.acknowledge(next(iter(loader)))
    read = shards[::-1] if name == "shards" else shards
    resumed, reference = make(read, **other), make(read, **other)
    with pytest.warns(UserWarning, match=f"other {name} than the checkpoint's"):
        resumed.load_state_dict(loader.state_dict())
    list(passes(reference, 1))
    assert list(passes(resumed, 1)) == list(passes(reference, 1))
