from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from emf_lightning.data.reading.shard_paths import shard_paths
from emf_lightning.data.reading.tar_samples import COUNTED, count_samples, read_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b-000.tar", "a-001.tar", "a-000.tar", "a-002.tar", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def names(paths: tuple[str, ...]) -> list[str]:
    return [Path(path).name for path in paths]


def test_file_folder_glob_and_range_stand_for_their_shards_in_order(folder: Path) -> None:
    assert names(shard_paths(folder / "a-001.tar")) == ["a-001.tar"]
    assert names(shard_paths(folder)) == ["a-000.tar", "a-001.tar", "a-002.tar", "b-000.tar"]
    assert names(shard_paths(f"{folder}/a-*.tar")) == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names(shard_paths(f"{folder}/a-{{001..002}}.tar")) == ["a-001.tar", "a-002.tar"]
    assert names(shard_paths([f"{folder}/b-*.tar", str(folder / "a-000.tar")])) == ["b-000.tar", "a-000.tar"]


def test_compressed_shards_of_a_folder_are_taken_too(tmp_path: Path) -> None:
    for name in ("b.tgz", "a.tar.gz", "c.tar", "list.txt.gz"):
        (tmp_path / name).touch()
    assert names(shard_paths(tmp_path)) == ["a.tar.gz", "b.tgz", "c.tar"]


def test_addresses_are_taken_as_they_are_or_listed(folder: Path) -> None:
    assert shard_paths("https://host/x-{00..01}.tar") == ("https://host/x-00.tar", "https://host/x-01.tar")
    assert names(shard_paths(f"file://{folder}/a-*.tar")) == ["a-000.tar", "a-001.tar", "a-002.tar"]


@pytest.mark.parametrize("how", ["plain", "glob", "range", "list"])
@pytest.mark.parametrize(
    "address",
    [
        *("reference://{}/r.json/a.tar", "reference::file://{}/r.json", "zip://a.tar::file://{}/z.zip"),
        *("simplecache::file://{}/a-000.tar", "github://o:r@main/a.tar", "memory://a.tar", "FILE://{}/a-000.tar"),
        *("file://{}/a-000.tar::reference://x", "dir://a.tar", "://{}/a-000.tar", "data://x.tar", "smb://host/a.tar"),
    ],
)
def test_an_address_of_another_protocol_is_refused(folder: Path, address: str, how: str) -> None:
    entry = address.format(folder)
    shards: Any = {"plain": entry, "glob": f"{entry[:-1]}*", "range": f"{entry}{{0..1}}.tar", "list": [folder, entry]}[
        how
    ]
    with pytest.raises(ValueError, match=r"^shards: '.*' has a protocol that is not read; give a local path"):
        shard_paths(shards)
    if how == "plain":
        assert [sample.fault for sample in read_samples(entry)] == ["unreadable shard (ValueError)"]


def test_a_local_name_is_no_chain_of_protocols(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "zip::x.tar.gz", "w:gz") as tar:
        for number in range(COUNTED + 10):
            tar.addfile(tarfile.TarInfo(f"{number}.txt"))
    (path,) = shard_paths(tmp_path)
    assert len(list(read_samples(path))) == COUNTED + 10
    assert count_samples(path) > 0


@pytest.mark.parametrize("missing", ["none.tar", "none-*.tar", "a-{000..007}.tar"])
def test_entry_that_stands_for_nothing_is_named(folder: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=r"validation_shards: '.*(none|a-003).* matches no file"):
        shard_paths([str(folder / "a-000.tar"), str(folder / missing)], "validation_shards")


def test_nothing_at_all_and_other_files_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="shards is empty"):
        shard_paths([])
    with pytest.raises(ValueError, match=r"notes\.txt' is not a shard; they end in \.tar, \.tar\.gz, \.tgz"):
        shard_paths(folder / "notes.txt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{0..99999999999}", "names 100,000,000,000 shards, more than 1,000,000; correct its range"),
        ("{0..9999}-{0..9999}", "names 100,000,000 shards"),
        (f"{{0..{'9' * 30}}}", "has a range of numbers of more than 18 digits"),
        ("{7..3}", "has a range that ends before it starts, so it names no shard"),
        ("{0..999999999}-{7..3}", "has a range that ends before it starts"),
    ],
)
@pytest.mark.parametrize("place", ["", "https://host/"])
def test_a_range_of_too_many_or_no_shards_is_refused_before_it_is_expanded(name: str, said: str, place: str) -> None:
    with pytest.raises(ValueError, match=f"^data.shards: '{re.escape(f'{place}a-{name}.tar')}' {said}"):
        shard_paths(["https://host/b.tar", f"{place}a-{name}.tar"], "data.shards")


def test_ranges_of_an_entry_are_combined_with_their_leading_zeros() -> None:
    assert names(shard_paths("https://host/{1..2}-{08..10}.tar")) == [
        *("1-08.tar", "1-09.tar", "1-10.tar", "2-08.tar", "2-09.tar", "2-10.tar")
    ]
