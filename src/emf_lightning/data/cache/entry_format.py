"""The bytes of one sample's features: a header, the mask as bits, then the unmasked tokens and nothing else."""

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
"""How numbers are stored; float8 is e4m3 with a power of two for each token: 3 % of error, a quarter of the size."""


@dataclass(frozen=True)
class EntryFormat:
    """How features ``[L, D]`` and their mask ``[L]`` become bytes and come back.

    Attributes:
        length: L.
        width: D.
        dtype: of the stored numbers; they come back as they are, float8 as bfloat16, which holds it exactly.
    """

    length: int
    width: int
    dtype: StoredDtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.width + 1 if self.dtype == "float8" else self.width * self._loaded.itemsize

    @property
    def largest(self) -> int:
        """Bytes of an entry without a masked token."""
        return _HEADER.size + -(-self.length // 8) + self.length * self.token_bytes

    @property
    def _loaded(self) -> torch.dtype:
        """In which the numbers come back."""
        loaded: torch.dtype = getattr(torch, "bfloat16" if self.dtype == "float8" else self.dtype)
        return loaded

    def rounded(self, context: Tensor) -> Tensor:
        """``context`` as it comes back from the store, float32."""
        if self.dtype != "float8":
            return context.to(self._loaded).float()
        codes, powers = _to_float8(context.float())
        return torch.ldexp(codes.float(), powers)

    def error(self, context: Tensor, mask: Tensor) -> float:
        """The relative error of ``context`` ``[B, L, D]`` where ``mask``, as it comes back."""
        tokens = context.float()[mask]
        return float((self.rounded(tokens) - tokens).norm() / tokens.norm())

    def pack(self, context: Tensor, mask: Tensor) -> list[bytes]:
        """One entry for each row of ``[B, L, D]`` and ``[B, L]``."""
        context = context.cpu()
        if self.dtype == "float8":
            codes, powers = _to_float8(context.float())
            rows = torch.cat([codes.view(torch.uint8), powers.to(torch.int8).view(torch.uint8)], dim=-1).numpy()
        else:  # Bytes rather than numbers: numpy knows no bfloat16.
            rows = context.to(self._loaded).contiguous().view(torch.uint8).numpy()
        return [self._pack_row(row, kept) for row, kept in zip(rows, mask.cpu().numpy(), strict=True)]

    def _pack_row(self, row: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bytes:
        tokens, bits = row[mask].data, np.packbits(mask).data
        checksum = zlib.crc32(tokens, zlib.crc32(bits))
        header = _HEADER.pack(_VERSION, _CODES[self.dtype], self.length, self.width, len(tokens), checksum)
        return b"".join((header, bits, tokens))

    def is_intact(self, entry: memoryview | bytes) -> bool:
        """Whether ``entry`` is of this format and still what was written."""
        if len(entry) < _HEADER.size:
            return False
        version, code, length, width, tokens, checksum = _HEADER.unpack_from(entry)
        return (
            (version, code, length, width) == (_VERSION, _CODES[self.dtype], self.length, self.width)
            and len(entry) == self.largest - (self.length - tokens) * self.token_bytes
            and zlib.crc32(memoryview(entry)[_HEADER.size :]) == checksum
        )

    def unpack(self, entries: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Features ``[B, L, D]``, zeros where masked, and masks ``[B, L]`` of intact entries."""
        context = torch.empty(len(entries), self.length, self.width, dtype=self._loaded)
        mask = torch.empty(len(entries), self.length, dtype=torch.bool)
        numbers, masks = context.view(torch.uint8).numpy(), mask.numpy()
        for row, entry in enumerate(entries):
            self._unpack_row(entry, numbers[row], masks[row])
        return context, mask

    def _unpack_row(self, entry: bytes, numbers: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
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


def _to_float8(context: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers ``[..., D]``, and the power of two ``[..., 1]`` that each token was divided by."""
    powers = torch.frexp(context.abs().amax(-1, keepdim=True) / _LARGEST_FLOAT8).exponent.clamp(-100, 100)
    return torch.ldexp(context, -powers).to(torch.float8_e4m3fn), powers


def _from_float8(tokens: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bytes of bfloat16 numbers ``[n, 2 D]`` from e4m3 numbers and a power of two, ``[n, D + 1]``."""
    numbers = np.empty((len(tokens), tokens.shape[1] - 1), np.uint16)
    powers = tokens[:, -1].view(np.int8)
    for power in np.unique(powers).tolist():  # few: tokens of one model are of one size
        rows = powers == power
        numbers[rows] = _bfloat16_of_float8(power)[tokens[rows, :-1]]
    return numbers.view(np.uint8)


@cache
def _bfloat16_of_float8(power: int) -> NDArray[np.uint16]:
    """What each of the 256 bytes stands for, times two to the ``power``: the upper half of a float32, exactly."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return (torch.ldexp(values, torch.tensor(power)).numpy().view(np.uint32) >> 16).astype(np.uint16)
