import multiprocessing
import os
import pickle
import shutil
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.lookup import Lookup
from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.words import WordEncoder
from tests.forked import Forked

CAPTIONS = ["a red cube", NULL_CAPTION, "two blue rings", "a heart under a star"]


def opened(path: Path, encoder: WordEncoder | None = None, **settings) -> FeatureCache:
    cache = FeatureCache(path, **{"max_gb": 0.05, **settings})
    cache.open(encoder or WordEncoder(width=16))
    return cache


def encoded(cache: FeatureCache, captions: Sequence[str], encode) -> TextFeatures:
    """Features of captions, the missing ones by ``encode``."""
    lookup = Lookup([cache.key(caption) for caption in captions])
    return lookup.complete(lambda rows: encode([captions[row] for row in rows]), cache, torch.device("cpu"))


def refuse(captions: Sequence[str]) -> TextFeatures:
    raise AssertionError(f"encoded again: {captions}")


def in_process(work, *args) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def write_numbered(cache: FeatureCache, first: int, last: int, step: int = 8) -> None:
    torch.set_num_threads(1)
    encoder = WordEncoder(width=16)
    for i in range(first, last, step):
        encoded(cache, [f"caption {j}" for j in range(i, min(i + step, last))], encoder)


def assert_holds_exactly(cache: FeatureCache, captions: Sequence[str]) -> None:
    expected = WordEncoder(width=16)(captions)
    features = encoded(cache, captions, refuse)
    assert torch.equal(features.context, expected.context)
    assert torch.equal(features.mask, expected.mask)
    assert cache.corrupt == 0


def flip_a_bit_of(path: Path, caption: str) -> None:
    """Damages the stored tokens of ``caption`` on disk."""
    tokens = WordEncoder(width=16)([caption])
    needle = tokens.context[tokens.mask].numpy().tobytes()
    data = (path / "data.mdb").read_bytes()
    assert data.count(needle) == 1
    place = data.index(needle) + len(needle) // 2
    with (path / "data.mdb").open("r+b") as file:
        file.seek(place)
        file.write(bytes([data[place] ^ 4]))


def test_the_second_pass_never_calls_the_encoder_and_gives_the_same(tmp_path):
    cache = opened(tmp_path)
    first = encoded(cache, CAPTIONS, WordEncoder(width=16))
    assert (cache.hits, cache.misses) == (0, 4)
    for again in (cache, opened(tmp_path)):
        assert_holds_exactly(again, CAPTIONS)
        assert torch.equal(encoded(again, CAPTIONS, refuse).context, first.context)
    assert (cache.hits, cache.misses, cache.corrupt, cache.full) == (8, 4, 0, 0)


def test_misses_are_encoded_once_each_in_one_call(tmp_path):
    cache, calls = opened(tmp_path), []

    def encode(captions):
        calls.append(list(captions))
        return WordEncoder(width=16)(captions)

    encoded(cache, ["a red cube"], encode)
    mixed = ["a ring", "a red cube", "a star", "a ring", "a red cube"]
    features = encoded(cache, mixed, encode)
    assert calls == [["a red cube"], ["a ring", "a star"]]
    assert torch.equal(features.context, WordEncoder(width=16)(mixed).context)
    assert (cache.hits, cache.misses) == (2, 4)


def test_entries_are_fetched_one_by_one_and_unpacked_together(tmp_path):
    cache = opened(tmp_path, dtype="bfloat16")
    cache.store(CAPTIONS, WordEncoder(width=16)(CAPTIONS))
    entries = [cache.fetch(caption) for caption in ("two blue rings", "never seen", NULL_CAPTION)]
    assert entries[1] is None
    assert (cache.hits, cache.misses) == (2, 1)
    expected = WordEncoder(width=16)(["two blue rings", NULL_CAPTION])
    found = cache.unpack([entries[0], entries[2]])
    assert found.context.dtype == torch.bfloat16  # as stored: halves the transfers between processes and to the device
    assert torch.equal(found.context, expected.context.bfloat16())
    assert torch.equal(found.mask, expected.mask)
    assert cache.holds("two blue rings")
    assert not cache.holds("never seen")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8"])
