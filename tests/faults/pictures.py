"""Image files in many modes and formats with their displayed pixels, computed without the library that reads them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

H, W = 6, 9
ORIENTED: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""The displayed picture of a stored one, by EXIF orientation."""


class Picture(NamedTuple):
    """A file, its displayed pixels ``[H, W, 3]`` and the greatest difference allowed, for lossy formats."""

    name: str
    data: bytes
    displayed: np.ndarray
    tolerance: int = 0


def noise(*shape: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(values: np.ndarray, kind: int, bits: int, extra: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG file of ``values`` ``[H, W(, C)]`` in the colour type ``kind``, with further chunks before the pixels."""
    rows = values.reshape(len(values), -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    elif bits == 8:
        packed = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        bitwise = (rows[:, :, None] >> np.arange(bits)[::-1] & 1).reshape(len(rows), -1).astype(np.uint8)
        packed = [np.packbits(row).tobytes() for row in bitwise]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, kind, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        *extra,
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed))),
        (b"IEND", b""),
    )
    body = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """``colour`` ``[H, W, 3]`` under ``alpha`` ``[H, W]``, both of 0 to 255, over white."""
    share = alpha[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share))


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def keyed(shown: np.ndarray, values: np.ndarray, key: Any) -> np.ndarray:
    """``shown``, white where ``values`` equal the transparent ``key``."""
    hidden = values == key if values.ndim == 2 else (values == key).all(-1)
    assert hidden.any()
    return np.where(hidden[..., None], 255, shown)


def pngs() -> Iterator[Picture]:
    for bits in (1, 2, 4, 8, 16):
        grey = noise(H, W, high=2**bits)
        shown = rgb(np.rint(grey / (2**bits - 1) * 255))
        key = int(grey[1, 2])
        yield Picture(f"png grey {bits}", png(grey, 0, bits), shown)
        trns = ((b"tRNS", struct.pack(">H", key)),)
        yield Picture(f"png grey {bits} tRNS", png(grey, 0, bits, trns), keyed(shown, grey, key))
    for bits in (8, 16):
        colour, alpha = noise(H, W, 3, high=2**bits), noise(H, W, high=2**bits, seed=1)
        shown, shown_alpha = (values / (2**bits - 1) * 255 for values in (colour, alpha))
        off = int(bits == 16)  # Pillow keeps the high byte: 1 of 255 less
        key = colour[1, 2]
        trns = ((b"tRNS", struct.pack(">HHH", *key)),)
        yield Picture(f"png rgb {bits}", png(colour, 2, bits), np.rint(shown), off)
        yield Picture(f"png rgb {bits} tRNS", png(colour, 2, bits, trns), keyed(np.rint(shown), colour, key), off)
        both = np.concatenate([colour, alpha[..., None]], -1)
        yield Picture(f"png rgba {bits}", png(both, 6, bits), on_white(shown, shown_alpha), 1 + off)
        both = np.stack([colour[..., 0], alpha], -1)
        yield Picture(f"png grey-alpha {bits}", png(both, 4, bits), on_white(rgb(shown[..., 0]), shown_alpha), 1 + off)
    for bits in (1, 2, 4, 8):
        index, palette, alphas = noise(H, W, high=2**bits), noise(2**bits, 3, seed=2), noise(2**bits, seed=3)
        plte = (b"PLTE", palette.astype(np.uint8).tobytes())
        yield Picture(f"png palette {bits}", png(index, 3, bits, (plte,)), palette[index])
        one = np.full(2**bits, 255)
        one[index[0, 0]] = 0
        for name, table in (("one index", one), ("alphas", alphas), ("all opaque", np.full(2**bits, 255))):
            trns = (plte, (b"tRNS", table.astype(np.uint8).tobytes()))
            shown = on_white(palette[index], table[index])
            yield Picture(f"png palette {bits} tRNS {name}", png(index, 3, bits, trns), shown, 1)
    colour = noise(H, W, 3)
    hidden = np.concatenate([colour, np.zeros((H, W, 1), int)], -1)
    yield Picture("png all transparent", png(hidden, 6, 8), np.full((H, W, 3), 255))
    opaque = np.concatenate([colour, np.full((H, W, 1), 255)], -1)
    yield Picture("png opaque rgba", png(opaque, 6, 8), colour)


def others() -> Iterator[Picture]:
    colour, alpha, deep = noise(H, W, 3).astype(np.uint8), noise(H, W, seed=1).astype(np.uint8), noise(H, W, high=65536)
    flat = np.broadcast_to(np.array([180, 60, 90], np.uint8), (H, W, 3))  # lossy formats keep it
    image, grey = Image.fromarray(colour), colour[..., 0]
    rgba = Image.fromarray(np.concatenate([colour, alpha[..., None]], -1))
    la = Image.fromarray(np.stack([grey, alpha], -1), "LA")
    lossless: dict[str, dict[str, Any]] = {
        "TIFF": {},
        "WEBP": {"lossless": True, "exact": True},
        "JPEG2000": {"irreversible": False, "num_resolutions": 1},
    }
    for form in ("BMP", "DIB", "PPM", *lossless):
        yield Picture(f"{form} rgb", saved(image, form, **lossless.get(form, {})), colour)
    for form in ("BMP", "PPM", "TIFF", "JPEG2000"):
        yield Picture(f"{form} grey", saved(Image.fromarray(grey), form, **lossless.get(form, {})), rgb(grey))
    for form in ("BMP", "TIFF", "PPM"):
        yield Picture(f"{form} bilevel", saved(Image.fromarray(grey > 99), form), rgb((grey > 99) * 255))
    for form, options in lossless.items():
        yield Picture(f"{form} rgba", saved(rgba, form, **options), on_white(colour, alpha), 1)
    for form in ("TIFF", "JPEG2000"):
        yield Picture(f"{form} grey-alpha", saved(la, form, **lossless[form]), on_white(rgb(grey), alpha), 1)
    for form, quality in (("JPEG", 100), ("WEBP", 100), ("AVIF", 100)):
        yield Picture(f"{form} rgb", saved(Image.fromarray(flat), form, quality=quality), flat, 4)
    for number in (0, 128):
        solid = Image.fromarray(np.concatenate([flat, np.full((H, W, 1), number, np.uint8)], -1))
        shown = on_white(flat, np.full((H, W), number))
        yield Picture(f"AVIF alpha {number}", saved(solid, "AVIF", quality=100), shown, 6)
        yield Picture(f"WEBP lossy alpha {number}", saved(solid, "WEBP", quality=100, exact=True), shown, 6)
    yield Picture(
        "JPEG grey", saved(Image.fromarray(rgb(flat[..., 0])).convert("L"), "JPEG", quality=100), rgb(flat[..., 0]), 2
    )
    ink, black = flat[..., :3] / 255, 0.2
    cmyk = np.concatenate([flat, np.full((H, W, 1), 51, np.uint8)], -1)
    shown = np.rint(255 * (1 - ink) * (1 - black))
    yield Picture("TIFF cmyk", saved(Image.fromarray(cmyk, "CMYK"), "TIFF"), shown, 1)
    adobe = saved(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in adobe  # its inks are stored inverted
    yield Picture("JPEG cmyk of Adobe", adobe, shown, 3)
    if int(PIL.__version__.partition(".")[0]) >= 13:  # earlier ones call it truncated
        yield Picture("TIFF ycbcr", saved(image.convert("YCbCr"), "TIFF"), colour, 3)
    lab = np.broadcast_to(np.array([255, 0, 0], np.uint8), (H, W, 3))  # L* = 100 without colour
    yield Picture("TIFF lab", saved(Image.fromarray(lab, "LAB"), "TIFF"), np.full((H, W, 3), 255), 3)
    palette = noise(256, 3, seed=2).astype(np.uint8)
    indexed = Image.fromarray(grey, "P")
    indexed.putpalette(palette.tobytes())
    for form in ("GIF", "BMP", "TIFF"):
        yield Picture(f"{form} palette", saved(indexed, form), palette[grey])
    key = int(grey[1, 2])
    gif = saved(indexed, "GIF", transparency=key, optimize=False)
    yield Picture("GIF transparent", gif, keyed(palette[grey], grey, key))
    frames = saved(indexed, "GIF", save_all=True, append_images=[Image.new("P", (W, H))], optimize=False)
    yield Picture("GIF animated", frames, palette[grey])
    for form in ("PNG", "WEBP"):
        frames = saved(image, form, save_all=True, append_images=[Image.new("RGB", (W, H))], lossless=True)
        yield Picture(f"{form} animated", frames, colour)
    pa = Image.new("PA", (W, H))
    pa.putpalette(palette.tobytes())
    pa.putdata(list(zip(grey.ravel().tolist(), alpha.ravel().tolist(), strict=True)))
    yield Picture("TIFF palette-alpha", saved(pa, "TIFF"), on_white(palette[grey], alpha), 1)
    shown = rgb(np.rint(deep / 65535 * 255))
    little = Image.fromarray(deep.astype(np.uint16))
    big = Image.frombytes("I;16B", (W, H), deep.astype(">u2").tobytes())
    yield Picture("TIFF grey 16 little-endian", saved(little, "TIFF"), shown)
    yield Picture("TIFF grey 16 big-endian", saved(big, "TIFF"), shown)
    yield Picture("TIFF grey 16 compressed", saved(little, "TIFF", compression="tiff_lzw"), shown)
    white = ImageFileDirectory_v2()
    white[262] = 0
    data = saved(little, "TIFF", tiffinfo=white)
    yield Picture("TIFF grey 16, zero is white", data, 255 - shown)
    yield Picture("JPEG2000 grey 16", saved(little, "JPEG2000", irreversible=False), shown)
    yield Picture("PGM 16", b"P5 9 6 65535\n" + deep.astype(">u2").tobytes(), shown)
    ten = deep // 64
    yield Picture(
        "PGM of range 1023", b"P5 9 6 1023\n" + ten.astype(">u2").tobytes(), rgb(np.rint(ten / 1023 * 255)), 1
    )
    text = "P2 9 6 15\n" + " ".join(str(v // 4096) for v in deep.ravel())
    yield Picture("PGM in text", text.encode(), rgb(np.rint(deep // 4096 / 15 * 255)), 1)
    twelve = deep // 16
    bitwise = (twelve[..., None] >> np.arange(12)[::-1] & 1).reshape(H, -1).astype(np.uint8)
    packed = b"".join(np.packbits(row).tobytes() for row in bitwise)
    yield Picture("TIFF grey 12", tiff(packed, 12, len(packed)), rgb(np.rint(twelve / 4095 * 255)))
    straight, faint = flat.astype(float), np.full((H, W), 128)
    premultiplied = np.concatenate([np.rint(straight * 128 / 255), np.full((H, W, 1), 128)], -1).astype(np.uint8)
    extra = {277: (3, 4), 258: (3, 8), 338: (3, 1), 262: (3, 2)}
    yield Picture(
        "TIFF rgba premultiplied", tiff(premultiplied.tobytes(), 8, H * W * 4, extra), on_white(straight, faint), 2
    )


def tiff(pixels: bytes, bits: int, size: int, more: dict[int, tuple[int, int]] | None = None) -> bytes:
    """A little-endian TIFF file of one strip; ``more`` tags as (type, value)."""
    tags = {256: (3, W), 257: (3, H), 258: (3, bits), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, 1)}
    tags |= {278: (3, H), 279: (4, size)} | (more or {})
    pixels += b"\0" * (len(pixels) % 2)
    entries = b""
    after = 8 + len(pixels)
    if tags[277][1] == 4:  # four numbers of bits stand outside of the directory
        pixels += struct.pack("<4H", *[bits] * 4)
    for tag, (kind, value) in sorted(tags.items()):
        if tag == 258 and tags[277][1] == 4:
            entries += struct.pack("<HHII", tag, 3, 4, after)
        else:
            entries += struct.pack("<HHI", tag, kind, 1) + struct.pack("<H2x" if kind == 3 else "<I", value)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def oriented() -> Iterator[Picture]:
    """Every orientation in every format that states one, in RGB and with transparency or another mode."""
    colour, alpha = noise(H, W, 3).astype(np.uint8), noise(H, W, seed=1).astype(np.uint8)
    palette = noise(256, 3, seed=2).astype(np.uint8)
    indexed = Image.fromarray(colour[..., 0], "P")
    indexed.putpalette(palette.tobytes())
    rgba = Image.fromarray(np.concatenate([colour, alpha[..., None]], -1))
    deep = noise(H, W, high=65536)
    shown_deep = rgb(np.rint(deep / 65535 * 255))
    over = on_white(colour, alpha)
    exact: dict[str, dict[str, Any]] = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}
    for number, turn in ORIENTED.items():
        exif = Image.Exif()
        exif[0x0112] = number
        for form, options in exact.items():
            for name, image, shown in (("rgb", Image.fromarray(colour), colour), ("rgba", rgba, over)):
                data = saved(image, form, exif=exif, **options)
                yield Picture(f"{form} {name} orientation {number}", data, turn(shown), 1)
        for form in ("PNG", "TIFF"):
            data = saved(Image.fromarray(deep.astype(np.uint16)), form, exif=exif)
            yield Picture(f"{form} grey 16 orientation {number}", data, turn(shown_deep))
        data = saved(indexed, "PNG", exif=exif, transparency=bytes(range(256)))
        yield Picture(
            f"PNG palette orientation {number}", data, turn(on_white(palette[colour[..., 0]], colour[..., 0])), 1
        )
        smooth = np.kron(noise(1, 2, 3, seed=5), np.ones((16, 16, 1))).astype(np.uint8)
        for form in ("JPEG", "AVIF"):
            options = {"subsampling": "4:4:4"} if form == "AVIF" else {"subsampling": 0}
            data = saved(Image.fromarray(smooth), form, quality=100, exif=exif, **options)
            yield Picture(f"{form} rgb orientation {number}", data, turn(smooth), 8)


def pictures() -> list[Picture]:
    return [*pngs(), *others(), *oriented()]
