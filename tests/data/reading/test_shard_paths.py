from __future__ import annotations

from pathlib import Path

import pytest

from emf_lightning.data.reading.shard_paths import shard_paths


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


@pytest.mark.parametrize("missing", ["none.tar", "none-*.tar", "a-{000..007}.tar"])
def test_entry_that_stands_for_nothing_is_named(folder: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=r"validation_shards: '.*(none|a-003).* matches no file"):
        shard_paths([str(folder / "a-000.tar"), str(folder / missing)], "validation_shards")


def test_nothing_at_all_and_other_files_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="shards is empty"):
        shard_paths([])
    with pytest.raises(ValueError, match=r"notes\.txt' is not a shard; they end in \.tar, \.tar\.gz, \.tgz"):
        shard_paths(folder / "notes.txt")
