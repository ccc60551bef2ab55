"""JPEG files have the same pixels, and the same faults, with simplejpeg and without."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from emf_lightning.data.reading import pixels
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.pixels import ImageLimits, UnusableImageError, read_picture
from emf_lightning.data.reading.streams import ShardStream
from tests.data.tars import write_tar

pytest.importorskip("simplejpeg", reason="pip install emf_lightning[fast]")


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """Coarse colours under noise."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size)
    noisy = np.asarray(coarse).astype(float) + random.normal(0, 20, (size[1], size[0], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def read(data: bytes) -> np.ndarray | str:
    try:
        return np.array(read_picture(io.BytesIO(data), ImageLimits()))
    except UnusableImageError as error:
        return str(error)


def same_by_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file has the same pixels, or the same fault, without simplejpeg."""
    found = read(data)
    with monkeypatch.context() as without:
        without.setattr(pixels, "simplejpeg", None)
        return np.array_equal(found, read(data))


SIZES = [(64, 48), (33, 17), (1, 1), (7, 200), (16, 16), (250, 131)]
WAYS = [
    *(
        {"quality": quality, "subsampling": way}
        for quality in (1, 40, 75, 95, 100)
        for way in ("4:4:4", "4:2:2", "4:2:0")
    ),
    *({"progressive": True, "quality": quality} for quality in (30, 90)),
    {"optimize": True},
    {"keep_rgb": True},
    {"restart_marker_blocks": 1},
    {"exif": oriented(1)},
    {"comment": b"a comment"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_usual_files_are_decoded_by_simplejpeg_to_the_same_pixels(way: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, size in enumerate(SIZES):
        data = jpeg(picture(number, size), **way)
        assert isinstance(read_picture(io.BytesIO(data), ImageLimits()), np.ndarray)
        assert same_by_pillow(data, monkeypatch), size


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_and_orientations_are_pillow_s(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [jpeg(picture(1, (33, 17)).convert(mode))]
    files += [jpeg(picture(2, (33, 17)), exif=oriented(orientation)) for orientation in range(2, 9)]
    for data in files:
        assert isinstance(read_picture(io.BytesIO(data), ImageLimits()), Image.Image)
        assert same_by_pillow(data, monkeypatch)


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_files_have_the_same_pixels_or_the_same_fault(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(picture(3, (64, 48)), progressive=progressive)
    random, verdicts = np.random.default_rng(0), set()
    for number in range(300):
        damaged = bytearray(data)
        at = int(random.integers(2, len(data)))
        if number % 3 == 0:
            damaged = damaged[:at]
        elif number % 3 == 1:
            damaged[at] ^= 1 << int(random.integers(8))
        else:
            damaged[at:at] = random.bytes(int(random.integers(1, 9)))
        assert same_by_pillow(bytes(damaged), monkeypatch), (number, at)
        verdicts.add(type(read(bytes(damaged))))
    assert verdicts == {str, np.ndarray}


def test_a_run_goes_on_bit_by_bit_where_simplejpeg_comes_or_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {}
    for number in range(24):
        members |= {f"{number:02d}.jpg": jpeg(picture(number, (40, 30))), f"{number:02d}.txt": f"{number}".encode()}
    shard = write_tar(tmp_path / "a.tar", members)

    def loader() -> ShardLoader:
        return ShardLoader(ShardStream([shard], SquareTransform(16), 4, shuffle_block=5))

    whole = [batch.images for batch in loader()]
    with monkeypatch.context() as without:
        without.setattr(pixels, "simplejpeg", None)
        first, begun = loader(), list[Tensor]()
        for batch in first:
            begun.append(batch.images)
            first.acknowledge(batch)
            if len(begun) == 3:
                break
        state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    parts = [*begun, *(batch.images for batch in second)]
    assert len(parts) == len(whole) == 6
    assert all(part.equal(images) for part, images in zip(parts, whole, strict=True))
