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


SIZES = [
    (31, 20),
    (20, 31),
    (57, 33),
    (8, 200),
    (200, 8),
    (5, 7),
    (1, 1),
    (3, 90),
    (16, 17),
    (64, 48),
    (211, 173),
    (48, 32),
]


def bicubic_weights(before: int, after: int) -> np.ndarray:
    """Weights ``[after, before]`` of Keys' cubic with a = -1/2, widened to average where the image shrinks."""
    scale = before / after
    distance = (np.arange(before) + 0.5 - (np.arange(after)[:, None] + 0.5) * scale) / max(scale, 1.0)
    t = np.abs(distance)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("kind", ["noise", "smooth", "board"])
@pytest.mark.parametrize("size", SIZES)
def test_the_bicubic_square_is_within_a_level_of_pillow_s_and_of_the_formula(kind: str, size: tuple[int, int]) -> None:
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = {
        "noise": np.random.default_rng(0).integers(0, 256, (height, width, 3)),
        "smooth": np.stack([127 + 127 * np.sin(x / 9 + y / 5 + phase) for phase in range(3)], -1),
        "board": np.repeat(((x // 3 + y // 2) % 2 * 255)[..., None], 3, -1),
    }[kind].astype(np.uint8)
    side = 16
    resized = int(side * width / min(size)), int(side * height / min(size))
    left, top = round((resized[0] - side) / 2), round((resized[1] - side) / 2)
    square = SquareTransform(side)(Image.fromarray(pixels)).astype(int)
    assert np.array_equal(square, SquareTransform(side)(pixels))
    pillow = Image.fromarray(pixels).resize(resized, Image.Resampling.BICUBIC)
    assert np.abs(square - np.asarray(pillow.crop((left, top, left + side, top + side))).astype(int)).max() <= 1
    rows, columns = bicubic_weights(height, resized[1]), bicubic_weights(width, resized[0])
    exact = np.einsum("ij,jkc->ikc", rows, np.einsum("kl,jlc->jkc", columns, pixels).clip(0, 255)).clip(0, 255)
    assert np.abs(square - exact[top : top + side, left : left + side]).max() <= 1.5


def test_caches_tell_pixels_of_torch_from_the_earlier_ones() -> None:
    assert str(SquareTransform(8, "bilinear")) == "SquareTransform(side=8, filter='bilinear')"  # of existing caches
    assert str(SquareTransform(8)) != "SquareTransform(side=8, filter='bicubic')"


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
