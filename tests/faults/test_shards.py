"""Shards that are damaged, odd or hostile: every usable sample is used, all else is counted, nothing hangs."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.cache_filling import CacheFiller
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.data.reading.tar_samples import TarSample, count_samples, read_samples
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.words import WordEncoder
from tests.data.tars import SIDE, noise_image, write_numbered, write_tar

IMAGE = noise_image(0)


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes, **fields: object) -> bytes:
    return header(name, len(data), **fields) + data + bytes(-len(data) % 512)


def pair(name: str, number: int = 0) -> bytes:
    return member(f"{name}.png", noise_image(number)) + member(f"{name}.txt", f"sample {number}".encode())


def shard(folder: Path, *parts: bytes, name: str = "x.tar") -> str:
    (folder / name).write_bytes(b"".join(parts) + bytes(1024))
    return str(folder / name)


def usable(samples: list[TarSample]) -> list[str]:
    return [s.text.decode() for s in samples if s.fault is None and s.image is not None and s.text is not None]


def reasons(samples: list[TarSample]) -> dict[str, int]:
    return dict(Counter([s.fault for s in samples if s.fault] + [reason for s in samples for reason, _ in s.ignored]))


def read(path: str) -> list[TarSample]:
    """All samples; checks that reading from any sample's end gives the rest, and that parts are disjoint."""
    samples = list(read_samples(path))
    for n, sample in enumerate(samples):
        assert list(read_samples(path, sample.end, sample.number + 1)) == samples[n + 1 :]
    parts = [sample for part in range(3) for sample in read_samples(path, part=part, parts=3)]
    assert sorted(s.number for s in parts) == [s.number for s in samples]
    assert usable(sorted(parts, key=lambda s: s.number)) == usable(samples)
    return samples


@pytest.mark.parametrize("zeros", [512, 1024, 4096, 1 << 20])
def test_zeros_between_samples_are_no_end(tmp_path: Path, zeros: int) -> None:
    path = shard(tmp_path, pair("a", 0), bytes(zeros), pair("b", 1))
    samples = read(path)
    assert usable(samples) == ["sample 0", "sample 1"]
    assert reasons(samples) == {"zeros inside a shard": 1}
    assert count_samples(path) == 2


def test_zeros_over_samples_lose_these_alone(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path, [40])
    data = bytearray(Path(path).read_bytes())
    data[20480 : 20480 + 4096] = bytes(4096)
    Path(path).write_bytes(data)
    samples = read(path)
    assert len(usable(samples)) >= 36
    assert reasons(samples) == {"zeros inside a shard": 1}
    (lost,) = [s for s in samples if s.fault]
    assert lost.location == f"{path} from byte 20,480 to 24,576"


