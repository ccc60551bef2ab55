"""Byte format of a cache entry: a header, the mask as bits, then the unmasked tokens."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.shared_memory import empty

try:
    from zlib_ng.zlib_ng import crc32  # the extra `fast`: the same value, ten times as fast
except ImportError:
    from zlib import crc32

_VERSION = 1
_HEADER = struct.Struct("<BBxxIIII")  # version, dtype, L, D, tokens kept, crc32 of what follows
_CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float8": 3}
_LARGEST_FLOAT8 = 448.0
_ROWS = 32
"""Tokens of float8 that are converted at a time: few enough for the processor's cache."""

StoredDtype = Literal["float32", "bfloat16", "float16", "float8"]
"""Dtypes of stored numbers; float8 is e4m3 with a power of two for each token: 3 % error, a quarter of the size."""


def gigabytes(needed: int) -> float:
    """``max_gb`` of a cache that holds ``needed`` bytes: two decimals, rounded up."""
    return math.ceil(needed / 1e7 + 0.1) / 100


@dataclass(frozen=True)
class EntryFormat:
    """Converts tokens ``[L, D]``, ``length`` x ``width``, and their mask ``[L]`` to bytes and back.

    ``dtype`` is that of the stored numbers; ``unpack`` returns it, or bfloat16 for float8, which represents it exactly.
    """

    length: int
    width: int
    dtype: StoredDtype

    @property
    def token_bytes(self) -> int:
        """Bytes of a token."""
        return self.width + 1 if self.dtype == "float8" else self.width * self._unpacked_dtype.itemsize

    @property
    def largest(self) -> int:
        """Bytes of an entry without a masked token."""
        return _HEADER.size + -(-self.length // 8) + self.length * self.token_bytes

    def on_disk(self, page: int = 4096) -> int:
        """Upper bound of the bytes that LMDB takes for an entry without a masked token, with pages of ``page`` bytes.

        An entry beyond half a page has whole pages; smaller ones share pages, of which more than a half is filled.
        """
        entry = self.largest + 50  # with its key and LMDB's header
        if entry > page // 2:
            return -(-(entry - 34) // page) * page + 80
        return page * 20 // (11 * (page // entry))

    @property
    def _unpacked_dtype(self) -> torch.dtype:
        return getattr(torch, "bfloat16" if self.dtype == "float8" else self.dtype)

    def rounded(self, context: Tensor) -> Tensor:
        """``context`` rounded to the stored dtype, as float32."""
        if self.dtype != "float8":
            return context.to(self._unpacked_dtype).float()
        codes, powers = _to_float8(context.float())
        return codes.float() * _power_of_two(powers)

    def error(self, context: Tensor, mask: Tensor) -> float:
        """Relative L2 error of storing the tokens of ``context`` ``[B, L, D]`` where ``mask``."""
        tokens = context.float()[mask]
        return float((self.rounded(tokens) - tokens).norm() / tokens.norm())

    def pack(self, context: Tensor, mask: Tensor) -> list[bytearray]:
        """B entries from tokens ``[B, L, D]`` and masks ``[B, L]``."""
        entries = []
        for row, kept in zip(context.cpu(), mask.cpu(), strict=True):
            bits, tokens = np.packbits(kept.numpy()), self._stored(row if kept.all() else row[kept])
            entry = bytearray(_HEADER.size + bits.nbytes + tokens.nbytes)
            entry[_HEADER.size : _HEADER.size + bits.nbytes] = bits.data
            np.frombuffer(entry, np.uint8, offset=_HEADER.size + bits.nbytes).reshape(tokens.shape)[:] = tokens
            checksum = crc32(memoryview(entry)[_HEADER.size :])
            _HEADER.pack_into(entry, 0, _VERSION, _CODES[self.dtype], self.length, self.width, len(tokens), checksum)
            entries.append(entry)
        return entries

    def _stored(self, tokens: Tensor) -> NDArray[np.uint8]:
        """Bytes ``[n, token_bytes]`` of tokens ``[n, D]``; bytes, because numpy has no bfloat16."""
        if self.dtype != "float8":
            return tokens.to(self._unpacked_dtype).contiguous().view(torch.uint8).numpy()
        codes, powers = _to_float8(tokens.float())
        return torch.cat([codes.view(torch.uint8), powers.to(torch.int8).view(torch.uint8)], dim=-1).numpy()

    def is_intact(self, entry: memoryview | bytes) -> bool:
        """True if ``entry`` has this format and its checksum matches."""
        if len(entry) < _HEADER.size:
            return False
        version, code, length, width, tokens, checksum = _HEADER.unpack_from(entry)
        return (
            (version, code, length, width) == (_VERSION, _CODES[self.dtype], self.length, self.width)
            and len(entry) == self.largest - (self.length - tokens) * self.token_bytes
            and crc32(memoryview(entry)[_HEADER.size :]) == checksum
        )

    def unpack(self, entries: Sequence[memoryview | bytes]) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, L, D]``, zero where masked, and masks ``[B, L]`` of intact entries."""
        context = empty(len(entries), self.length, self.width, dtype=self._unpacked_dtype)
        masks = torch.empty(len(entries), self.length, dtype=torch.bool)
        for entry, numbers, mask in zip(entries, context.view(torch.uint8).numpy(), masks.numpy(), strict=True):
            bits = np.frombuffer(entry, np.uint8, -(-self.length // 8), _HEADER.size)
            mask[:] = np.unpackbits(bits, count=self.length)
            tokens = np.frombuffer(entry, np.uint8, offset=_HEADER.size + len(bits)).reshape(-1, self.token_bytes)
            first = numbers[: len(tokens)]
            if self.dtype == "float8":
                _from_float8(tokens, first.view(np.uint16))
            else:
                first[:] = tokens
            if not mask[: len(tokens)].all():  # the usual case needs no index
                numbers[mask] = first.copy()
                numbers[~mask] = 0
            else:
                numbers[len(tokens) :] = 0
        return context, masks


def _to_float8(context: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers ``[..., D]``, and exponents ``[..., 1]`` of the powers of two that tokens were divided by."""
    powers = torch.frexp(context.abs().amax(-1, keepdim=True) / _LARGEST_FLOAT8).exponent.clamp(-100, 100)
    return (context * _power_of_two(-powers)).to(torch.float8_e4m3fn), powers


def _power_of_two(exponents: Tensor) -> Tensor:
    """Two to the power of int32 ``exponents`` in -126 to 127, float32: they are its exponent bits."""
    return ((exponents + 127) << 23).view(torch.float32)


def _from_float8(tokens: NDArray[np.uint8], numbers: NDArray[np.uint16]) -> None:
    """Writes bfloat16 numbers ``[n, D]``, as bits, from bytes ``[n, D + 1]`` of e4m3 numbers and an exponent.

    The fraction's 3 bits and the exponent's 4 move to their places in bfloat16, whose exponent is larger by a constant.
    Zeros, subnormal numbers and NaN are not so simple, and few: they come from a table.
    """
    powers = tokens[:, -1:].view(np.int8).astype(np.int16)
    exponents = (powers + 120) << 7  # the biases are 127 and 7
    for first in range(0, len(tokens), _ROWS):
        rows = slice(first, first + _ROWS)
        codes = np.ascontiguousarray(tokens[rows, :-1])
        bits = codes.view(np.int8).astype(np.int16)  # copies of the sign fill the upper byte
        bits <<= 4
        bits &= -0x7810  # 0x87f0: one sign, exponent and fraction
        bits += exponents[rows]
        special = np.flatnonzero((codes - np.uint8(8)) & 0x7F >= 0x77)  # magnitudes 0 to 7, and 127
        row, column = np.divmod(special, codes.shape[1])
        bits.reshape(-1)[special] = _special_numbers()[powers[rows][row, 0] + 128, codes[row, column]]
        numbers[rows] = bits.view(np.uint16)


@cache
def _special_numbers() -> NDArray[np.int16]:
    """Bits ``[exponent + 128, code]`` of the 256 e4m3 numbers times two to the exponent: a float32's upper half."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    powers = torch.exp2(torch.arange(-128, 128, dtype=torch.float64))[:, None]
    return (((numbers * powers).float()).numpy().view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
