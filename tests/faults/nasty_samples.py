"""One sample of every nasty kind: pictures, texts and records of JSON, with what is right for each."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emf_lightning.data.reading.decoding import SquareTransform
from tests.data.tars import noise_image
from tests.faults.pictures import H, pictures
from tests.faults.test_pixels import UNUSABLE

SIDE = H


class Sample(NamedTuple):
    """A sample: a picture, and a caption as a text file or in a record of JSON; its ``caption`` if it is used."""

    name: str
    image: bytes
    text: bytes | None = None
    json: bytes | None = None
    caption: str = ""
    reason: str = ""
    displayed: NDArray[Any] | None = None
    tolerance: int = 0


TEXTS: dict[str, tuple[bytes, str, str]] = {
    "a mark": ("\ufeffa dog".encode(), "a dog", ""),
    "two marks": ("\ufeff\ufeffa hen \r\n".encode(), "a hen", ""),
    "next line": ("a\x85cow".encode(), "a\x85cow", ""),
    "paragraphs": ("a\u2029calf\u2028b".encode(), "a\u2029calf\u2028b", ""),
    "end of text": (b"an <end_of_text> </s> <|im_end|> [SEP] ant", "an <end_of_text> </s> <|im_end|> [SEP] ant", ""),
    "long": (b"word " * 50_000, ("word " * 50_000).strip(), ""),
    "no word": (b"None", "None", ""),
    "emoji": ("\U0001f600 smile".encode(), "\U0001f600 smile", ""),
    "null bytes": ("a cat".encode("utf-16-le"), "", "caption with NUL characters"),
    "one null byte": (b"a\0b", "", "caption with NUL characters"),
    "latin": ("café".encode("latin-1"), "", "caption not UTF-8"),
    "surrogate bytes": (b"a \xed\xa0\xbd cat", "", "caption not UTF-8"),
    "empty": (b"", "", "empty caption"),
    "blank": (b" \n\t", "", "empty caption"),
    "only a mark": ("\ufeff".encode(), "", "empty caption"),
}
RECORDS: dict[str, tuple[bytes, str, str]] = {
    "high": (rb'{"prompt": "a \ud83d cat"}', "a \ufffd cat", ""),
    "low": (rb'{"prompt": "a \udc00 kitten"}', "a \ufffd kitten", ""),
    "a pair": (rb'{"prompt": "a \ud83d\ude00 grin"}', "a \U0001f600 grin", ""),
    "a number": (b'{"prompt": "a bird", "n": %s}' % (b"9" * 5000), "a bird", ""),
    "not a number": (b'{"prompt": "a fox", "n": NaN}', "a fox", ""),
    "marked": ('\ufeff{"prompt": "a wolf"}'.encode(), "a wolf", ""),
    "twice the same": (b'{"prompt": "a lynx", "prompt": "a lynx"}', "a lynx", ""),
    "twice": (b'{"prompt": "one", "prompt": "two"}', "", "missing caption"),
    "null": (b'{"prompt": null}', "", "missing caption"),
    "seven": (b'{"prompt": 7}', "", "missing caption"),
    "a list": (b'{"prompt": [7, null]}', "", "missing caption"),
    "no key": (b'{"url": "a"}', "", "missing caption"),
    "no object": (b"[1, 2]", "", "missing caption"),
    "json empty": (b'{"prompt": ""}', "", "empty caption"),
    "json null byte": (rb'{"prompt": "a\u0000b"}', "", "caption with NUL characters"),
    "deep": (b'{"prompt": "deep", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "", "broken JSON"),
    "cut": (b'{"prompt": "a', "", "broken JSON"),
    "json latin": ('{"prompt": "é"}'.encode("latin-1"), "", "caption not UTF-8"),
}


def samples() -> Iterator[Sample]:
    for number, picture in enumerate(pictures()):
        text = f"picture {number}"
        yield Sample(f"p{number}", picture.data, text.encode(), None, text, "", picture.displayed, picture.tolerance)
    for number, (kind, (data, reason)) in enumerate(UNUSABLE.items()):
        reason = "corrupt image" if kind == "truncated TIFF" else reason
        yield Sample(f"u{number}", data, f"unusable {number}".encode(), reason=reason)
    for kind, texts in (("t", TEXTS), ("j", RECORDS)):
        for number, (data, caption, reason) in enumerate(texts.values()):
            image = noise_image(1000 + number + 100 * (kind == "t"))
            pixels = np.asarray(Image.open(io.BytesIO(image)))
            stored = (data, None) if kind == "t" else (None, data)
            yield Sample(f"{kind}{number}", image, *stored, caption, reason, pixels)


SAMPLES = list(samples())
USED = {sample.caption: sample for sample in SAMPLES if not sample.reason}
LEFT_OUT = Counter(sample.reason for sample in SAMPLES if sample.reason)
assert len(USED) + LEFT_OUT.total() == len(SAMPLES)


def check(pixels: NDArray[Any], sample: Sample) -> None:
    """The picture that is displayed, or its centre square."""
    assert sample.displayed is not None
    right = sample.displayed
    if pixels.shape != right.shape:
        right = SquareTransform(SIDE)(Image.fromarray(right.astype(np.uint8)))
    assert pixels.shape == right.shape
    assert np.abs(pixels.astype(int) - right.astype(int)).max() <= sample.tolerance, sample.name
