"""Byte format of a cache entry: a header, the mask as bits, then the unmasked tokens."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_VERSION = 1
_HEADER = struct.Struct("<BBxxIIII")  # version, dtype, L, D, tokens kept, crc32 of what follows
_CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float8": 3}
_LARGEST_FLOAT8 = 448.0

StoredDtype = Literal["float32", "bfloat16", "float16", "float8"]
"""Dtypes of stored numbers; float8 is e4m3 with a power of two for each token: 3 % error, a quarter of the size."""


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

    @property
    def _unpacked_dtype(self) -> torch.dtype:
        return getattr(torch, "bfloat16" if self.dtype == "float8" else self.dtype)

    def rounded(self, context: Tensor) -> Tensor:
        """``context`` rounded to the stored dtype, as float32."""
        if self.dtype != "float8":
            return context.to(self._unpacked_dtype).float()
        codes, powers = _to_float8(context.float())
        return torch.ldexp(codes.float(), powers)

    def error(self, context: Tensor, mask: Tensor) -> float:
        """Relative L2 error of storing the tokens of ``context`` ``[B, L, D]`` where ``mask``."""
        tokens = context.float()[mask]
        return float((self.rounded(tokens) - tokens).norm() / tokens.norm())

    def pack(self, context: Tensor, mask: Tensor) -> list[bytes]:
        """B entries from tokens ``[B, L, D]`` and masks ``[B, L]``."""
        context = context.cpu()
        if self.dtype == "float8":
            codes, powers = _to_float8(context.float())
            rows = torch.cat([codes.view(torch.uint8), powers.to(torch.int8).view(torch.uint8)], dim=-1).numpy()
        else:  # bytes, because numpy has no bfloat16
            rows = context.to(self._unpacked_dtype).contiguous().view(torch.uint8).numpy()
        entries = []
        for row, kept in zip(rows, mask.cpu().numpy(), strict=True):
            tokens, bits = row[kept].data, np.packbits(kept).data
            checksum = zlib.crc32(tokens, zlib.crc32(bits))
            header = _HEADER.pack(_VERSION, _CODES[self.dtype], self.length, self.width, len(tokens), checksum)
            entries.append(b"".join((header, bits, tokens)))
        return entries

    def is_intact(self, entry: memoryview | bytes) -> bool:
        """True if ``entry`` has this format and its checksum matches."""
        if len(entry) < _HEADER.size:
            return False
        version, code, length, width, tokens, checksum = _HEADER.unpack_from(entry)
        return (
            (version, code, length, width) == (_VERSION, _CODES[self.dtype], self.length, self.width)
            and len(entry) == self.largest - (self.length - tokens) * self.token_bytes
            and zlib.crc32(memoryview(entry)[_HEADER.size :]) == checksum
        )

    def unpack(self, entries: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, L, D]``, zero where masked, and masks ``[B, L]`` of intact entries."""
        context = torch.empty(len(entries), self.length, self.width, dtype=self._unpacked_dtype)
        masks = torch.empty(len(entries), self.length, dtype=torch.bool)
        for entry, numbers, mask in zip(entries, context.view(torch.uint8).numpy(), masks.numpy(), strict=True):
            bits = np.frombuffer(entry, np.uint8, -(-self.length // 8), _HEADER.size)
            mask[:] = np.unpackbits(bits, count=self.length)
            tokens = np.frombuffer(entry, np.uint8, offset=_HEADER.size + len(bits)).reshape(-1, self.token_bytes)
            if self.dtype == "float8":
                tokens = _from_float8(tokens)
            if mask[: len(tokens)].all():  # the usual case needs no index
                numbers[: len(tokens)] = tokens
                numbers[len(tokens) :] = 0
            else:
                numbers[:] = 0
                numbers[mask] = tokens
        return context, masks


def _to_float8(context: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers ``[..., D]``, and exponents ``[..., 1]`` of the powers of two that tokens were divided by."""
    powers = torch.frexp(context.abs().amax(-1, keepdim=True) / _LARGEST_FLOAT8).exponent.clamp(-100, 100)
    return torch.ldexp(context, -powers).to(torch.float8_e4m3fn), powers


def _from_float8(tokens: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes ``[n, 2 D]`` of bfloat16 numbers, from bytes ``[n, D + 1]`` of e4m3 numbers and an exponent."""
    numbers = np.empty((len(tokens), tokens.shape[1] - 1), np.uint16)
    powers = tokens[:, -1].view(np.int8)
    for power in np.unique(powers).tolist():  # few, as tokens of one model have similar norms
        rows = powers == power
        numbers[rows] = _bfloat16_of_float8(power)[tokens[rows, :-1]]
    return numbers.view(np.uint8)


@cache
def _bfloat16_of_float8(power: int) -> NDArray[np.uint16]:
    """The 256 e4m3 numbers times two to the ``power``, as bfloat16 bit patterns: the upper half of a float32."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return (torch.ldexp(values, torch.tensor(power)).numpy().view(np.uint32) >> 16).astype(np.uint16)
