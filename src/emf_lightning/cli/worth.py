"""What it is worth to store text features, or an image's tokens: disk against GPU hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emf_lightning.cli.rows import gb, row
from emf_lightning.cli.sizes import EncoderSize
from emf_lightning.data.cache.entry_format import EntryFormat

IMAGE_TOKEN_BYTES = 2
"""Bytes of an image token: published codebooks have 65,536 entries."""

SCALES = (170_000, 10_000_000, 1_000_000_000)
"""Numbers of pairs for which a plan weighs the choices, beside its own."""


@dataclass(frozen=True)
class Prices:
    """Prices of the user's choice.

    Attributes:
        gpu_hour: of a GPU hour.
        terabyte_month: of a TB (10^12 bytes) on disk for a month.
        months: for which what is stored is kept.
    """

    gpu_hour: float
    terabyte_month: float
    months: float


@dataclass(frozen=True)
class Choice:
    """One thing to store: bytes on disk, seconds of GPUs to encode, and the price of both."""

    name: str
    bytes: float
    gpu_seconds: float
    price: float


def choices(
    encoder: EncoderSize, entry_bytes: int, pairs: int, rows: int, flops_per_second: float, prices: Prices
) -> list[Choice]:
    """What can be stored of ``pairs`` pairs of which training reads ``rows``, the cheapest first.

    What is stored is computed once for each pair that training reaches; what is not, at each row.

    Args:
        encoder: the text encoder.
        entry_bytes: of a pair's features.
        pairs: in the data.
        rows: that training reads, over all its passes.
        flops_per_second: operations that one GPU computes.
        prices: of disks and GPUs.
    """
    once, (first, *rest) = min(pairs, rows), encoder.flops
    whole = first + sum(rest)
    kinds = [("features", entry_bytes, once * whole), ("nothing", 0, rows * whole)]
    if encoder.image_tokens and rest:
        kinds.append(("image tokens", encoder.image_tokens * IMAGE_TOKEN_BYTES, once * first + rows * sum(rest)))
    found = []
    for name, size, flops in kinds:
        disk, seconds = once * size, flops / flops_per_second
        price = seconds / 3600 * prices.gpu_hour + disk / 1e12 * prices.terabyte_month * prices.months
        found.append(Choice(name, disk, seconds, price))
    return sorted(found, key=lambda choice: (choice.price, choice.bytes))


def worth(
    encoder: EncoderSize,
    stored: EntryFormat,
    share: float,
    rows: int,
    scales: Sequence[int],
    flops_per_second: float,
    prices: Prices,
) -> list[str]:
    """The section of a plan: the cheapest choice for each number of pairs in ``scales``; see ``choices``.

    Args:
        encoder: the text encoder.
        stored: the format of its features in the cache.
        share: of a row of training's other operations that encoding its caption takes.
        rows: that training reads.
        scales: numbers of pairs.
        flops_per_second: operations that one GPU computes.
        prices: of disks and GPUs.
    """
    tokens = encoder.image_tokens
    lines = [
        f"Storing text features ({prices.gpu_hour:g} a GPU hour, {prices.terabyte_month * prices.months:g} a TB)",
        row("features of a pair", f"{stored.largest / 1e6:.3g} MB", f"in {stored.dtype}"),
        *([row("image tokens of a pair", f"{tokens * IMAGE_TOKEN_BYTES / 1e3:.3g} kB")] if tokens else []),
        row("encoding a pair again", f"{sum(encoder.flops) / 1e12:.3g} TFLOP", f"{share:.2g} of the rest of a row"),
    ]
    for pairs in scales:
        found = choices(encoder, stored.largest, pairs, rows, flops_per_second, prices)
        costs = (f"{one.name} {one.price:.3g} ({gb(one.bytes)}, {one.gpu_seconds / 3600:.3g} GPU h)" for one in found)
        lines.append(row(f"{pairs:,} pairs", found[0].name, f"read {rows / pairs:.3g} times: {', '.join(costs)}"))
    return [*lines, *([row("", "", "data.cache holds features; it holds no image tokens")] if tokens else [])]
