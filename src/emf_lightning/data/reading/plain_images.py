"""Tells from the bytes of an image file whether its displayed pixels are simply the stored ones.

Cache keys of such images are digests of their files. Other images have keys of their own, because existing caches may
hold latents of their stored pixels: without orientation, transparency or the range of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

XMP = b"http://ns.adobe.com/xap/1.0/\0"


def is_plain(data: bytes) -> bool:
    """True only if the image is JPEG, PNG or WebP without orientation, transparency or 16-bit grey.

    Reads a few bytes, about 5 microseconds: opening every cached image with Pillow would take ten times as long. In
    doubt the answer is False: such an image is encoded once more.
    """
    if data.startswith(b"\xff\xd8"):
        return all(_is_upright(segment) for segment in _app1(data))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        grey_16 = data[24:26] == b"\x10\x00"
        return (
            not grey_16 and data[25:26] in (b"\0", b"\2", b"\3") and not (_chunks(data) & {b"tRNS", b"eXIf", b"text"})
        )
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return data[12:16] == b"VP8 " or (data[12:16] == b"VP8X" and not data[20] & 0b11100)  # alpha, EXIF, XMP
    return False


def _app1(data: bytes) -> Iterator[bytes]:
    """The APP1 segments of a JPEG file, which hold EXIF and XMP."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xD9, 0xDA):  # end, or start of the pixels
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1:
            yield data[at + 4 : at + 2 + length]
        at += 2 + length


def _is_upright(segment: bytes) -> bool:
    """Whether an APP1 segment states no orientation other than 1."""
    if segment.startswith(XMP):
        return b"tiff:Orientation" not in segment
    if not segment.startswith(b"Exif\0\0"):
        return True
    from PIL.Image import Exif

    exif = Exif()
    try:
        exif.load(segment)
        return exif.get(0x0112, 1) == 1
    except Exception:  # damaged EXIF data; Pillow raises many kinds
        return False


def _chunks(data: bytes) -> set[bytes]:
    """The types of a PNG file's chunks; "text" for text that may hold EXIF or XMP."""
    kinds, at = set(), 8
    while at + 8 <= len(data):
        kind, length = data[at + 4 : at + 8], int.from_bytes(data[at : at + 4], "big")
        if kind in (b"tEXt", b"zTXt", b"iTXt") and data[at + 8 : at + 12] in (b"Raw ", b"XML:"):
            kind = b"text"
        kinds.add(kind)
        at += 12 + length
    return kinds
