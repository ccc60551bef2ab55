"""Files and folders get their names when they are whole; what dead processes leave is removed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from emf_lightning.files import remove_partial, replacing, replacing_folder


def test_only_partial_files_of_dead_processes_are_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    here = socket.gethostname()
    alive, left, elsewhere = (
        tmp_path / f".a.tar.{who}.partial" for who in (f"{os.getpid()}@{here}", f"{dead.pid}@{here}", "7@elsewhere.net")
    )
    for path in (alive, left, elsewhere):
        path.touch()
    remove_partial(tmp_path)
    assert {*tmp_path.iterdir()} == {alive, elsewhere}
    os.utime(elsewhere, (0, 0))
    remove_partial(tmp_path)
    assert {*tmp_path.iterdir()} == {alive}


def test_a_shared_file_is_written_beside_its_place(tmp_path):
    with replacing(tmp_path / "a.tar", shared=True) as partial:
        partial.write_text("whole")
        assert str(os.getpid()) in partial.name
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.tar": "whole"}


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize("place", ["new", "old", "link"])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, place):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/before").touch()
    (tmp_path / "link").symlink_to("old")
    (tmp_path / f".{place}.partial").mkdir()  # of a killed process
    (tmp_path / f".{place}.partial/torn").touch()
    before = Path(tmp_path / place).exists()
    with pytest.raises(NotADirectoryError), replacing_folder(tmp_path / place) as partial:
        fill(partial, "after", "after/file")
    assert (tmp_path / place / "before").exists() == before and not (tmp_path / place / "after").exists()
    with replacing_folder(tmp_path / place) as partial:
        fill(partial, "before", "after")
    assert {path.name for path in (tmp_path / place).iterdir()} == {"before", "after"}
    assert (tmp_path / "link").is_symlink()


def test_files_of_other_names_stay_in_a_folder(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").write_text("weights")
    (tmp_path / "run/config.json").write_text("old")
    with replacing_folder(tmp_path / "run") as partial:
        (partial / "config.json").write_text("new")
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"run/checkpoints/last.ckpt": "weights", "run/config.json": "new"}