def test_concatenated_archives_are_read_whole(tmp_path: Path) -> None:
    paths = write_numbered(tmp_path, [5, 7])
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join(Path(path).read_bytes() for path in paths))
    assert usable(read(str(both))) == [f"sample {n}" for n in range(12)]


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.8])
def test_a_preallocated_download_is_a_fault(tmp_path: Path, kept: float) -> None:
    (path,) = write_numbered(tmp_path, [60])
    data = Path(path).read_bytes()
    cut = int(len(data) * kept) // 2048 * 2048
    Path(path).write_bytes(data[:cut] + bytes(len(data) - cut))
    samples = read(path)
    assert usable(samples) == [f"sample {n}" for n in range(cut // 2048)]
    assert reasons(samples) == {"shard with zeros at its end": 1}


@pytest.mark.parametrize("size", [8 << 60, 1 << 40, 1 << 87])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_size_beyond_the_shard_loses_its_member_alone(tmp_path: Path, size: int, packed: bool, kind: bytes) -> None:
    path = shard(tmp_path, pair("a", 0), header("b.txt", size, kind), pair("c", 1))
    if packed:
        Path(f"{path}.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
        path += ".gz"
    samples = read(path)
    assert usable(samples) == ["sample 0", "sample 1"]
    assert reasons(samples)["damaged shard"] == 1


@pytest.mark.parametrize("size", [-1, -512, -1024, -(1 << 40)])
def test_a_negative_size_ends(tmp_path: Path, size: int) -> None:
    samples = read(shard(tmp_path, pair("a", 0), header("b.png", size), pair("c", 1)))
    assert usable(samples) == ["sample 0", "sample 1"]
    assert reasons(samples) == {"damaged shard": 1}


def test_a_member_above_the_bound_is_left_out_unread(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=1) as tar:
        for name, size in (("a.png", 10), ("a.txt", 200_000_000), ("b.png", 10), ("b.txt", 3)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    tracemalloc.start()
    first, second = read_samples(str(tmp_path / "x.tar.gz"))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert first.text is None and second.text == bytes(3)
    assert first.ignored == (("member larger than member_mb=64", f"{tmp_path}/x.tar.gz/a.txt"),)


def pax(records: bytes) -> bytes:
    return member("PaxHeaders/x", records, kind=tarfile.XHDTYPE)


def test_a_pax_size_overrides_the_header(tmp_path: Path) -> None:
    text = b"sample 0"
    content = pax(b"10 size=8\n") + header("a.txt", 0) + text.ljust(512, b"\0")
    samples = read(shard(tmp_path, member("a.png", IMAGE), content, pair("b", 1)))
    assert usable(samples) == ["sample 0", "sample 1"] and not reasons(samples)


@pytest.mark.parametrize(
    "records",
    [b"0 a=b\n", b"-5 a=b\n", b"99 a=b\n", b"rubbish", b"12 size=-12\n"[:12], b"9" * 5000 + b" a=b\n", b"8 a b c\n"],
)
def test_a_broken_pax_header_loses_its_member_at_most(tmp_path: Path, records: bytes) -> None:
    samples = read(shard(tmp_path, pair("a", 0), pax(records), pair("b", 1), pair("c", 2)))
    assert usable(samples)[0] == "sample 0" and usable(samples)[-1] == "sample 2"
    assert reasons(samples) == {"damaged shard": 1}


def test_names_that_are_not_utf8_are_kept_apart(tmp_path: Path) -> None:
    parts = [
        pax(b"15 path=\xff%d.%s\n" % (n, e)) + member("?", d)
        for n in (1, 2)
        for e, d in ((b"png", IMAGE), (b"txt", b"%d" % n))
    ]
    assert usable(read(shard(tmp_path, *parts))) == ["1", "2"]


def test_links_and_sparse_files_are_counted(tmp_path: Path) -> None:
    sparse = header("d.png", 512, tarfile.GNUTYPE_SPARSE) + bytes(512)
    path = shard(
        tmp_path,
        pair("a", 0),
        header("b.png", 0, tarfile.LNKTYPE, linkname="a.png") + member("b.txt", b"of b"),
        header("c.png", 0, tarfile.SYMTYPE, linkname="a.png") + member("c.txt", b"of c"),
        sparse + member("d.txt", b"of d"),
        pax(b"22 GNU.sparse.major=1\n") + member("e.png", IMAGE) + member("e.txt", b"of e"),
        header("folder.png", 0, tarfile.DIRTYPE),
        pair("f", 1),
    )
    samples = read(path)
    assert usable(samples) == ["sample 0", "sample 1"]
    assert reasons(samples) == {"image is a link": 2, "image is a sparse file": 2, "image is no file": 1}


def test_keys_follow_webdatasets_rule_and_what_is_ignored_is_counted(tmp_path: Path) -> None:
    series = {f"photo.{n:03d}.png": IMAGE for n in range(1, 21)}
    path = write_tar(
        tmp_path / "x.tar",
        {"a.png": IMAGE, "._a.png": b"?", ".DS_Store": b"?", "__MACOSX/a.png": b"?", "README": b"?", "a.txt": b"of a"}
        | series
        | {"./b.png": IMAGE, "./b.seg.png": IMAGE, "./b.jpg": IMAGE, "./b.txt": b"of b"},
    )
    samples = read(path)
    assert usable(samples) == ["of a", "of b"]
    assert [s.location.removeprefix(path) for s in samples] == ["/a", "/photo", "/./b"]
    assert reasons(samples) == {
        "hidden image (of macOS, or its name starts with a dot)": 2,
        "name without an extension": 1,
        "image under a double extension": 21,
        "second image in a sample": 1,
    }


def test_the_same_name_twice_is_never_mixed(tmp_path: Path) -> None:
    path = shard(tmp_path, pair("a", 0), member("b.png", IMAGE), pair("b", 1), pair("c", 2), pair("a", 3))
    samples = read(path)
    assert usable(samples) == ["sample 0", "sample 2", "sample 3"]
    assert reasons(samples) == {"the same name twice in a sample": 1}


def test_a_shard_of_ignored_files_alone_counts_them(tmp_path: Path) -> None:
    samples = read(write_tar(tmp_path / "x.tar", {"1": b"?", "2": b"?", ".3.png": b"?"}))
    assert reasons(samples) == {
        "name without an extension": 2,
        "hidden image (of macOS, or its name starts with a dot)": 1,
    }


# -- corruption by position -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> str:
    (path,) = write_numbered(tmp_path_factory.mktemp("numbered"), [6])
    return path


def check(samples: list[TarSample], whole: list[TarSample], damage: range, packed: bool) -> None:
    """Samples are those of ``whole``, or lack a part; where one is missing or wrong, a fault tells.

    A tar has no checksum of a file's content: a caption may be wrong if the damage lies in it.
    """
    right = {s.location.rpartition("/")[2]: s for s in whole}
    given = {s.location.rpartition("/")[2]: s for s in samples if s.fault is None}
    assert given.keys() <= right.keys()
    wrong = [name for name, sample in given.items() if sample.text not in (None, right[name].text)]
    if len(given) < len(right) or (wrong and packed):
        assert any(s.fault for s in samples)
    for name in () if packed else wrong:
        content = right[name].end - 512
        assert damage.start < content + 512 and content < damage.stop


@pytest.mark.parametrize("how", ["flip", "zero", "rubbish", "cut"])
@pytest.mark.parametrize("packed", [False, True])
def test_damage_anywhere_is_survived_and_counted(tmp_path: Path, numbered: str, how: str, packed: bool) -> None:
    whole = list(read_samples(numbered))
    plain = Path(numbered).read_bytes()
    data = gzip.compress(plain) if packed else plain
    path = tmp_path / ("x.tar.gz" if packed else "x.tar")
    content = range(0) if packed else range(whole[-1].end)
    for position in range(0, len(data) if packed else content.stop, len(data) // (60 if packed else 300)):
        damaged = bytearray(data)
        if how == "cut":
            del damaged[position:]
        elif how == "flip":
            damaged[position] ^= 1 << position % 8
        else:
            damaged[position : position + 700] = (b"\0" if how == "zero" else b"\x5a") * len(
                data[position : position + 700]
            )
        path.write_bytes(damaged)
        samples = list(read_samples(str(path)))
        check(samples, whole, range(position, position + (1 if how == "flip" else 700)), packed)
        for n, sample in enumerate(samples):
            assert list(read_samples(str(path), sample.end, sample.number + 1)) == samples[n + 1 :]


MEMBERS = st.lists(
    st.one_of(
        st.tuples(st.just("member"), st.sampled_from(["a.png", "a.txt", "b.png", "b.txt", "c.001.png", ".d.png", "e"])),
        st.tuples(st.just("zeros"), st.integers(1, 9)),
        st.tuples(st.just("rubbish"), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("header"), st.integers(-(1 << 80), 1 << 80)),
        st.tuples(st.just("pax"), st.binary(max_size=60)),
    ),
    max_size=12,
)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(MEMBERS, st.binary(max_size=30))
def test_any_sequence_of_blocks_is_read_to_its_end(
    tmp_path_factory: pytest.TempPathFactory, parts: list, tail: bytes
) -> None:
    def block(kind: str, value: object) -> bytes:
        if kind == "member":
            return member(str(value), str(value).encode())
        if kind == "zeros":
            return bytes(512 * value)  # type: ignore[operator]
        if kind == "rubbish":
            return (value * 512)[:512]  # type: ignore[operator]
        return pax(value) if kind == "pax" else header("x.png", value)  # type: ignore[arg-type]

    path = tmp_path_factory.mktemp("any") / "x.tar"
    path.write_bytes(b"".join(block(*part) for part in parts) + tail)
    read(str(path))


# -- streaming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nasty(tmp_path: Path) -> str:
    deep = b'{"caption": "deep", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return shard(
        tmp_path,
        pair("good", 0),
        member("surrogate.png", IMAGE) + member("surrogate.json", rb'{"caption": "a \ud83d cat"}'),
        member("mark.png", IMAGE) + member("mark.txt", "\ufeffa dog".encode()),
        member("number.png", IMAGE) + member("number.json", b'{"caption": "a bird", "n": %s}' % (b"9" * 5000)),
        member("nan.png", IMAGE) + member("nan.json", b'{"caption": "a fox", "n": NaN}'),
        member("deep.png", IMAGE) + member("deep.json", deep),
        member("twice.png", IMAGE) + member("twice.json", b'{"caption": "one", "caption": "two"}'),
        member("null.png", IMAGE) + member("null.json", b'{"caption": null}'),
        member("latin.png", IMAGE) + member("latin.txt", "café".encode("latin-1")),
        member("utf16.png", IMAGE) + member("utf16.txt", "a cow".encode("utf-16-le")),
        member("empty.png", IMAGE) + member("empty.txt", b" \n"),
        header("link.png", 0, tarfile.LNKTYPE, linkname="good.png") + member("link.txt", b"of a link"),
        header("huge.txt", 8 << 60),
        header("negative.txt", -512),
        bytes(4096),
        member("lines.png", IMAGE) + member("lines.txt", "a\u2028hen\x85".encode()),
    )


USED = ["sample 0", "a \ufffd cat", "a dog", "a bird", "a fox", "a\u2028hen"]
COUNTED = {
    "broken JSON": 1,
    "missing caption": 2,
    "caption not UTF-8": 1,
    "caption with NUL characters": 1,
    "empty caption": 1,
    "image is a link": 1,
    "missing image": 1,
    "damaged shard": 1,
}


def test_the_nasty_shard_gives_every_usable_sample_and_counts_the_rest(nasty: str) -> None:
    stream = ShardStream([nasty], SquareTransform(SIDE), 4)
    batches = list(stream)
    assert [caption for batch in batches for caption in batch.captions] == USED
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(batch.skipped)
    assert counts == COUNTED


def test_the_cache_is_filled_from_the_same_samples(nasty: str, tmp_path: Path) -> None:
    caches = {
        "cache": FeatureCache(str(tmp_path / "features"), max_gb=0.01),
        "latent_cache": LatentCache(str(tmp_path / "latents"), max_gb=0.01),
    }
    text = WordEncoder(width=8, length=4)
    data = CaptionImageData(text, Pixels(), nasty, resolution=SIDE, batch_size=4, num_workers=0, **caches)
    *_, last = CacheFiller(data, torch.device("cpu")).fill()
    # the same picture stands beside all captions but the first, and is there by the second batch
    assert last.done + last.present == len(USED)
    assert last.skipped == COUNTED
