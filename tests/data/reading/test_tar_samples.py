from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from emf_lightning.data.reading.tar_samples import count_samples, read_samples
from tests.data.tars import noise_image, write_numbered, write_tar


def test_members_are_grouped_by_the_name_up_to_the_first_dot_of_its_last_part(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        {"v1.0/a.jpg": b"1", "v1.0/a.seg.png": b"2", "v1.0/a.txt": b"3", "v1.0/b.JSON": b"4", "v1.0/b.webp": b"5"},
    )
    first, second = read_samples(path)
    assert (first.location, first.image, first.text, first.json) == (f"{path}/v1.0/a", b"1", b"3", None)
    assert (second.image, second.text, second.json) == (b"5", None, b"4")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_the_gnu_and_the_pax_form(tmp_path: Path, form: int) -> None:
    name = "folder/" * 20 + "long_" * 30
    with tarfile.open(tmp_path / "x.tar", "w", format=form, pax_headers={"comment": "global"}) as tar:
        for extension in ("png", "txt"):
            info = tarfile.TarInfo(f"{name}.{extension}")
            info.size, info.mtime = 3, 0.5
            tar.addfile(info, io.BytesIO(b"abc"))
    (sample,) = read_samples(str(tmp_path / "x.tar"))
    assert sample.location.endswith(name)
    assert (sample.image, sample.text) == (b"abc", b"abc")


def test_folders_and_links_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        info = tarfile.TarInfo("b.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    (sample,) = read_samples(str(tmp_path / "x.tar"))
    assert sample.text == b"hi"


def test_reading_from_any_samples_end_gives_the_rest(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path, [6])
    samples = list(read_samples(path))
    for sample in samples:
        assert list(read_samples(path, sample.end, sample.number + 1)) == samples[sample.number + 1 :]


def test_parts_are_disjoint_and_complete(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path, [11])
    parts = [list(read_samples(path, part=part, parts=3)) for part in range(3)]
    assert sorted(sample.number for part in parts for sample in part) == list(range(11))
    assert all(sample.image == noise_image(sample.number) for part in parts for sample in part)


@pytest.mark.parametrize("keep", range(0, 4 * 1024 + 1, 256))
def test_a_cut_anywhere_is_one_fault_behind_the_whole_samples(tmp_path: Path, keep: int) -> None:
    (path,) = write_numbered(tmp_path, [4])
    whole = list(read_samples(path))
    data = Path(path).read_bytes()
    cut = min(keep * whole[-1].end // 4096, whole[-1].end)
    Path(path).write_bytes(data[:cut])
    *samples, fault = read_samples(path)
    assert fault.fault == "truncated shard"
    kept = sum(sample.end <= cut for sample in whole)
    # the last sample is complete if only padding after it is missing, or has its image alone
    assert kept <= len(samples) <= kept + 1
    assert [s.image for s in samples] == [s.image for s in whole[: len(samples)]]
    assert [s.text for s in samples[:kept]] == [s.text for s in whole[:kept]]
    assert {s.text for s in samples[kept:]} <= {None, whole[kept % 4].text}
    for parts in (2, 3):
        dealt = [sample for part in range(parts) for sample in read_samples(path, part=part, parts=parts)]
        assert [sample.fault for sample in dealt].count("truncated shard") == 1


def test_rubbish_in_the_middle_is_a_damaged_stretch_behind_which_reading_goes_on(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path, [4])
    end = list(read_samples(path))[1].end
    data = bytearray(Path(path).read_bytes())
    data[end : end + 512] = b"\x07" * 512
    Path(path).write_bytes(data)
    samples = list(read_samples(path))
    assert [sample.fault for sample in samples] == [None, None, "damaged shard", None, None]
    assert [sample.text for sample in samples] == [f"sample {n}".encode() if n >= 0 else None for n in (0, 1, -1, 2, 3)]
    assert [sample.image is None for sample in samples] == [False, False, True, True, False]
    for sample in samples:
        assert list(read_samples(path, sample.end, sample.number + 1)) == samples[sample.number + 1 :]


def test_shard_that_vanished_is_a_fault_that_says_so(tmp_path: Path) -> None:
    (fault,) = read_samples(str(tmp_path / "gone.tar"))
    assert fault.fault == "unreadable shard (FileNotFoundError)"


def test_shards_behind_an_address_are_read_alike(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path, [4])
    local, remote = list(read_samples(path)), list(read_samples(f"file://{path}"))
    assert [(s.image, s.text, s.end) for s in local] == [(s.image, s.text, s.end) for s in remote]


def compressed(path: str) -> str:
    """The path of the same shard behind gzip."""
    with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb") as file:
        file.write(plain.read())
    return f"{path}.gz"


def contents(samples) -> list[tuple]:
    return [(s.number, s.end, s.image, s.text, s.fault) for s in samples]


def test_a_compressed_shard_has_the_same_samples_at_the_same_offsets(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path, [6])
    samples, packed = list(read_samples(path)), compressed(path)
    assert contents(read_samples(packed)) == contents(samples)
    for sample in samples:
        rest = read_samples(packed, sample.end, sample.number + 1)
        assert contents(rest) == contents(samples[sample.number + 1 :])
    assert contents(read_samples(packed, part=1, parts=3)) == contents(samples[1::3])
    assert contents(read_samples(f"file://{packed}")) == contents(samples)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_compressed_shard_that_is_cut_ends_in_a_fault_behind_which_nothing_comes_twice(
    tmp_path: Path, kept: float
) -> None:
    (path,) = write_numbered(tmp_path, [6])
    whole, packed = list(read_samples(path)), compressed(path)
    data = Path(packed).read_bytes()
    Path(packed).write_bytes(data[: int(len(data) * kept)])
    *samples, fault = read_samples(packed)
    assert fault.fault == "truncated shard"
    assert 0 < len(samples) < 6
    assert contents(samples)[:-1] == contents(whole[: len(samples) - 1])
    assert samples[-1].image == whole[len(samples) - 1].image
    assert not list(read_samples(packed, fault.end, fault.number + 1))


def test_a_damaged_compressed_shard_ends_in_a_fault(tmp_path: Path) -> None:
    packed = compressed(write_numbered(tmp_path, [6])[0])
    data = bytearray(Path(packed).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = b"\xff" * 200
    Path(packed).write_bytes(data)
    *_, fault = read_samples(packed)
    assert fault.fault in ("damaged shard", "truncated shard")
    Path(packed).write_bytes(b"no gzip at all")
    (fault,) = read_samples(packed)
    assert fault.fault == "unreadable shard (BadGzipFile)"


def test_samples_are_counted_exactly_where_that_is_cheap_and_guessed_elsewhere(tmp_path: Path) -> None:
    members = {f"{number}.png": noise_image(number, (40, 40)) for number in range(150)}
    path = write_tar(tmp_path / "x.tar", members)
    assert count_samples(path) == 150
    for other in (compressed(path), f"file://{path}"):
        assert 0.7 * 150 < count_samples(other) < 1.3 * 150
    (few,) = write_numbered(tmp_path / "few", [7])
    assert count_samples(few) == count_samples(compressed(few)) == 7
    assert count_samples(str(tmp_path / "none.tar")) == 0
