"""Measures how fast the feature cache writes and reads entries of BLIP3o-NEXT's size, by dtype and number of readers.

Writes docs/results/feature_cache.md; `python -m benchmarks.feature_cache --help` names the options.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from emf_lightning.data.cache.entry_cache import format_bytes
from emf_lightning.data.cache.entry_format import EntryFormat, StoredDtype
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache_filling import DTYPES
from emf_lightning.text.base import TextFeatures

LENGTH, WIDTH, BATCH = 730, 2304, 16


@dataclass(frozen=True)
class Measured:
    """One dtype: samples a second written, read by each number of processes (memory, disk), and the error."""

    dtype: StoredDtype
    bytes_each: int
    error: float
    written: float
    read: dict[int, float]
    read_cold: dict[int, float]
    plain: float


def features(rows: int, seed: int) -> TextFeatures:
    """Normal numbers, which is what a norm leaves; a few channels ten times as large, as language models have."""
    context = torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    context[..., ::500] *= 10
    return TextFeatures(context, torch.ones(rows, LENGTH, dtype=torch.bool))


def opened(path: str, dtype: StoredDtype, max_gb: float) -> FeatureCache:
    """The cache, bound to entries of the published size."""
    cache = FeatureCache(path, max_gb, dtype)
    cache._open("benchmark", LENGTH, WIDTH)
    return cache


def read(path: str, dtype: StoredDtype, max_gb: float, first: int, samples: int, step: int) -> None:
    """What one worker of a loader does: reads a batch, lets it go."""
    torch.set_num_threads(1)
    cache = opened(path, dtype, max_gb)
    names = [str(number) for number in range(first, samples, step)]
    for start in range(0, len(names), BATCH):
        cache.read(names[start : start + BATCH])
    assert cache.misses == 0


def rate(path: str, dtype: StoredDtype, max_gb: float, samples: int, readers: int, cold: bool) -> float:
    """Samples a second that ``readers`` processes read together."""
    if cold:
        forget(Path(path) / "data.mdb")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=read, args=(path, dtype, max_gb, k, samples, readers)) for k in range(readers)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return samples / (time.perf_counter() - began)


def forget(file: Path) -> None:
    """Drops the file's pages from memory, so that the next reading is from the disk."""
    with file.open("rb") as opened_file:
        os.fsync(opened_file.fileno())
        os.posix_fadvise(opened_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_speed(file: Path) -> float:
    """Bytes a second of reading the file from end to end, from the disk."""
    forget(file)
    began, total = time.perf_counter(), 0
    with file.open("rb", buffering=0) as opened_file:
        while chunk := opened_file.read(1 << 22):
            total += len(chunk)
    return total / (time.perf_counter() - began)


def measure(folder: Path, samples: int, readers: list[int]) -> Iterator[Measured]:
    """Each dtype, in a folder of its own that is removed behind it."""
    for dtype in DTYPES:
        path, max_gb = str(folder / dtype), samples * 8e-3 + 0.1
        cache = opened(path, dtype, max_gb)
        error = EntryFormat(LENGTH, WIDTH, dtype).error(*vars(features(2, 0)).values())
        seconds = 0.0
        for start in range(0, samples, BATCH):
            rows = features(min(BATCH, samples - start), start)
            began = time.perf_counter()
            cache.store([str(start + row) for row in range(len(rows))], rows)
            seconds += time.perf_counter() - began
        yield Measured(
            dtype,
            cache.size(1),
            error,
            samples / seconds,
            {n: rate(path, dtype, max_gb, samples, n, cold=False) for n in readers},
            {n: rate(path, dtype, max_gb, samples, n, cold=True) for n in readers},
            plain_speed(Path(path) / "data.mdb"),
        )
        shutil.rmtree(path)


def report(found: list[Measured], samples: int) -> str:
    """A table in Markdown."""
    readers = list(found[0].read)
    heads = [f"{n} reader{'s' if n > 1 else ''}" for n in readers]
    lines = [
        "# Feature cache",
        "",
        "`python -m benchmarks.feature_cache` writes this page: the text-feature cache at BLIP3o-NEXT's size,",
        f"{LENGTH} x {WIDTH} numbers a sample, {samples} samples, batches of {BATCH}; {os.cpu_count()} CPU threads.",
        "",
        "Rates are samples per second. Each reader column gives the rate from memory and from the disk; a tenth of a",
        "second of each measurement is the start of the process.",
        "",
        f"| dtype | one sample | 170,000 samples | relative error | write rate | {' | '.join(heads)} | raw disk |",
        "|---|" + "---:|" * (5 + len(readers)),
    ]
    for each in found:
        rates = [f"{each.read[n]:.0f} / {each.read_cold[n]:.0f}" for n in readers]
        lines.append(
            f"| {each.dtype} | {format_bytes(each.bytes_each)} | {format_bytes(170_000 * each.bytes_each)} "
            f"| {each.error:.2%} | {each.written:.0f} | {' | '.join(rates)} "
            f"| {each.plain / each.bytes_each:.0f} ({format_bytes(each.plain)}/s) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path("docs/results/feature_cache.md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = list(measure(Path(folder), options.samples, options.readers))
    options.out.write_text(report(found, options.samples))
    print(options.out.read_text())


if __name__ == "__main__":
    main()
