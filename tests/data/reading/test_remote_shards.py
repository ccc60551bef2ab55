"""Shards behind HTTP are read ahead, and are those of the disk."""

from __future__ import annotations

import gzip
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from benchmarks.remote_shards import served
from emf_lightning.data.reading import urls
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.data.reading.tar_samples import TarSample, read_samples
from tests.data.tars import SIDE, noise_image, write_numbered, write_tar


def content(sample: TarSample) -> tuple[object, ...]:
    return sample.number, sample.end, sample.image, sample.text, sample.fault


@pytest.mark.parametrize("block", [1 << 12, 1 << 14, 1 << 22])
def test_samples_and_places_are_those_of_the_disk_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(urls, "BLOCK", block)
    sizes = [(8, 8), (70, 50), (30, 30), (8, 8), (64, 64), (8, 8)]
    members = {f"{n}.png": noise_image(n, size) for n, size in enumerate(sizes)}
    path = write_tar(tmp_path / "x.tar", members)
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    (tmp_path / "cut.tar").write_bytes(Path(path).read_bytes()[:20_000])
    with served(tmp_path) as address:
        for name in ("x.tar", "y.tar.gz", "cut.tar"):
            local = list(map(content, read_samples(str(tmp_path / name))))
            assert list(map(content, read_samples(f"{address}/{name}"))) == local
        whole = list(map(content, read_samples(path)))
        for _, end, *_ in whole[:-1]:
            number = [sample[1] for sample in whole].index(end) + 1
            assert list(map(content, read_samples(f"{address}/x.tar", end, number))) == whole[number:]
        (fault,) = read_samples(f"{address}/none.tar")
        assert fault.fault == "unreadable shard (FileNotFoundError)"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_pass_over_addresses_is_that_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(urls, "BLOCK", 1 << 12)
    paths = write_numbered(tmp_path, [17, 9, 30])

    def loader(shards: list[str]) -> ShardLoader:
        stream = ShardStream(shards, SquareTransform(SIDE), 4, shuffle_block=5, lanes=max(workers, 1), seed=3)
        return ShardLoader(stream, num_workers=workers)

    expected = [(batch.captions, batch.images.tolist()) for batch in loader(paths)]
    with served(tmp_path, 0.01) as address:
        remote = [f"{address}/{Path(path).name}" for path in paths]
        began, found = loader(remote), []
        for batch in began:
            began.acknowledge(batch)
            found.append((batch.captions, batch.images.tolist()))
            if len(found) == 5:
                break
        resumed = loader(remote)
        resumed.load_state_dict(began.state_dict())
        found += [(batch.captions, batch.images.tolist()) for batch in resumed]
    assert found == expected


@contextmanager
def failing(content: bytes, failures: list[int]) -> Iterator[str]:
    """An address whose next ``failures[0]`` answers are 503."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if failures[0] > 0:
                failures[0] -= 1
                self.send_error(503)
                return
            first, last = 0, len(content) - 1
            if given := self.headers.get("Range"):
                first, _, end = given.removeprefix("bytes=").partition("-")
                first, last = int(first), min(int(end or last), last)
            self.send_response(206 if given else 200)
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[first : last + 1])

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing: the console is pytest's."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/x.tar"
    finally:
        server.shutdown()
        server.server_close()


def test_an_outage_of_a_server_is_waited_for_at_the_opening_and_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(urls, "BLOCK", 1 << 13)
    path = write_tar(tmp_path / "x.tar", {f"{n}.png": noise_image(n, (64, 64)) for n in range(6)})
    local, failures = list(map(content, read_samples(path))), [3]
    with failing(Path(path).read_bytes(), failures) as address:
        samples = read_samples(address)
        found = [content(next(samples))]
        assert failures == [0]
        failures[0] = 3
        found += map(content, samples)
        assert failures == [0] and found == local
        failures[0] = 100
        (fault,) = read_samples(address)
        assert fault.fault == "unreadable shard (FileNotFoundError)"


class Flaky(BytesIO):
    """A file of which some reads fail, as those of a service."""

    failures = 0

    def read(self, size: int | None = -1) -> bytes:
        if Flaky.failures:
            Flaky.failures -= 1
            raise ConnectionResetError("reset by peer")
        return super().read(size)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_request_that_fails_is_made_again_from_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(urls, "PAUSES", (0.0, 0.0))
    whole = random.Random(0).randbytes(200_000)
    content = gzip.compress(whole) if compressed else whole
    opened: list[Flaky] = []

    def open_file() -> Flaky:
        opened.append(Flaky(content))
        return opened[-1]

    Flaky.failures = 0
    retried = urls.RetriedFile(open_file)
    file: Any = gzip.GzipFile(fileobj=retried) if compressed else retried
    assert file.read(4) == whole[:4]
    Flaky.failures = 2
    assert file.read(len(whole) - 4) == whole[4:]
    assert Flaky.failures == 0 and len(opened) == 3
    if not compressed:
        assert file.seek(-4, 2) == len(whole) - 4 and file.read() == whole[-4:]
        assert file.seek(2) == 2 and file.read(2) == whole[2:4]
        Flaky.failures = 3
        with pytest.raises(ConnectionResetError):
            file.read(1)
    Flaky.failures = 0
    file.close()
    retried.close()
    assert all(one.closed for one in opened)


@pytest.mark.parametrize("status", [403, 404, 503])
def test_refusals_are_not_repeated_and_failures_of_the_service_are(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    class AnswerError(Exception):
        def __init__(self) -> None:
            self.status = status

    attempts: list[int] = []

    def open_file() -> BytesIO:
        attempts.append(status)
        raise AnswerError

    monkeypatch.setattr(urls, "PAUSES", (0.0, 0.0, 0.0))
    with pytest.raises(AnswerError):
        urls.RetriedFile(open_file)
    assert len(attempts) == (4 if status == 503 else 1)


def test_every_lane_tells_of_the_part_that_a_service_did_not_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "PAUSES", ())
    with served(tmp_path) as address:
        for part in range(3):
            (fault,) = read_samples(f"{address}/none.tar", part=part, parts=3)
            assert fault.fault == "unreadable shard (FileNotFoundError)"
