from __future__ import annotations

from pathlib import Path

import pytest

from emf_lightning.data.cache import network_disk
from emf_lightning.data.cache.network_disk import check_one_machine, network_file_system

MOUNTS = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:25 / /shared rw,relatime shared:9 - nfs4 server:/export rw,vers=4.2
31 30 8:2 / /shared/scratch rw - xfs /dev/sdb1 rw
32 22 0:26 / /my\040disk rw - lustre mds:/fs rw
33 22 8:3 / /twice rw - nfs server:/a rw
34 22 8:4 / /twice rw - ext4 /dev/sdc1 rw
35 22 0:27 / /däta rw - fuse.beegfs x rw
a line of another kind
36 - x
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    (tmp_path / "mounts").write_text(MOUNTS)
    return tmp_path / "mounts"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/cache", None),
        ("/shared", "nfs4"),
        ("/shared/data/cache", "nfs4"),
        ("/shared2/cache", None),
        ("/shared/scratch/cache", None),
        ("/my disk/cache", "lustre"),
        ("/twice/cache", None),
        ("/däta/cache", "beegfs"),
    ],
)
def test_the_innermost_mount_decides(mounts: Path, path: str, kind: str | None) -> None:
    assert network_file_system(path, mounts) == kind


def test_without_a_list_of_mounts_no_disk_is_of_the_network(tmp_path: Path) -> None:
    assert network_file_system("/shared", tmp_path / "none") is None
    assert network_file_system(tmp_path) is None


def test_several_machines_may_not_write_over_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network_disk, "NETWORK_FILE_SYSTEMS", {own_file_system(tmp_path)})
    check_one_machine(tmp_path / "cache", 1)
    with pytest.raises(ValueError, match=r"network disk .*, where LMDB serves one machine, and 2 machines would"):
        check_one_machine(tmp_path / "cache", 2)


def test_what_nobody_may_write_to_is_read_by_any_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network_disk, "NETWORK_FILE_SYSTEMS", {own_file_system(tmp_path)})
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root
    check_one_machine(tmp_path, 2)


def own_file_system(path: Path) -> str:
    """The type of the file system of ``path``, as Linux lists it."""
    lines = [line.partition(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    points = {before.split()[4]: after.split()[0] for before, _, after in lines}
    return next(points[str(folder)].removeprefix("fuse.") for folder in (path, *path.parents) if str(folder) in points)
