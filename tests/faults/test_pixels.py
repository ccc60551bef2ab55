"""Images of every mode, format and orientation, and files that are no usable images, in every reader."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.cli import main
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.decoding import SquareTransform, decode_image, image_key
from emf_lightning.data.reading.pixels import ImageLimits, UnusableImageError, read_pixels
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.data.reading.tar_samples import TarSample, read_samples
from emf_lightning.evaluation.folders.image_files import read_image
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.words import WordEncoder
from tests.data.tars import noise_image, write_tar
from tests.faults.pictures import H, Picture, W, pictures, png

PICTURES = pictures()
LIMITS = ImageLimits()


def read(data: bytes, limits: ImageLimits = LIMITS) -> np.ndarray:
    return np.asarray(read_pixels(io.BytesIO(data), limits))


@pytest.mark.parametrize("picture", PICTURES, ids=[picture.name.replace(" ", "-") for picture in PICTURES])
def test_the_pixels_are_the_displayed_ones(picture: Picture) -> None:
    pixels = read(picture.data).astype(int)
    assert pixels.shape == picture.displayed.shape
    assert np.abs(pixels - picture.displayed).max() <= picture.tolerance


def test_training_and_scores_and_written_shards_see_the_same_pictures(tmp_path: Path) -> None:
    import datasets

    scored, streamed, rows = [], [], []
    for number, picture in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(picture.data)  # the content decides, not the name
        scored.append(read_image(tmp_path / f"{number}.png"))
        rows.append({"image": {"bytes": picture.data, "path": None}, "text": f"picture {number}"})
    shard = write_tar(tmp_path / "a.tar", {f"{n}.jpg": picture.data for n, picture in enumerate(PICTURES)})
    streamed = [np.asarray(decode_image(sample)) for sample in read_samples(shard)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "set"))
    main(["images", "--dataset", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--caption", "text"])
    written = [np.asarray(decode_image(sample)) for sample in read_samples(str(tmp_path / "out/data-000000.tar"))]
    assert len(scored) == len(streamed) == len(written) == len(PICTURES)
    for picture, *same in zip(PICTURES, scored, streamed, written, strict=True):
        for pixels in same[1:]:
            assert np.array_equal(pixels, same[0]), picture.name


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_ordinary_pictures_and_their_cache_keys_are_unchanged(form: str) -> None:
    data = noise_image(3, (31, 20), form)
    assert np.array_equal(read(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert len(image_key(TarSample("", 0, 0, data), False)) == 64


def test_a_picture_that_was_read_otherwise_before_has_a_cache_key_of_its_own() -> None:
    changed = []
    for name, data, displayed, tolerance in PICTURES:
        try:
            before = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
            same = before.shape == displayed.shape and np.abs(before - displayed).max() <= tolerance
        except (OSError, ValueError):
            same = False
        if not same:
            changed.append(name)
            assert image_key(TarSample("", 0, 0, data), False).endswith("-displayed"), name
    assert len(changed) > 100


def header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds nothing."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (ihdr, idat))
    return b"\x89PNG\r\n\x1a\n" + body


def saved(mode: str, form: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (W, H)).save(file, form)
    return file.getvalue()


WHOLE = noise_image(1, (40, 40), "jpeg")
TOO_MANY = "image of more than 89,478,485 pixels"
TOO_LONG = "image with an aspect ratio above 32"
UNUSABLE: dict[str, tuple[bytes, str]] = {
    "a line of 30,000": (header(1, 30_000), TOO_LONG),
    "a row of 60,000,000": (header(60_000_000, 1), TOO_LONG),
    "a bomb": (header(60_000, 60_000), TOO_MANY),
    "above Pillow's warning": (header(10_000, 9_000), TOO_MANY),
    "the largest header": (header(2**31 - 1, 2**31 - 1), TOO_MANY),
    "a header without pixels": (header(900, 900), "corrupt image"),
    "no width": (header(0, 5), "corrupt image"),
    "GIF bomb": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(9) + b"\2\0;", TOO_MANY),
    "bitmap bomb": (b"BM" + struct.pack("<4IiiHH6I", 54, 0, 54, 40, 50_000, 50_000, 1, 24, *[0] * 6), TOO_MANY),
    "PPM bomb": (b"P6 99999 99999 255\n", TOO_MANY),
    "truncated JPEG": (WHOLE[:-40], "corrupt image"),
    "truncated PNG": (noise_image(1)[:100], "corrupt image"),
    "truncated WebP": (noise_image(1, (40, 40), "webp")[:-40], "corrupt image"),
    "truncated GIF": (noise_image(1, (40, 40), "gif")[:-400], "corrupt image"),
    "truncated BMP": (noise_image(1, (40, 40), "bmp")[:-400], "corrupt image"),
    "truncated TIFF": (noise_image(1, (40, 40), "tiff")[:2000], "."),
    "empty": (b"", "corrupt image"),
    "a web page": (b"<!doctype html><html>404</html>", "corrupt image"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "corrupt image"),
    "floats": (saved("F", "tiff"), "image of floats"),
    "32-bit integers": (saved("I", "tiff"), "image of signed or 32-bit integers"),
    "PFM": (saved("F", "ppm"), "image of floats"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_image_says_why(name: str) -> None:
    data, reason = UNUSABLE[name]
    with pytest.raises(UnusableImageError, match=reason):
        read(data)


def test_no_large_memory_is_taken_before_the_size_is_checked() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (data, reason) in UNUSABLE.items():
        if reason in (TOO_LONG, TOO_MANY):
            with pytest.raises(UnusableImageError):
                read(data)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, name


def test_the_limits_are_settings() -> None:
    long = noise_image(1, (8, 300))
    with pytest.raises(UnusableImageError, match="aspect ratio above 32"):
        read(long)
    assert read(long, ImageLimits(max_aspect_ratio=40)).shape == (300, 8, 3)
    with pytest.raises(UnusableImageError, match="more than 2,399 pixels"):
        read(long, ImageLimits(max_pixels=2399, max_aspect_ratio=40))
    for pixels in (0, 10**9):
        with pytest.raises(ValueError, match="max_pixels must be"):
            ImageLimits(max_pixels=pixels)
    for ratio in (0.5, float("nan")):
        with pytest.raises(ValueError, match="max_aspect_ratio must be"):
            ImageLimits(max_aspect_ratio=ratio)


def test_an_image_beyond_what_can_be_resized_is_left_out_under_loose_limits(tmp_path: Path) -> None:
    line = png(np.zeros((1, 3_000_000), int), 0, 1)
    shard = write_tar(
        tmp_path / "a.tar", {"0.png": line, "0.txt": b"a line", "1.png": noise_image(1), "1.txt": b"good"}
    )
    limits = ImageLimits(max_aspect_ratio=float("inf"))
    (batch, rest) = ShardStream([shard], SquareTransform(1024), 4, image_limits=limits)
    assert batch.captions == ("good",)
    assert batch.skipped | rest.skipped == {"image that cannot be resized": 1}


def test_training_counts_every_unusable_image_and_goes_on(tmp_path: Path) -> None:
    members = {}
    for number, (data, _) in enumerate(UNUSABLE.values()):
        members |= {f"{number}.png": data, f"{number}.txt": b"a picture"}
    for number in range(100, 104):
        members |= {f"{number}.png": noise_image(number), f"{number}.txt": f"good {number}".encode()}
    write_tar(tmp_path / "a.tar", members)
    settings = {"batch_size": 4, "num_workers": 0, "shuffle_block": 1, "resolution": 8}
    data = CaptionImageData(WordEncoder(width=16), Pixels(), str(tmp_path), **settings)  # type: ignore[arg-type]
    data.setup("fit")
    with pytest.warns(UserWarning, match=r"a\.tar/0: image with an aspect ratio above 32; left out"):
        batch = next(iter(data.train_dataloader()))
    assert batch.captions == tuple(f"good {number}" for number in range(100, 104))
    assert sum(batch.skipped.values()) == len(UNUSABLE)


def test_emf_images_leaves_out_unusable_rows_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [data for data, _ in UNUSABLE.values()]
    texts: list[str | None] = ["a picture"] * len(images)
    rows = [{"bytes": data, "path": None} for data in images]
    good = {"bytes": noise_image(7), "path": None}
    rows += [
        good,
        None,
        {"bytes": None, "path": None},
        good,
        good,
        {"bytes": None, "path": str(tmp_path / "no.png")},
        good,
    ]
    texts += ["first", "x", "x", None, "  ", "x", "None"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "text": pa.array(texts, pa.string())})
    feature = {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    (tmp_path / "set").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), tmp_path / "set/a.parquet")
    options = ["--dataset", str(tmp_path / "set"), "--caption", "text"]
    main(["images", *options, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    first = len(images)
    assert "2 samples in 1 shards" in printed
    assert f"2 x missing image (row {first + 1} first)" in printed
    assert f"1 x missing caption (row {first + 3} first), 1 x empty caption (row {first + 4} first)" in printed
    assert "unreadable image file (No such file or directory)" in printed
    assert f"2 x {TOO_LONG} (row 0 first)" in printed
    with tarfile.open(tmp_path / "out/data-000000.tar") as tar:
        assert tar.getnames() == ["000000000.png", "000000000.txt", "000000001.png", "000000001.txt"]
    assert [sample.text for sample in read_samples(str(tmp_path / "out/data-000000.tar"))] == [b"first", b"None"]
    with pytest.raises(SystemExit):
        main(["images", *options, "--out", str(tmp_path / "none"), "--image_limits.max_pixels", "1"])
    assert "no row can be used: " in capsys.readouterr().err


def test_hidden_labels_are_counted_as_missing_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "ant"])})
    rows = [{"image": {"bytes": noise_image(1), "path": None}, "label": label} for label in (1, None, -1)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "set"))
    main(["images", "--dataset", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--caption", "label"])
    assert "left out: 2 x missing caption (row 1 first)" in capsys.readouterr().out
    assert [sample.text for sample in read_samples(str(tmp_path / "out/data-000000.tar"))] == [b"a photo of an ant"]


def test_emf_score_names_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"good-{number}.png").write_bytes(noise_image(number, (40, 40)))
    for number, (data, _) in enumerate(UNUSABLE.values()):
        (folder / f"{number:02d}.png").write_bytes(data)
    options = ["--metric", "FrechetDistance", "--metric.features", "RandomFeatures", "--metric.reference", str(folder)]
    with pytest.warns(UserWarning, match=rf"reference: {len(UNUSABLE)} of {len(UNUSABLE) + 4} images are left out"):
        main(["score", str(folder), *options, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"2 x {TOO_LONG} ({folder / '00.png'} first)" in printed
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["images"] == 4
    assert sum(map(len, scores["left_out"].values())) == len(UNUSABLE)
    assert scores["scores"]["score"] == pytest.approx(0, abs=1e-6)


def test_a_worker_s_batches_hold_the_displayed_pixels(tmp_path: Path) -> None:
    chosen = [picture for picture in PICTURES if picture.displayed.shape == (H, W, 3)][:8]
    members = {}
    for number, picture in enumerate(chosen):
        members |= {f"{number}.png": picture.data, f"{number}.txt": b"a picture"}
    shard = write_tar(tmp_path / "a.tar", members)
    batch = next(iter(ShardStream([shard], SquareTransform(H), 8)))
    left = round((W - H) / 2)
    expected = np.stack([picture.displayed[:, left : left + H] for picture in chosen])
    assert torch.equal(batch.images.permute(0, 2, 3, 1), torch.from_numpy(expected).to(torch.uint8))


def test_emf_images_refuses_its_earlier_shards_once_the_captions_have_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(noise_image(number))

    def write(word: str) -> None:
        rows = ({"file_name": f"{number}.png", "text": f"{word} {number}"} for number in range(3))
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    call = ["images", "--dataset", str(folder), "--out", str(out), "--caption", "text"]
    write("wrong")
    main(call)
    main(call)  # nothing has changed
    write("corrected")
    for changed in (call, [*call, "--image_limits.max_pixels", "1000"]):
        with pytest.raises(SystemExit):
            main(changed)
        assert "holds other samples" in capsys.readouterr().err
