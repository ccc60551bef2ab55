"""Measures shards behind HTTP: whether the network hides behind decoding. Writes into docs/performance.md.

The server, in a process of its own, waits before it answers each request. `python -m benchmarks.remote_shards --help`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

from benchmarks.data_path import photograph, shard
from benchmarks.pages import MACHINE, rows, write_tables
from emf_lightning.data.reading import urls
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.data.reading.tar_members import ShardFile

WORKERS = (0, 1, 2)
SIZE, SIDE, BATCH = (768, 512), 256, 16
DELAYS = (0.0, 0.05, 0.5)


def _serve(folder: Path, delay: float, port: Connection) -> None:
    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(delay)
            path = folder / self.path.rpartition("/")[2]
            size = path.stat().st_size if path.is_file() else 0
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first = int(asked[1]) if asked else 0
            last = min(int(asked[2] or size), size - 1) if asked else size - 1
            status = 404 if not path.is_file() else 416 if first >= size else 206 if asked else 200
            body = last - first + 1 if status < 400 else 0
            self.send_response(status)
            self.send_header("Content-Length", str(body))
            self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            if body and self.command == "GET":
                with path.open("rb") as file:
                    file.seek(first)
                    self.wfile.write(file.read(body))

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        port.send(server.server_port)
        server.serve_forever()


@contextmanager
def served(folder: Path, delay: float = 0.0) -> Iterator[str]:
    """The address of a server of the folder's files, which waits ``delay`` seconds before each answer."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(folder, delay, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def rate(shards: list[str], workers: int) -> tuple[float, float]:
    """Samples a second of one pass, and seconds in which this process read, by the wall's clock.

    Both leave out the first batch, within which workers start.
    """
    stream = ShardStream(shards, SquareTransform(SIDE), BATCH, lanes=max(workers, 1))
    loader = ShardLoader(stream, num_workers=workers)
    original, waited = ShardFile.read, 0.0

    def timed(file: ShardFile, offset: int, size: int) -> bytes:
        nonlocal waited
        began = time.perf_counter()
        data = original(file, offset, size)
        waited += time.perf_counter() - began
        return data

    with patch.object(ShardFile, "read", timed):
        batches = iter(loader)
        next(batches)
        began = time.perf_counter()
        count = sum(map(len, batches))
        seconds = time.perf_counter() - began
    assert not loader.skipped
    return count / seconds, waited


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--samples", type=int, default=100, help="of a shard")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = [photograph(number, SIZE) for number in range(24)]
        members: dict[str, bytes] = {}
        for number in range(options.samples):
            members |= {f"{number:05d}.jpg": pictures[number % 24], f"{number:05d}.txt": b"a photograph"}
        shards = [shard(folder / f"{number}.tar", members) for number in range(options.shards)]

        def measure(about: str, paths: list[str]) -> None:
            for workers in WORKERS:
                found[about, workers].append(rate(paths, workers))

        with served(folder) as address:  # warms up
            rate([f"{address}/0.tar"], 0)
        for _ in range(options.rounds):
            measure("local files", shards)
            for delay in DELAYS:
                about = f"HTTP, {1e3 * delay:.0f} ms a request"
                with served(folder, delay) as address:
                    remote = [f"{address}/{Path(path).name}" for path in shards]
                    measure(about, remote)
                    with patch.object(urls, "SERVICES", ()):
                        measure(f"{about}, fsspec's default", remote)
    cells: list[list[object]] = []
    for about in dict.fromkeys(about for about, _ in found):
        rates, waits = (
            [statistics.median(each[part] for each in found[about, workers]) for workers in WORKERS] for part in (0, 1)
        )
        cells.append([about, waits[WORKERS.index(0)], *rates])
    heads = ["reader", "reading, s", *(f"samples/s, {workers} workers" for workers in WORKERS)]
    megabytes = len(pictures[0]) * options.samples / 1e6
    how = (
        f"`python -m benchmarks.remote_shards`: {options.shards} shards of {megabytes:.0f} MB, {SIZE[0]} x {SIZE[1]} "
        f"to {SIDE}, median of {options.rounds} rounds, by the wall's clock, without the first batch; {MACHINE}."
    )
    write_tables(options.out, {"REMOTE": [how, "", *rows(heads, cells)]})


if __name__ == "__main__":
    main()
