"""A disk that is really full: one sentence, no empty file, and nothing old is destroyed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import fault_runner
from emf_lightning.cli import main
from emf_lightning.modules.checkpoint_files import WholeCheckpointIO
from tests.cli.world import BASE


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def filled(disk: Path, left: int = 0) -> None:
    """Fills the disk but for ``left`` bytes."""
    (disk / "filler").write_bytes(bytes(max(os.statvfs(disk).f_bavail * 4096 - left, 0)))


def content(disk: Path) -> dict[str, bytes]:
    return {str(p.relative_to(disk)): p.read_bytes() for p in disk.rglob("*") if p.is_file() and p.name != "filler"}


def refused(place: Path, *arguments: str) -> str:
    """The one line that a command ends with."""
    ending = fault_runner.run(partial(main, list(arguments)), place)
    assert ending.status == 2 and not ending.traceback, ending.output
    (line,) = (line for line in ending.output.splitlines() if line.startswith("emf "))
    return line


def test_a_checkpoint_keeps_the_one_before(disk):
    last = disk / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(9)}}, last)
    before = content(disk)
    filled(disk, 16_384)
    with pytest.raises(OSError, match=r"No space left on device.*last.ckpt"):
        WholeCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(9999)}}, last)
    assert content(disk) == before


@pytest.mark.parametrize("left", [0, 8192, 20_000])
def test_shards_and_captions_leave_whole_files_alone(disk, tmp_path, left):
    (tmp_path / "prompts.txt").write_text("".join(f"caption {n}\n" for n in range(40)))
    filled(disk, left)
    for verb in (
        ["shards", "--count", "48", "--samples_per_shard", "8", "--workers", "1"],
        ["captions", "--prompts", "prompts.txt", "--samples_per_shard", "4"],
    ):
        out = disk / verb[0]
        line = refused(tmp_path, *verb, "--out", str(out))
        assert "no space left on device; make room, or write elsewhere" in line and str(out) in line
        assert all(content(disk).values())
        assert not list(disk.rglob("*.partial"))
    (disk / "filler").unlink()
    ending = fault_runner.run(partial(main, [*verb, "--out", str(out)]), tmp_path)  # the same call again
    assert ending.status == 0 and len(list(out.glob("*.tar"))) == 10, ending.output


def test_a_run_an_export_and_a_cache_say_so(disk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(BASE)
    main(["shards", "--out", "shards", "--count", "16", "--samples_per_shard", "8"])
    main(["fit", "--config", "run.yaml"])
    (disk / "old").write_text("old")
    filled(disk, 60_000)
    run = tmp_path / "runs/tiny/version_0"
    for verb in (
        ["export", "--run", str(run), "--out", str(disk / "export")],
        ["fit", "--config", "run.yaml", "--trainer.logger.init_args.save_dir", str(disk / "runs")],
        ["cache", "--config", "run.yaml", "--data.cache", "FeatureCache", "--data.cache.path", str(disk / "cache")],
    ):
        line = refused(tmp_path, *verb)
        assert any(words in line for words in ("no space left on device", "too small", "no room on the disk")), line
        assert content(disk)["old"] == b"old"
    assert not (disk / "export").exists() and not list(disk.rglob("*.partial"))
    assert all(path.stat().st_size for path in disk.rglob("*.ckpt"))
