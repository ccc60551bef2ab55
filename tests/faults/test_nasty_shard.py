"""One sample of every nasty kind, in a shard and in an equal folder and data set, through each way that data takes.

Each sample is used with the displayed pixels and the right caption, or it is counted with its reason; nothing is lost.
"""

from __future__ import annotations

import json
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.cli import main
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.decoding import SquareTransform, decode_image, image_key
from emf_lightning.data.reading.pixels import EXTENSIONS
from emf_lightning.data.reading.tar_samples import HIDDEN, NO_EXTENSION, NO_FILE, TarSample, read_samples
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.words import WordEncoder
from tests.data.tars import noise_image
from tests.faults.nasty_samples import LEFT_OUT, RECORDS, SAMPLES, SIDE, USED, Sample, check
from tests.faults.test_shards import header, member

WORD = WordEncoder(width=8, length=4)
ALSO_IN_THE_SHARD = Counter(
    {
        HIDDEN: 2,
        NO_EXTENSION: 1,
        "image is a link": 2,
        NO_FILE: 1,
        "image under a double extension": 3,
        "second image in a sample": 1,
        "the same name twice in a sample": 1,
        "missing image": 4,  # captions of the two links, of a folder, and of the double extensions
        "damaged shard": 2,
        "zeros inside a shard": 1,
        "missing caption": 1,
    }
)


