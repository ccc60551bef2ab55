"""Disks that several machines share, on which LMDB serves one machine at a time."""

from __future__ import annotations

import os
import re
from pathlib import Path

NETWORK_FILE_SYSTEMS = frozenset(
    [
        *("9p", "acfs", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2"),
        *("orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"),
        *("gcsfuse", "juicefs", "s3fs", "sshfs"),  # by FUSE
    ]
)
"""Types of file systems, as Linux lists them but for "fuse.", whose files several machines may open."""


def network_file_system(path: str | Path, mounts: str | Path = "/proc/self/mountinfo") -> str | None:
    """Type of the network file system on which ``path`` lies or will lie; None for a local disk, or outside Linux.

    Args:
        path: a file or folder.
        mounts: Linux's list of mounts.
    """
    try:
        lines = Path(mounts).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    place, found = os.path.realpath(path), ("", "")
    for line in lines:  # 36 35 98:0 /mnt1 /mnt/parent rw,noatime master:1 - ext3 /dev/root rw
        before, _, after = line.partition(" - ")
        if len(before.split()) < 5 or not after.split():
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])  # a space is \040
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found[0]):  # a later mount at one point hides the earlier
            found = point, after.split()[0].removeprefix("fuse.")
    return found[1] if found[1] in NETWORK_FILE_SYSTEMS else None


def check_one_machine(path: str | Path, machines: int) -> None:
    """Raises a ``ValueError`` where ``machines`` would write into one LMDB folder over the network.

    LMDB's lock is a mutex in shared memory: two machines that write at once destroy the file. A folder that this
    process may not write to is read only, by any number of machines.
    """
    if machines < 2 or (kind := network_file_system(path)) is None:
        return
    if os.path.exists(path) and not os.access(path, os.W_OK):
        return
    raise ValueError(
        f"{str(path)!r} lies on a network disk ({kind}), where LMDB serves one machine, and {machines} machines would "
        "write to it: give a path on a disk of each machine, or fill it from one machine and take the right to write "
        "to it from everybody (chmod -R a-w)"
    )
