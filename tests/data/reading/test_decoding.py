from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from emf_lightning.data.reading.decoding import (
    SquareTransform,
    UnusableSampleError,
    decode_caption,
    decode_image,
    image_key,
    stretch_to_square,
)
from emf_lightning.data.reading.tar_samples import TarSample
from tests.data.tars import SIDE, noise_image


def sample(image: bytes | None = None, text: bytes | None = None, json: bytes | None = None) -> TarSample:
    return TarSample("x.tar/0", 0, 0, image, text, json)


def pixels_of(sample: TarSample, side: int) -> np.ndarray:
    return SquareTransform(side)(decode_image(sample))


def test_image_of_the_right_size_passes_through_exactly() -> None:
    expected = np.asarray(Image.open(io.BytesIO(noise_image(5))))
    assert np.array_equal(pixels_of(sample(noise_image(5)), SIDE), expected)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("size", [(31, 20), (20, 31), (4, 4)])
def test_other_sizes_and_formats_become_the_square(form: str, size: tuple[int, int]) -> None:
    pixels = pixels_of(sample(noise_image(1, size, form)), SIDE)
    assert pixels.shape == (SIDE, SIDE, 3)
    assert pixels.dtype == np.uint8


def test_crop_is_about_the_centre() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "png")
    assert (pixels_of(sample(file.getvalue()), 8) == 200).all()


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    file = io.BytesIO()
    Image.fromarray(board.astype(np.uint8)).save(file, "png")
    assert (abs(pixels_of(sample(file.getvalue()), 8).astype(int) - 127) < 12).all()


@pytest.mark.parametrize("size", [(31, 20), (20, 31), (57, 33), (8, 200), (5, 7), (16, 16)])
def test_the_bilinear_square_equals_the_published_training_s(size: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    image = decode_image(sample(noise_image(3, size)))
    published = v2.Compose([v2.Resize(16), v2.CenterCrop(16)])
    assert np.array_equal(SquareTransform(16, "bilinear")(image), np.asarray(published(image)))


@pytest.mark.parametrize("size", [(31, 20), (20, 31), (14, 14)])
def test_the_stretched_image_equals_siglip_s_preprocessing(size: tuple[int, int]) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image = decode_image(sample(noise_image(3, size)))
    processor = SiglipImageProcessorPil(size={"height": 14, "width": 14})
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    ours = stretch_to_square(image, 14).astype(np.float32) / 127.5 - 1
    assert np.abs(ours.transpose(2, 0, 1) - expected).max() < 1e-6


def test_an_image_key_depends_on_the_file_and_on_mirroring_alone() -> None:
    first, other = sample(noise_image(1)), sample(noise_image(2))
    assert image_key(first, False) == image_key(TarSample("y.tar/7", 7, 9, noise_image(1), b"?"), False)
    assert len({image_key(first, False), image_key(first, True), image_key(other, False)}) == 3
    with pytest.raises(UnusableSampleError, match="missing image"):
        image_key(sample(), False)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_other_pixel_modes_become_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (SIDE, SIDE)).save(file, "png")
    assert pixels_of(sample(file.getvalue()), SIDE).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("key", ["caption", "prompt", "text"])
def test_json_speaks_where_there_is_no_text(key: str) -> None:
    record = f'{{"{key}": " a caption "}}'.encode()
    assert decode_caption(sample(json=record)) == "a caption"
    assert decode_caption(sample(text=b"another\n", json=record)) == "another"


@pytest.mark.parametrize(
    ("unusable", "reason"),
    [
        (sample(), "missing caption"),
        (sample(json=b"[1, 2]"), "missing caption"),
        (sample(json=b'{"caption": null}'), "missing caption"),
        (sample(json=b'{"caption": ""}'), "empty caption"),
        (sample(text=b""), "empty caption"),
        (sample(json=b"{"), "broken JSON"),
        (sample(json=b"[" * 100_000), "broken JSON"),
        (sample(text=b"\xff"), "caption not UTF-8"),
    ],
)
def test_sample_without_a_caption_says_why(unusable: TarSample, reason: str) -> None:
    with pytest.raises(UnusableSampleError, match=reason):
        decode_caption(unusable)


def test_image_that_is_missing_or_corrupt_says_so() -> None:
    with pytest.raises(UnusableSampleError, match="missing image"):
        pixels_of(sample(), SIDE)
    with pytest.raises(UnusableSampleError, match="corrupt image"):
        pixels_of(sample(noise_image(1)[:100]), SIDE)
