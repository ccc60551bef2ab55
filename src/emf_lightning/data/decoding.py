"""Samples decoded: a caption and 8-bit pixels, or the reason why not."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.tar_samples import TarSample

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


def fit(image: Image, resolution: int) -> Image:
    """The centre square of ``image`` after its shorter side became ``resolution``."""
    from PIL.Image import Resampling

    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((resolution, resolution), Resampling.BICUBIC, box=(left, top, left + side, top + side))


def pixels_of(sample: TarSample, resolution: int) -> NDArray[np.uint8]:
    """The sample's image ``[resolution, resolution, 3]``; untouched where it has that size already.

    Raises:
        UnusableSampleError: missing image or corrupt image.
    """
    from PIL import Image

    if sample.image is None:
        raise UnusableSampleError("missing image")
    try:
        with Image.open(io.BytesIO(sample.image)) as opened:
            image = opened.convert("RGB")
        if image.size != (resolution, resolution):
            image = fit(image, resolution)
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, zlib.error, ...
        raise UnusableSampleError("corrupt image") from error
    return np.asarray(image)