def test_the_first_pass_is_rounded_as_the_second_one_comes_back(tmp_path, dtype):
    cache = opened(tmp_path, dtype=dtype)
    encoder = WordEncoder(width=16)
    first, second = encoded(cache, CAPTIONS, encoder), encoded(cache, CAPTIONS, refuse)
    assert first.context.dtype == second.context.dtype == torch.float32
    assert torch.equal(first.context, second.context)
    assert torch.equal(second.context, cache.entry_format.rounded(encoder(CAPTIONS).context))
    assert not torch.equal(second.context, encoder(CAPTIONS).context)


def test_another_fingerprint_or_dtype_finds_nothing_and_disturbs_nothing(tmp_path):
    encoded(opened(tmp_path), CAPTIONS, WordEncoder(width=16))
    other = WordEncoder(width=16, seed=1)
    for cache in (opened(tmp_path, other), opened(tmp_path, dtype="float16")):
        assert [cache.fetch(caption) for caption in CAPTIONS] == [None] * 4
        assert cache.corrupt == 0
    encoded(opened(tmp_path, other), CAPTIONS, other)
    assert_holds_exactly(opened(tmp_path), CAPTIONS)


def test_a_damaged_entry_is_counted_and_replaced(tmp_path):
    encoded(opened(tmp_path), CAPTIONS, WordEncoder(width=16))
    flip_a_bit_of(tmp_path, "two blue rings")
    cache, calls = opened(tmp_path), []

    def encode(captions):
        calls.append(list(captions))
        return WordEncoder(width=16)(captions)

    features = encoded(cache, CAPTIONS, encode)
    assert calls == [["two blue rings"]]
    assert (cache.hits, cache.misses, cache.corrupt) == (3, 1, 1)
    assert torch.equal(features.context, WordEncoder(width=16)(CAPTIONS).context)
    assert_holds_exactly(opened(tmp_path), CAPTIONS)


def test_an_entry_of_the_wrong_shape_is_counted_and_replaced(tmp_path):
    cache = opened(tmp_path)
    narrow = FeatureCache(tmp_path, max_gb=0.05)
    narrow.open(WordEncoder(width=8))
    narrow._salt = cache._salt  # an encoder that lies about itself
    narrow.store(CAPTIONS, WordEncoder(width=8)(CAPTIONS))
    assert [cache.fetch(caption) for caption in CAPTIONS] == [None] * 4
    assert cache.corrupt == 4
    cache.store(CAPTIONS, WordEncoder(width=16)(CAPTIONS))
    assert_holds_exactly(opened(tmp_path), CAPTIONS)


def test_intact_entries_are_not_written_again(tmp_path):
    cache = opened(tmp_path)
    encoder = WordEncoder(width=16)
    cache.store(CAPTIONS, encoder(CAPTIONS))
    before = (tmp_path / "data.mdb").read_bytes()
    cache.store(CAPTIONS, encoder(CAPTIONS))
    assert (tmp_path / "data.mdb").read_bytes() == before


def test_forked_processes_write_at_once_while_the_parent_reads(tmp_path):
    cache = opened(tmp_path)
    write_numbered(cache, 0, 8)
    # Overlapping ranges: the same captions are written by several.
    writers = [in_process(write_numbered, cache, 60 * i, 60 * i + 120) for i in range(4)]
    while any(writer.is_alive() for writer in writers):
        assert_holds_exactly(cache, [f"caption {i}" for i in range(8)])
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert_holds_exactly(opened(tmp_path), [f"caption {i}" for i in range(300)])


def test_a_spawned_process_gets_the_cache_by_pickle(tmp_path):
    cache = opened(tmp_path)
    write_numbered(cache, 0, 8)
    assert Forked(write_numbered, cache, 8, 48).wait(120) == 0  # the fork server's processes get pickles, too
    assert_holds_exactly(pickle.loads(pickle.dumps(cache)), [f"caption {i}" for i in range(48)])