def nasty_tar() -> bytes:
    """The samples with further members between them, which only a shard can have."""
    extra = [
        member("._p0.png", b"?") + member("__MACOSX/p0.png", b"?") + member(".DS_Store", b"?") + member("README", b"?"),
        header("hard.png", 0, tarfile.LNKTYPE, linkname="p0.png") + member("hard.txt", b"of a hard link"),
        header("soft.png", 0, tarfile.SYMTYPE, linkname="p0.png") + member("soft.txt", b"of a soft link"),
        header("folder.png", 0, tarfile.DIRTYPE) + member("folder.txt", b"of a folder"),
        b"".join(member(f"photo.{n}.png", noise_image(n)) for n in range(3)) + member("photo.txt", b"of a series"),
        header("huge.txt", 8 << 60),
        header("negative.png", -512),
        bytes(4096),
        member("twice.png", noise_image(1)) * 2 + member("twice.txt", b"twice"),
        member("alone.png", noise_image(1)),
    ]
    parts = [member("two.png", noise_image(5)) + member("two.jpg", b"?") + member("two.txt", b"two pictures")]
    for number, (sample, extension) in enumerate(zip(SAMPLES, cycle(EXTENSIONS), strict=False)):
        name = f"{sample.name}.{extension.upper() if number % 3 else extension}"
        parts.append(member(name, sample.image))
        parts += [member(f"{sample.name}.txt", sample.text)] if sample.text is not None else []
        parts += [member(f"{sample.name}.json", sample.json)] if sample.json is not None else []
        parts += extra[number // 4 : number // 4 + 1] if number % 4 == 0 else []
    return b"".join(parts) + bytes(1024)


SHARD_ALONE = {"two pictures": noise_image(5)}
"""Usable samples that only the shard has."""


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nasty") / "shards" / "nasty.tar"
    path.parent.mkdir()
    path.write_bytes(nasty_tar())
    return path


def test_streaming(shard: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 1, "num_workers": 0, "resolution": SIDE}
    data = CaptionImageData(WORD, Pixels(), str(shard.parent), **settings)
    data.setup("fit")
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for raw in data.train_dataloader():
            batch = data.on_after_batch_transfer(raw, 0)
            (caption,) = batch.captions
            assert caption not in found
            found[caption] = data.decode(batch.latents)[0].numpy()
            data.train_dataloader().acknowledge(raw)
    assert found.keys() == USED.keys() | SHARD_ALONE.keys()
    for caption, sample in USED.items():
        check(found[caption], sample)
    assert data.skipped == LEFT_OUT + ALSO_IN_THE_SHARD


EXPERIMENT = f"""
data:
  text: {{class_path: WordEncoder, init_args: {{width: 8, length: 4}}}}
  autoencoder: Pixels
  cache: {{path: features, max_gb: 0.01}}
  latent_cache: {{path: latents, max_gb: 0.01}}
  shards: shards
  resolution: {SIDE}
  batch_size: 16
  num_workers: 0
model: {{class_path: FlowMapModule, init_args: {{objective: FlowMatching, net: UNetFlowMap}}}}
"""


def test_emf_cache(shard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(shard.parent.parent)
    Path("e.yaml").write_text(EXPERIMENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["cache", "--config", "e.yaml"])
    left_out = ", ".join(f"{count} x {reason}" for reason, count in sorted((LEFT_OUT + ALSO_IN_THE_SHARD).items()))
    printed = capsys.readouterr().out
    assert f"{len(USED) + len(SHARD_ALONE):,} samples written" in printed
    assert printed.endswith(f"; 0 were there; left out: {left_out}\n")
    features, latents = FeatureCache("features"), LatentCache("latents")
    features.open(WORD)
    latents.open(Pixels(), SIDE, str(SquareTransform(SIDE)))
    for caption, sample in USED.items():
        assert features.holds(features.key(caption)), sample.name
        entry = latents.fetch(image_key(TarSample("", 0, 0, sample.image), False))
        assert entry is not None
        decoded = (Pixels().decode(latents.unpack([entry])) + 1) * 127.5
        check(decoded[0].permute(1, 2, 0).round().numpy(), sample)
    for sample in (sample for sample in SAMPLES if sample.reason):
        for caption in (sample.text or b"").decode("latin-1"), (sample.text or b"").decode("latin-1").strip():
            assert not caption or not features.holds(features.key(caption))


class Seen(ImageMetric):
    """The images and prompts that a score is computed from, as rows."""

    name = title = "seen"
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("images")

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        self.rows = [{"prompt": p, "pixels": i.tolist()} for p, i in zip(prompts, images, strict=True)]
        self.images += len(images)

    def compute(self) -> dict[str, Tensor]:
        return {"score": self.images}


def test_emf_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, reasons = tmp_path / "images", {}
    folder.mkdir()
    for sample, extension in zip(SAMPLES, cycle(EXTENSIONS), strict=False):
        path = folder / f"{sample.name}.{extension}"
        if sample.text is not None:
            path.with_suffix(".txt").write_bytes(sample.text)
        else:  # GenEval's layout has a record beside each prompt's images
            path = folder / sample.name / "samples" / f"0.{extension}"
            path.parent.mkdir(parents=True)
            (path.parent.parent / "metadata.jsonl").write_bytes(sample.json or b"")
        path.write_bytes(sample.image)
        reasons[str(path)] = sample.reason
    for name in ("._p0.png", "README", "__MACOSX/p0.png", ".cache/p0.png", "DCIM0001"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"?")
    (folder / "folder.png").mkdir()
    (folder / "broken.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "soft.png").symlink_to("p0.jpg")
    os.link(folder / "p1.jpeg", folder / "hard.png")
    odd = os.fsdecode(os.fsencode(folder) + b"/000\xff.png")
    Path(odd).write_bytes(b"?")
    for path in (folder / "soft.png", folder / "hard.png", Path(odd)):
        path.with_suffix(".txt").write_text(f"of {path.stem[:4]}", errors="replace")
    reasons[odd] = "corrupt image"
    options = ["score", str(folder), "--metric", f"{__name__}.Seen", "--out", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="folder: passed over: ") as warned:
        main([*options, "--trust_remote_code"])
    (message,) = {str(warning.message) for warning in warned if "passed over" in str(warning.message)}
    for count, reason in ((3, HIDDEN), (3, NO_FILE), (2, NO_EXTENSION)):
        assert f"{count} x {reason} (" in message
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert {path: reason for reason, paths in scores["left_out"].items() for path in paths} == {
        path: reason for path, reason in reasons.items() if reason
    }
    found = {row["prompt"]: row for row in map(json.loads, (tmp_path / "out/results.jsonl").open())}
    assert found.keys() == USED.keys() | {"of soft", "of hard"}
    for caption, sample in USED.items():
        check(np.array(found[caption]["pixels"]), sample)
    assert scores["images"] == len(found)
    printed = capsys.readouterr().out
    assert f"{len(found):,} images" in printed
    assert f"x corrupt image ({folder}/000\ufffd.png first)" in printed


def row_text(sample: Sample) -> bytes | None:
    """The caption of a row in a column of text: a record's only if it is text."""
    if sample.json is None:
        return sample.text
    try:
        value = json.loads(sample.json, parse_int=float)["prompt"]
        return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def test_emf_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # a column of text has no halves of surrogate pairs, no key twice, and no broken JSON
    reasons = {s.name: s.reason for s in SAMPLES} | {"j0": "caption not UTF-8", "j1": "caption not UTF-8"}
    without = {RECORDS[name][0] for name in ("deep", "cut", "twice", "json latin")}
    kept = [s for s in SAMPLES if s.json not in without]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": s.image, "path": None} for s in kept], kind)
    texts = pa.array(map(row_text, kept), pa.binary()).view(pa.string())
    feature = {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    table = pa.table({"image": images, "text": texts}).replace_schema_metadata({"huggingface": json.dumps(feature)})
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set/a.parquet")
    main(["images", "--dataset", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--caption", "text"])
    printed = capsys.readouterr().out
    counted = Counter(reasons[s.name] for s in kept if reasons[s.name])
    line = printed.partition("left out: ")[2]
    assert {reason: int(line.partition(f" x {reason} (row ")[0].rpartition(" ")[2]) for reason in counted} == counted
    found = {s.text.decode(): s for s in read_samples(str(tmp_path / "out/data-000000.tar")) if s.text}
    usable = {s.caption: s for s in kept if not reasons[s.name]}
    assert f"{len(usable):,} samples in 1 shards" in printed
    assert len(usable) + counted.total() == len(kept)
    assert found.keys() == usable.keys()
    for caption, sample in usable.items():
        check(np.asarray(decode_image(found[caption])), sample)
