"""Measures how starts and reading grow with captions, shards, ranks, cache entries and processes.

Writes into docs/performance.md; `python -m benchmarks.scale --help` names the options. Each measurement is a fork of
this process, so that what it holds in memory is its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_path import shard
from benchmarks.pages import MACHINE, rows, write_tables
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.prompt_list import PromptList
from emf_lightning.data.reading.caption_files import CaptionFiles
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.text.base import TextFeatures

FORK = multiprocessing.get_context("fork")
CAPTIONS = (1_000, 10_000, 100_000, 1_000_000)
SHARDS = (10, 100, 1_000, 10_000)
ENTRIES = (1_000, 10_000, 100_000, 1_000_000)
PROCESSES = (1, 2, 4)
RANKS = 64
DISTINCT = 50
"""Different shards; the others are links to them."""
SIZES = {"4 x 8, float32": (4, 8, "float32", 20_000), "730 x 2304, bfloat16": (730, 2304, "bfloat16", 96)}
"""Entries that several processes write and read: tokens, width, dtype, number."""


def own_memory() -> float:
    """MB of memory that is no part of a file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1000 if found else float("nan")


def give_back_freed_memory() -> None:
    """Free memory that the C library keeps goes back to the system: a call that took it would seem to hold nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def measured(call: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Seconds of CPU, and MB that the process holds afterwards in addition, of a call in a process of its own."""
    here, there = FORK.Pipe()

    def run() -> None:
        give_back_freed_memory()
        before, began = own_memory(), time.process_time()
        kept = call(*arguments)
        seconds = time.process_time() - began
        there.send((seconds, own_memory() - before))
        del kept

    process = FORK.Process(target=run)
    process.start()
    answer: tuple[float, float] = here.recv()
    process.join()
    return answer


def exponent(sizes: Sequence[int], values: Sequence[float]) -> str:
    """The slope of the last three values over their sizes, both as logarithms: 1 grows in proportion, 0 not at all."""
    if min(values[-3:]) <= 0:
        return ""
    return f"{np.polyfit(np.log(sizes[-3:]), np.log(values[-3:]), 1)[0]:.2f}"


def caption_files(folder: Path, count: int) -> dict[str, Path]:
    """A file of prompts, and one of JSON lines with captions of images."""
    texts = [
        f"a photo of a {n % 97} red cube beside {n} blue spheres, in the style of painter {n % 1009}"
        for n in range(count)
    ]
    prompts, captions = folder / f"{count}.txt", folder / f"{count}.jsonl"
    prompts.write_text("\n".join(texts))
    captions.write_text(
        "\n".join(json.dumps({"caption": text, "image": f"{n:08d}.jpg"}) for n, text in enumerate(texts))
    )
    return {"prompts": prompts, "captions": captions}


def caption_starts(folder: Path, sizes: Sequence[int]) -> list[tuple[str, int, list[tuple[float, float]]]]:
    """(kind, lines, first and next start) of files of captions; where nothing is kept, both cost the same."""
    found = []
    for count in sizes:
        for kind, path in caption_files(folder, count).items():
            call: Any = PromptList if kind == "prompts" else CaptionFiles
            found.append((kind, count, [measured(call, path), measured(call, path)]))
    return found


def before(sources: Path, sizes: Sequence[int]) -> dict[tuple[str, int], tuple[float, float]]:
    """The starts with the sources of an earlier checkout."""
    path = os.pathsep.join([str(sources), os.environ.get("PYTHONPATH", ""), "."])
    command = [sys.executable, "-m", "benchmarks.scale", "--captions-alone", *map(str, sizes)]
    answer = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    return {(kind, count): tuple(second) for kind, count, (_, second) in json.loads(answer.stdout)}


def captions_table(folder: Path, sizes: Sequence[int], sources: Path | None) -> list[str]:
    earlier = {} if sources is None else before(sources, sizes)
    starts = caption_starts(folder, sizes)
    cells: list[list[object]] = []
    for kind in ("prompts", "captions"):
        mine = [(count, times) for each, count, times in starts if each == kind]
        for count, ((first, _), (again, memory)) in mine:
            old = [1e3 * earlier[kind, count][0], earlier[kind, count][1]] if earlier else ["", ""]
            cells.append([kind, count, *old, 1e3 * first, 1e3 * again, memory])
        counts, series = (
            [count for count, _ in mine],
            [[times[0][0] for _, times in mine], [times[1][0] for _, times in mine]],
        )
        past = (
            [exponent(counts, [earlier[kind, count][part] for count in counts]) for part in (0, 1)]
            if earlier
            else ["", ""]
        )
        cells.append([kind, "exponent", *past, *(exponent(counts, values) for values in series), ""])
    heads = ["file", "lines", "before, ms", "before, MB", "first start, ms", "next start, ms", "next start, MB"]
    return rows(heads, cells)


def uneven_shards(folder: Path, count: int) -> list[str]:
    """Shards of 1 to some dozens of captions, 8 in the median, most of them links."""
    sizes = np.maximum(np.random.default_rng(0).lognormal(np.log(8), 0.7, DISTINCT).astype(int), 1)
    distinct = folder / "distinct"
    if not distinct.exists():
        distinct.mkdir()
        for number, size in enumerate(sizes):
            shard(distinct / f"{number}.tar", {f"{n}.txt": b"a caption" for n in range(size)})
    place = folder / str(count)
    place.mkdir()
    for number in range(count):
        os.link(distinct / f"{number % DISTINCT}.tar", place / f"{number:05d}.tar")
    return sorted(map(str, place.iterdir()))


def stream(shards: Sequence[str], rank: int) -> ShardStream:
    """The share of one of 64 ranks."""
    options: dict[str, Any] = {"shuffle_block": 64, "images": False, "rank": rank, "ranks": RANKS}
    return ShardStream(shards, SquareTransform(8), 4, **options)