def test_killed_writers_leave_whole_entries_and_a_writable_file(tmp_path):
    cache = opened(tmp_path)
    size = (tmp_path / "data.mdb").stat().st_size
    for attempt in range(6):
        start = 2000 * attempt
        writer = in_process(write_numbered, cache, start, start + 2000)
        while (tmp_path / "data.mdb").stat().st_size < size + 100_000 and writer.is_alive():
            time.sleep(0.001)  # until some transactions are through: one grows it by less
        time.sleep(0.003 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        size = (tmp_path / "data.mdb").stat().st_size
        survivors = opened(tmp_path)
        present = [survivors.fetch(f"caption {start + i}") is not None for i in range(2000)]
        assert survivors.corrupt == 0
        assert 0 < sum(present) < 2000
        assert sum(present) % 8 == 0  # whole transactions
        write_numbered(survivors, start, start + 8)
        assert_holds_exactly(survivors, [f"caption {start + i}" for i in range(8)])


def test_a_full_cache_warns_once_and_goes_on_encoding(tmp_path):
    cache = opened(tmp_path, max_gb=0.001)
    encoder = WordEncoder(width=16)
    captions = [f"{i} b c d e f g h i j k l" for i in range(1200)]
    parts = [captions[i : i + 100] for i in range(0, 1200, 100)]
    with pytest.warns(UserWarning, match=r"reached max_gb=0.001.*raise max_gb") as warned:
        features = TextFeatures.cat([encoded(cache, part, encoder) for part in parts])
    assert len(warned) == 1
    assert torch.equal(features.context, encoder(captions).context)
    held = sum(cache.fetch(caption) is not None for caption in captions)
    assert 0 < held < 1200
    assert cache.full == 1200 - held
    assert cache.corrupt == 0
    assert (tmp_path / "data.mdb").stat().st_size <= 10**6
    # The argument that the warning names does help.
    larger = opened(tmp_path, max_gb=0.01)
    encoded(larger, captions, encoder)
    assert_holds_exactly(larger, captions)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=f"FeatureCache: cannot write to the folder '{tmp_path}/file/cache'.*another"):
        opened(tmp_path / "file" / "cache")


def test_the_estimate_says_what_is_needed_and_what_there_is(tmp_path):
    cache = opened(tmp_path, WordEncoder(width=192), max_gb=16)
    # 12 x 192 x 4 bytes take three pages of 4096.
    assert cache.estimate(170_000).startswith("170,000 samples x 12.4 kB = 2.1 GB; free: ")
    assert cache.estimate(170_000).endswith("limit 16 GB")
    small = opened(tmp_path, WordEncoder(width=192), max_gb=0.1)
    assert small.estimate(170_000).endswith("limit 100 MB, which holds about 8,085: raise max_gb to 2.11")


@pytest.mark.parametrize("width", [16, 64])
def test_the_estimate_is_what_full_captions_take(tmp_path, width):
    encoder = WordEncoder(width=width)
    cache = opened(tmp_path, encoder)
    captions = [f"{i} b c d e f g h i j k l" for i in range(2000)]
    for i in range(0, 2000, 50):
        encoded(cache, captions[i : i + 50], encoder)
    used, estimated = (tmp_path / "data.mdb").stat().st_size, cache.estimate(2000)
    amount, unit = estimated.split(" = ")[1].split(";")[0].split()
    needed = float(amount) * {"kB": 1e3, "MB": 1e6}[unit]
    assert 0.8 * used < needed < 1.25 * used


def test_a_disk_smaller_than_asked_is_said_at_once(tmp_path):
    with pytest.warns(UserWarning, match=r"max_gb=.*, but the disk of .* has room for .*lower max_gb"):
        cache = opened(tmp_path, max_gb=2 * shutil.disk_usage(tmp_path).free / 1e9)
    with pytest.raises(ValueError, match=r"too small: 1,000,000,000,000 samples x .*dtype: bfloat16"):
        cache.estimate(10**12)


def test_nothing_is_written_before_it_is_opened(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"call open first"):
        cache.fetch("a red cube")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="max_gb must be at least"):
        FeatureCache(tmp_path, max_gb=0)


def test_it_warns_of_nothing_in_ordinary_use(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded(opened(tmp_path), CAPTIONS, WordEncoder(width=16))
        assert_holds_exactly(opened(tmp_path), CAPTIONS)
