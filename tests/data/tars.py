"""Small shards for the tests in this folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 8


def noise_image(number: int, size: tuple[int, int] = (SIDE, SIDE), form: str = "png") -> bytes:
    """An image of noise that is a function of ``number``."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    """The path of a new tar file with these members, in order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_numbered(folder: Path, sizes: list[int]) -> list[str]:
    """Shards of ``sizes`` samples, captioned "sample 0", "sample 1", ... through all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for shard, size in enumerate(sizes):
        members = {}
        for number in range(first, first + size):
            members |= {f"{number:06d}.png": noise_image(number), f"{number:06d}.txt": f"sample {number}".encode()}
        first += size
        paths.append(write_tar(folder / f"part-{shard}.tar", members))
    return paths