def shares(shards: Sequence[str]) -> list[int]:
    """Number of samples of each rank; an AssertionError if one is read twice or never."""
    seen = [_locations(stream(shards, rank)) for rank in range(RANKS)]
    every = [location for share in seen for location in share]
    assert sorted(every) == sorted(_locations(ShardStream(shards, SquareTransform(8), 4, images=False)))
    return list(map(len, seen))


def _locations(share: ShardStream) -> list[str]:
    return [sample.location for _, sample, _ in share._samples(0, share._positions[0])]


def shards_table(folder: Path, sizes: Sequence[int]) -> list[str]:
    from emf_lightning.data.reading.sources import count_all
    from emf_lightning.data.reading.tar_samples import count_samples

    cells: list[list[Any]] = []
    for number in sizes:
        paths = uneven_shards(folder, number)
        every, _ = measured(lambda paths=paths: sum(map(count_samples, paths)))
        estimate, _ = measured(count_all, paths)
        first, memory = measured(lambda paths=paths: next(iter(stream(paths, 0))))
        share = np.array(shares(paths))
        deal = [f"{share.max() / share.mean():.2f}", f"{share.min() / share.mean():.2f}"]
        cells.append([number, 1e3 * every, 1e3 * estimate, 1e3 * first, memory, *deal])
    slopes = [exponent(sizes, [row[column] for row in cells]) for column in (1, 2, 3)]
    heads = [
        "shards",
        "counting all, ms",
        "`emf cache`'s estimate, ms",
        "first batch, ms",
        "MB",
        "largest share",
        "least share",
    ]
    return rows(heads, [*cells, ["exponent", *slopes, "", "", ""]])


def opened(path: str, length: int, width: int, dtype: str, max_gb: float) -> FeatureCache:
    """A cache bound to entries of this size."""
    cache = FeatureCache(path, max_gb, dtype)  # type: ignore[arg-type]
    cache._open("benchmark", length, width)
    return cache


def store(path: str, size: tuple[int, int, str], names: Sequence[str], batch: int, max_gb: float) -> None:
    """Writes entries with these names."""
    cache = opened(path, *size, max_gb)
    length, width, _ = size
    context = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))
    for first in range(0, len(names), batch):
        part = names[first : first + batch]
        cache.store(part, TextFeatures(context[: len(part)], torch.ones(len(part), length, dtype=torch.bool)))
    assert not cache.full


def fetch(path: str, size: tuple[int, int, str], names: Sequence[str], batch: int, max_gb: float) -> None:
    """Reads the entries with these names."""
    cache = opened(path, *size, max_gb)
    for first in range(0, len(names), batch):
        cache.read(names[first : first + batch])
    assert not cache.misses


def entries_table(folder: Path, sizes: Sequence[int]) -> list[str]:
    size, cells = (4, 8, "float32"), list[list[Any]]()
    for count in sizes:
        path = str(folder / f"entries{count}")
        store(path, size, [str(n) for n in range(count)], 1 << 15, 2.0)
        chosen = [str(n) for n in np.random.default_rng(0).integers(count, size=128)]
        opening, _ = measured(opened, path, *size, 2.0)
        first, memory = measured(fetch, path, size, chosen, 128, 2.0)
        cells.append([count, 1e3 * opening, 1e3 * first, memory, os.stat(f"{path}/data.mdb").st_size / 1e6])
    slopes = [exponent(sizes, [row[column] for row in cells]) for column in (1, 2)]
    heads = ["entries", "opening, ms", "opening and a batch of 128, ms", "MB", "file, MB"]
    return rows(heads, [*cells, ["exponent", *slopes, "", ""]])


def together(call: Callable[..., None], path: str, size: tuple[int, int, str], count: int, processes: int) -> float:
    """Entries a second, by the wall's clock, that the processes write or read together, each its part."""
    batch = 16 if count < 1000 else 512
    names = [str(n) for n in range(count)]
    workers = [FORK.Process(target=call, args=(path, size, names[k::processes], batch, 2.0)) for k in range(processes)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return count / (time.perf_counter() - began)


def processes_table(folder: Path) -> list[str]:
    cells = []
    for title, (*shape, count) in SIZES.items():
        size: Any = tuple(shape)
        for verb, call in (("written", store), ("read", fetch)):
            paths = [str(folder / f"{title[:3]}{n if call is store else PROCESSES[0]}") for n in PROCESSES]
            rates = [together(call, path, size, count, n) for path, n in zip(paths, PROCESSES, strict=True)]
            cells.append([f"{title}, {verb}", *rates])
    return rows(["entries a second", *(f"{n} process{'es' * (n > 1)}" for n in PROCESSES)], cells)


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="src of an earlier checkout, for columns of its own")
    parser.add_argument("--captions-alone", type=int, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, default=10**6, help="leaves out sizes above this, for a quick try")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        if options.captions_alone:
            print(json.dumps(caption_starts(folder, options.captions_alone)))
            return
        captions, shards, entries = (
            [size for size in sizes if size <= options.most] for sizes in (CAPTIONS, SHARDS, ENTRIES)
        )
        how = f"`python -m benchmarks.scale` wrote these tables; {MACHINE}, {os.cpu_count()} threads."
        write_tables(options.out, {"SCALE": [how]})
        write_tables(options.out, {"CAPTIONS": captions_table(folder, captions, options.before)})
        write_tables(options.out, {"SHARDS": shards_table(folder, shards)})
        write_tables(options.out, {"PROCESSES": processes_table(folder)})
        write_tables(options.out, {"ENTRIES": entries_table(folder, entries)})


if __name__ == "__main__":
    main()
