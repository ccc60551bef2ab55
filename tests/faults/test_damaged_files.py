"""Files of each kind that are empty, damaged or may only be read: one sentence with the file's name, or use of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.cli import main
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.lmdb_store import _ENVIRONMENTS
from emf_lightning.text.words import WordEncoder
from tests.cli.world import complaint

DAMAGED = {
    "empty": b"",
    "cut": b'{"rows": [',
    "binary": b"\xff\x00\xfe",
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 99999,
}


# -- reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("name", ["report.json", "shapes/scores.jsonl"])
def test_a_report_of_damaged_scores_is_refused(tmp_path, capsys, name, case):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(DAMAGED[case])
    assert name in complaint(capsys, "report", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_report_without_rows_is_refused(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps({"about": {}, "levels": {}, "rows": []}))
    assert "no rows" in complaint(capsys, "report", str(tmp_path), "--out", str(tmp_path / "out"))


# -- manifests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("verb", ["shards", "captions"])
def test_a_damaged_manifest_is_named(tmp_path, capsys, verb, case):
    (tmp_path / "p.txt").write_text("a dog\n")
    options = {"shards": ["--count", "2"], "captions": ["--prompts", str(tmp_path / "p.txt")]}[verb]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_bytes(DAMAGED[case])
    assert "manifest.json" in complaint(capsys, verb, *options, "--out", str(tmp_path / "out"))


# -- progress of a score ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*DAMAGED, "tensor"])
def test_damaged_progress_of_a_score_is_named(tmp_path, capsys, case):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    Image.fromarray(np.zeros((36, 36, 3), np.uint8)).save(folder / "0.png")
    (folder / "prompts.jsonl").write_text(json.dumps({"file": "0.png", "prompt": "a photo of a red circle"}) + "\n")
    state = out / ".progress-0-of-1.pt"
    if case == "tensor":
        torch.save(torch.zeros(2), state)
    else:
        state.write_bytes(DAMAGED[case])
    metric = json.dumps(
        {
            "class_path": "SuiteScore",
            "init_args": {"suite": {"class_path": "ShapesSuite", "init_args": {"scenes_per_task": 1}}},
        }
    )
    options = ["--folder", str(folder), "--metric", metric, "--out", str(out), "--partial", "true"]
    assert f"{state} is damaged" in complaint(capsys, "score", *options)
    state.unlink()
    main(["score", *options])
    assert (out / "scores.json").is_file()


# -- caches -----------------------------------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[None]:
    """Code inside runs without root's rights, if this process has them."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A cache that another user has filled, in a folder that one may only read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    encoder = WordEncoder(width=8, length=4)
    cache = FeatureCache(folder / "cache", max_gb=0.01)
    cache.open(encoder)
    cache.store(["a dog"], encoder(["a dog"]))
    forget()
    for path in (folder / "cache").iterdir():
        path.chmod(0o444)
    (folder / "cache").chmod(0o555)
    yield folder / "cache"
    forget()
    (folder / "cache").chmod(0o755)
    shutil.rmtree(folder)


def forget() -> None:
    """Closes all caches of this process."""
    for environment in _ENVIRONMENTS.values():
        environment.close()
    _ENVIRONMENTS.clear()


def test_a_shared_cache_that_one_may_only_read_is_read(shared):
    encoder = WordEncoder(width=8, length=4)
    with nobody():
        cache = FeatureCache(shared, max_gb=0.01)
        cache.open(encoder)
        entry = cache.fetch("a dog")
        assert entry is not None
        assert cache.holds("a dog")
        assert not cache.holds("a cat")
        assert torch.equal(cache.unpack([entry]).context, cache.as_stored(encoder(["a dog"])).context)
        with pytest.warns(UserWarning, match="may only be read"):
            cache.store(["a cat"], encoder(["a cat"]))
        assert cache.full == 1
        assert cache.fetch("a cat") is None


def test_a_cache_that_cannot_be_made_is_an_error(shared):
    with nobody(), pytest.raises(ValueError, match="cannot write to the folder"):
        FeatureCache(shared / "new", max_gb=0.01).open(WordEncoder(width=8, length=4))


def test_a_look_into_a_damaged_cache_is_one_sentence(tmp_path):
    encoder = WordEncoder(width=8, length=4)
    cache = FeatureCache(tmp_path / "cache", max_gb=0.01)
    cache.open(encoder)
    for number in range(200):
        cache.store([f"{number}"], encoder([f"{number}"]))
    forget()
    file = tmp_path / "cache" / "data.mdb"
    content = bytearray(file.read_bytes())
    page = os.sysconf("SC_PAGE_SIZE")
    content[2 * page :] = b"\xff" * (len(content) - 2 * page)
    file.write_bytes(content)
    with lmdb.open(str(file.parent), readonly=True, lock=False) as environment:
        assert environment.stat()["entries"] == 200, "its head is intact"
    for look in (cache.fetch, cache.holds):
        with pytest.raises(ValueError, match=r"cannot read .* delete the folder"):
            look("7")
    forget()
