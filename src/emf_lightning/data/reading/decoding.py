"""Samples decoded: a caption and 8-bit pixels, or the reason why not."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.reading.tar_samples import TarSample

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTION_KEYS = ("caption", "prompt", "text")


class UnusableSampleError(Exception):
    """A sample that is left out; its message is the reason under which it is counted."""


def caption_of(sample: TarSample) -> str:
    """The sample's caption: its txt member, else the first of the JSON's "caption", "prompt", "text".

    Raises:
        UnusableSampleError: missing caption, empty caption, broken JSON, or not UTF-8.
    """
    try:
        if sample.text is not None:
            caption = sample.text.decode()
        elif sample.json is not None:
            record = json.loads(sample.json)
            found = [record[key] for key in CAPTION_KEYS if key in record] if isinstance(record, dict) else []
            if not found or not isinstance(found[0], str):
                raise UnusableSampleError("missing caption")
            caption = found[0]
        else:
            raise UnusableSampleError("missing caption")
    except UnicodeDecodeError as error:
        raise UnusableSampleError("caption not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UnusableSampleError("broken JSON") from error
    caption = caption.strip()
    if not caption:
        raise UnusableSampleError("empty caption")
    return caption


@dataclass(frozen=True)
class SquareTransform:
    """The centre square of an image after its shorter side became ``side``.

    Attributes:
        side: of the square.
        filter: of the resizing, which averages where it shrinks. "bilinear" is that of torchvision's ``Resize`` and
            ``CenterCrop``, which EMF and BLIP3o train with.
    """

    side: int
    filter: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, image: Image) -> NDArray[np.uint8]:
        """Pixels ``[side, side, 3]``; untouched where the image has that size already."""
        from PIL.Image import Resampling

        width, height = image.size
        shorter = min(width, height)
        size = (int(self.side * width / shorter), int(self.side * height / shorter))
        if size != image.size:
            image = image.resize(size, Resampling[self.filter.upper()])
        left, top = round((size[0] - self.side) / 2), round((size[1] - self.side) / 2)
        return np.asarray(image.crop((left, top, left + self.side, top + self.side)))


def view_of(image: Image, side: int) -> NDArray[np.uint8]:
    """The whole image as a square ``[side, side, 3]``, its aspect lost: what SigLIP's preprocessing gives."""
    from PIL.Image import Resampling

    return np.asarray(image.resize((side, side), Resampling.BICUBIC))


def picture_name(sample: TarSample, flipped: bool) -> str:
    """By which the sample's image is known whatever shard it is in: a digest of its file, and whether it is mirrored.

    Raises:
        UnusableSampleError: missing image.
    """
    if sample.image is None:
        raise UnusableSampleError("missing image")
    return hashlib.sha256(sample.image).hexdigest() + ("-flipped" if flipped else "")


def image_of(sample: TarSample) -> Image:
    """The sample's image, RGB.

    Raises:
        UnusableSampleError: missing image or corrupt image.
    """
    from PIL import Image

    if sample.image is None:
        raise UnusableSampleError("missing image")
    try:
        with Image.open(io.BytesIO(sample.image)) as opened:
            return opened.convert("RGB")
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, zlib.error, ...
        raise UnusableSampleError("corrupt image") from error
