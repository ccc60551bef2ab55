"""The one reader of image files: training, caches, shards and scores see the picture that an image viewer shows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

try:
    import simplejpeg  # the extra `fast`
except ImportError:
    simplejpeg = None

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = Image | NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the formats that are read; others run programs (EPS) or decode before their size is known (ICO)."""
EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "jp2", "avif"),
)
"""Extensions of image files, in lower case; the content decides the format."""
BACKGROUND = (255, 255, 255)
"""White: the colour behind transparent pixels."""
ORIENTED = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
"""Pillow's keys of data that may state an orientation."""
PILLOWS_LIMIT = 178_956_970
"""Pixels beyond which Pillow opens no image."""


class UnusableImageError(Exception):
    """An image that is left out; it is counted under this message."""


@dataclass(frozen=True)
class ImageLimits:
    """Bounds on images, checked by the size in the header before pixels are decoded; others are left out and counted.

    Attributes:
        max_pixels: width times height; the default is Pillow's, 0.36 GB in memory.
        max_aspect_ratio: longer side by shorter side; the shorter one is resized to the training's resolution.

    Raises:
        ValueError: for a number out of range.
    """

    max_pixels: int = 89_478_485
    max_aspect_ratio: float = 32.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= PILLOWS_LIMIT:
            raise ValueError(
                f"max_pixels must be 1 to {PILLOWS_LIMIT:,}, which is Pillow's limit, got {self.max_pixels:,}"
            )
        if not self.max_aspect_ratio >= 1:
            raise ValueError(f"max_aspect_ratio must be at least 1, got {self.max_aspect_ratio}")

    def check(self, width: int, height: int) -> None:
        """Raises ``UnusableImageError`` for a size out of bounds."""
        if width * height > self.max_pixels:
            raise UnusableImageError(f"image of more than {self.max_pixels:,} pixels")
        if max(width, height) > self.max_aspect_ratio * min(width, height):
            raise UnusableImageError(f"image with an aspect ratio above {self.max_aspect_ratio:g}")


def read_pixels(file: Path | BinaryIO, limits: ImageLimits) -> Image:
    """The image of ``read_picture``, as Pillow's."""
    from PIL import Image

    picture = read_picture(file, limits)
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture


def read_picture(file: Path | BinaryIO, limits: ImageLimits) -> Picture:
    """The image in RGB as it is displayed, an array ``[H, W, 3]`` or Pillow's; of an animation, the first frame.

    Its EXIF orientation is applied. Transparent pixels are composited on ``BACKGROUND``. 16-bit grey is scaled by its
    range, 0 to 65,535 (or what the file states), to 0 to 255. Colour profiles are not applied. Where simplejpeg is
    installed, it decodes usual JPEG files, to the same pixels; Pillow decodes all others, and decides what is damaged.

    Raises:
        UnusableImageError: for a file that cannot be read, is no image of ``FORMATS``, is damaged or out of ``limits``,
            or holds 32-bit integers or floats, of which nothing states how bright they are displayed.
    """
    from PIL import Image

    try:
        # not the path: Pillow would map a TIFF file into memory and mix up its pixels as it turns them
        with contextlib.nullcontext(file) if not isinstance(file, Path) else file.open("rb") as source:
            opened = Image.open(source, formats=FORMATS)
            limits.check(*opened.size)
            pixels = _usual_jpeg(opened, source)
            return _displayed(opened) if pixels is None else pixels
    except UnusableImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnusableImageError(f"image of more than {limits.max_pixels:,} pixels") from error
    except MemoryError as error:
        raise UnusableImageError("image that does not fit into memory") from error
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, zlib.error, ...
        if isinstance(error, OSError) and error.errno is not None:
            raise UnusableImageError(f"unreadable image file ({error.strerror})") from error
        raise UnusableImageError("corrupt image") from error


def _usual_jpeg(opened: Any, source: BinaryIO) -> NDArray[np.uint8] | None:
    """Pixels of an upright JPEG file in colour, without a flaw; None for any other file, or without simplejpeg."""
    if simplejpeg is None or opened.format != "JPEG" or opened.mode != "RGB":
        return None
    try:
        if not ORIENTED.isdisjoint(opened.info) and opened.getexif().get(0x0112, 1) != 1:
            return None
        source.seek(0)
        return simplejpeg.decode_jpeg(source.read(), strict=True)
    except MemoryError:
        raise
    except Exception:
        return None


def _displayed(opened: Any) -> Image:
    """The opened image in RGB; ``opened`` itself, decoded, if it is RGB: a copy would take time."""
    from PIL import ImageOps

    layout = str(opened.tile[0][3]) if opened.tile else ""  # Pillow's name of the layout in the file, e.g. "L;4"
    deep = _is_deep(opened)
    opened.load()
    try:
        if not ORIENTED.isdisjoint(opened.info):  # Pillow turns TIFF itself
            ImageOps.exif_transpose(opened, in_place=True)
    except MemoryError:
        raise
    except Exception:
        pass
    key = opened.info.get("transparency") if opened.mode in ("1", "L", "RGB") or deep else None
    if key is not None:  # a colour that is transparent, in the units of the file
        scale = {"L;2": 85, "L;4": 17}.get(layout, 1)
        key = np.asarray(key) // 256 if layout == "RGB;16B" else np.asarray(key) * scale
        values = np.asarray(opened.convert("L") if opened.mode == "1" else opened)
        shown = values != key if values.ndim == 2 else (values != key).any(-1)
        return _on_white(_eight_bits(opened) if deep else opened.convert("RGB"), shown)
    if deep:
        return _eight_bits(opened)
    if opened.has_transparency_data:
        rgba = (opened.convert("LA") if opened.mode == "La" else opened).convert("RGBA")
        return _on_white(rgba, None)
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def _is_deep(opened: Any) -> bool:
    """Whether the image holds 16-bit grey; raises ``UnusableImageError`` for values without a range of display."""
    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM"):  # Pillow scales PPM's
        return True
    if opened.mode in ("I", "F"):
        raise UnusableImageError(f"image of {'floats' if opened.mode == 'F' else 'signed or 32-bit integers'}")
    return False


def _eight_bits(opened: Any) -> Image:
    """RGB image of 16-bit grey, scaled by the range that the file states."""
    from PIL import Image

    tags = opened.tag_v2 if opened.format == "TIFF" else {}
    highest = 2 ** tags.get(258, (16,))[0] - 1  # BitsPerSample: 12 or 16
    values = (np.asarray(opened).astype(np.uint32) * 255 + highest // 2) // highest
    if tags.get(262) == 0:  # PhotometricInterpretation: zero is white
        values = 255 - values
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(image: Image, shown: NDArray[np.bool_] | None) -> Image:
    """An RGBA image, or the pixels of an RGB image where ``shown`` is true, over ``BACKGROUND``."""
    from PIL import Image

    canvas = Image.new("RGB", image.size, BACKGROUND)
    canvas.paste(image, mask=image if shown is None else Image.fromarray(shown.astype(np.uint8) * 255))
    return canvas
