"""Decodes samples to a caption and 8-bit pixels, or raises the reason why a sample is left out."""

from __future__ import annotations

import hashlib
import io
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from emf_lightning.data.reading.pixels import ImageLimits, UnusableImageError, read_picture
from emf_lightning.data.reading.plain_images import is_plain
from emf_lightning.data.reading.tar_samples import TarSample
from emf_lightning.text.plain import parse_json, plain

if TYPE_CHECKING:
    from PIL.Image import Image

    from emf_lightning.data.reading.pixels import Picture

CAPTION_KEYS = ("caption", "prompt", "text")


class UnusableSampleError(Exception):
    """A sample that is left out; it is counted under this message."""


def decode_caption(sample: TarSample, column: str | None = None, seed: int = 0, epoch: int = 0) -> str:
    """The sample's caption.

    It is that of its row, of the JSON member's ``column`` where that is given and there, of the txt member, or of the
    JSON member's "caption", "prompt" or "text". Of several captions each pass ``epoch`` takes the next, the first by
    ``seed``. Raises ``UnusableSampleError`` for a missing or empty caption, broken JSON, or text that is not UTF-8.
    """
    captions = decode_captions(sample, column)
    if len(captions) == 1:
        return captions[0]
    name = sample.location.rpartition("/")[2]
    return captions[(zlib.crc32(name.encode("utf-8", "replace")) + seed + epoch) % len(captions)]


def decode_captions(sample: TarSample, column: str | None = None) -> list[str]:
    """All usable captions of the sample, which ``decode_caption`` takes in turns; its errors where there is none."""
    captions: Any = list(sample.captions) or None
    if captions is None and sample.json is not None and (column is not None or sample.text is None):
        captions = _field(sample.json, CAPTION_KEYS if column is None else (column,))
    if captions is None:
        captions = sample.text
        if column is not None and sample.json is not None and captions is not None:
            warnings.warn(f"caption_column: a sample's JSON has no {column!r}; its txt is the caption", stacklevel=2)
    usable, reason = [], UnusableSampleError("missing caption")
    for caption in reversed(captions if isinstance(captions, list) else [captions]):
        try:
            usable.append(usable_caption(caption))
        except UnusableSampleError as error:
            reason = error  # at last the first one's
    if not usable:
        raise reason
    return usable[::-1]


def json_caption(record: bytes, keys: Sequence[str]) -> str:
    """The caption in a JSON object, under the first of ``keys`` that it has; errors as of ``decode_caption``."""
    return usable_caption(_field(record, keys))


def _field(record: bytes, keys: Sequence[str]) -> Any:
    try:
        fields = parse_json(record)
    except UnicodeDecodeError as error:
        raise UnusableSampleError("caption not UTF-8") from error
    except ValueError as error:
        raise UnusableSampleError("broken JSON") from error
    return next((fields[key] for key in keys if isinstance(fields, dict) and key in fields), None)


def usable_caption(caption: Any) -> str:
    """``caption``, text or its bytes, in valid Unicode; UnusableSampleError if it is empty or not UTF-8 text."""
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnusableSampleError("caption not UTF-8") from error
    if not isinstance(caption, str):
        raise UnusableSampleError("missing caption")
    if "\0" in caption:
        raise UnusableSampleError("caption with NUL characters")
    if not (text := plain(caption)):
        raise UnusableSampleError("empty caption")
    return text


@dataclass(frozen=True)
class SquareTransform:
    """Resizes the shorter side of an image to ``side`` and crops the centre square.

    "bicubic" is torch's, which is two to four times as fast as Pillow's and within one of its 256 levels. "bilinear" is
    Pillow's to the bit, as in torchvision's pipelines, with which EMF and BLIP3o train.

    Attributes:
        side: of the square, in pixels.
        filter: antialiased resize filter.
    """

    side: int
    filter: Literal["bicubic", "bilinear"] = "bicubic"

    def __str__(self) -> str:
        """Part of the keys of caches: another text for other pixels."""
        by_torch = ", by='torch'" if self.filter == "bicubic" else ""
        return f"SquareTransform(side={self.side}, filter={self.filter!r}{by_torch})"

    def __call__(self, image: Picture) -> NDArray[np.uint8]:
        """Pixels ``[side, side, 3]``; unchanged if the image has that size already."""
        from PIL.Image import Resampling

        height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        shorter, side = min(width, height), self.side
        size = (int(side * width / shorter), int(side * height / shorter))
        left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
        if size == (width, height) and not isinstance(image, np.ndarray):  # no copy of what is cut off
            return np.asarray(image.crop((left, top, left + side, top + side)))
        if size == (width, height):
            pixels = np.asarray(image)
        elif self.filter == "bicubic":
            pixels = _resized(image, size)
        else:
            pixels = np.asarray(pillow_image(image).resize(size, Resampling.BILINEAR))
        return pixels[top : top + side, left : left + side]


def _resized(image: Picture, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels ``[H, W, 3]`` of the image at ``size``, (W, H); bicubic, antialiased."""
    writable = isinstance(image, np.ndarray) and image.flags.writeable  # torch takes no other array
    pixels = torch.from_numpy(image if writable else np.array(image)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def pillow_image(image: Picture) -> Image:
    """The image as Pillow's."""
    from PIL import Image

    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def stretch_to_square(image: Picture, side: int) -> NDArray[np.uint8]:
    """The whole image resized to ``[side, side, 3]`` whatever its aspect ratio, as SigLIP's preprocessing does."""
    from PIL.Image import Resampling

    return np.asarray(pillow_image(image).resize((side, side), Resampling.BICUBIC))


def image_key(sample: TarSample, flipped: bool) -> str:
    """Cache key of the sample's image, independent of its shard: digest of the image file, and a flag if mirrored.

    Another flag marks an image that earlier versions read in another way, see ``plain_images``. Raises
    ``UnusableSampleError`` for a missing image.
    """
    if sample.image is None:
        raise UnusableSampleError("missing image")
    displayed = "" if is_plain(sample.image) else "-displayed"
    return hashlib.sha256(sample.image).hexdigest() + displayed + ("-flipped" if flipped else "")


def decode_image(sample: TarSample, limits: ImageLimits = ImageLimits()) -> Picture:
    """The sample's image in RGB, see ``read_picture``; UnusableSampleError for a missing or unusable one."""
    if sample.image is None:
        raise UnusableSampleError("missing image")
    try:
        return read_picture(io.BytesIO(sample.image), limits)
    except UnusableImageError as error:
        raise UnusableSampleError(str(error)) from error
