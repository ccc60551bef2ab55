"""Measures reading of pictures and of cached text features, beside what else one could use; writes docs/performance.md.

`python -m benchmarks.data_path --help` names the options. Readers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.pages import MACHINE, write_tables
from benchmarks.readers import BATCH, ENTRIES, LENGTH, WIDTH

FAST = ("simplejpeg", "zlib_ng")
SMALL = (12, 192, 4096, 128)
"""The shapes world's features: tokens, width, number of samples, batch."""
PICTURES = (((768, 512), 256), ((768, 512), 512), ((1500, 1000), 256), ((1500, 1000), 512), ((256, 256), 256))


class Reader:
    """A process of ``benchmarks.readers``, kept for all rounds."""

    def __init__(self, name: str, sources: Path | None = None, without: tuple[str, ...] = ()) -> None:
        path = [str(sources)] if sources else []
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", ""), "."]),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.readers", name, "--without", *without]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, *request: object) -> Any:
        """CPU seconds a sample; None for a task that the reader does not know."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer else None

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Row:
    """A task and its name."""

    title: str
    request: tuple[object, ...]


def photograph(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG file with the spectrum of a photograph, amplitude as 1 / frequency, at quality 90."""
    random = np.random.default_rng(number)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    noise = np.fft.fft2(random.normal(size=(3, height, width)) + random.normal(size=(1, height, width)))
    pixels = np.fft.ifft2(noise / frequency).real
    pixels = 127 + 50 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "jpeg", quality=90)
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> str:
    """A tar file of the members."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return str(path)


def tasks(folder: Path, pictures: int) -> dict[str, list[Row]]:
    """The rows of each table; writes their data."""
    found: dict[str, list[Row]] = {"pictures": [], "read": [], "write": []}
    for size in dict.fromkeys(size for size, _ in PICTURES):
        members = {}
        for number in range(pictures):
            members |= {f"{number}.jpg": photograph(number, size), f"{number}.txt": b"a photograph"}
        path = shard(folder / f"{size[0]}.tar", members)
        for side in (side for other, side in PICTURES if other == size):
            found["pictures"].append(Row(f"{size[0]} x {size[1]} to {side}", ("pictures", path, side)))
    for dtype in ("bfloat16", "float8"):
        path = shard(folder / f"{ENTRIES}.tar", {f"{number}.txt": b"%d" % number for number in range(ENTRIES)})
        found["read"].append(Row(f"{LENGTH} x {WIDTH}, {dtype}", ("read", path, dtype, LENGTH, WIDTH, BATCH)))
        found["write"].append(Row(f"{LENGTH} x {WIDTH}, {dtype}", ("write", str(folder / "written"), dtype)))
    length, width, count, batch = SMALL
    path = shard(folder / f"{count}.tar", {f"{number}.txt": b"%d" % number for number in range(count)})
    found["read"].append(Row(f"{length} x {width}, float32", ("read", path, "float32", length, width, batch)))
    return found


def readers(before: Path | None) -> dict[str, Reader]:
    """The columns' processes."""
    found = {"this project": Reader("emf", without=FAST)}
    if all(map(importlib.util.find_spec, FAST)):
        found["with `fast`"] = Reader("emf")
    if before is not None:
        found = {"before": Reader("emf", before), **found}
    others = ("webdataset", "datasets", "litdata", "safetensors")
    return found | {
        name: Reader(name) for name in (*others, "memcpy") if name == "memcpy" or importlib.util.find_spec(name)
    }


Medians = dict[str, dict[str, float]]


def measure(rows: list[Row], columns: dict[str, Reader], rounds: int) -> Medians:
    """Median CPU seconds a sample by row and column; the columns take turns, and the first round does not count."""
    found: dict[str, dict[str, list[float]]] = {row.title: defaultdict(list) for row in rows}
    for number in range(rounds + 1):
        for row in rows:
            for name, reader in columns.items():
                seconds = reader.ask(*row.request)
                if seconds is not None and number > 0:
                    found[row.title][name].append(seconds)
    return {row: {name: statistics.median(each) for name, each in cells.items()} for row, cells in found.items()}


def table(medians: Medians, head: str, rate: bool, against: str) -> list[str]:
    """Rates, or milliseconds, and in brackets how many times as fast as ``against``."""
    names = list(dict.fromkeys(name for cells in medians.values() for name in cells))
    lines = [f"| {head} | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for row, cells in medians.items():
        texts = []
        for name in names:
            if name not in cells:
                texts.append("")
                continue
            number = f"{1 / cells[name]:.0f}" if rate else f"{1e3 * cells[name]:.3g}"
            ratio = f" ({cells[against] / cells[name]:.2f})" if against in cells and name != against else ""
            texts.append(number + ratio)
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return lines


def main() -> None:
    """Measures and writes the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="src of an earlier checkout, for a column of its own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, columns = tasks(Path(folder), options.pictures), readers(options.before)
        for row in rows["read"]:
            _, path, dtype, length, width, _ = row.request
            columns["this project"].ask("fill", path, dtype, length, width)
        medians = {name: measure(each, columns, options.rounds) for name, each in rows.items()}
        peaks = {name: reader.ask("peak") for name, reader in columns.items()}
        for reader in columns.values():
            reader.close()
    how = f"`python -m benchmarks.data_path` wrote the tables: {options.rounds} rounds, readers take turns; {MACHINE}."
    tables = {
        "HOW": [how],
        "PICTURES": table(medians["pictures"], "picture", True, "webdataset"),
        "READ": table(medians["read"], "entry", False, "memcpy"),
        "WRITE": table(medians["write"], "entry", False, "memcpy"),
        "PEAK": [
            f"| MB at most | {' | '.join(peaks)} |",
            "|---|" + "---:|" * len(peaks),
            f"| pictures | {' | '.join(f'{own:.0f}' for own, _ in peaks.values())} |",
            f"| a worker that reads the cache | {' | '.join(f'{worker:.0f}' for _, worker in peaks.values())} |",
        ],
    }
    write_tables(options.out, tables)


if __name__ == "__main__":
    main()
