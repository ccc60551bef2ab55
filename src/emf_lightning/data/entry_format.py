"""The bytes of one caption's features: a header, the mask as bits, then the unmasked tokens and nothing else."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_VERSION = 1
_HEADER = struct.Struct("<BBxxIIII")  # version, dtype, L, D, tokens kept, crc32 of what follows
_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}


@dataclass(frozen=True)
class EntryFormat:
    """How features ``[L, D]`` and their mask ``[L]`` become bytes and come back.

    Attributes:
        length: L.
        width: D.
        dtype: of the stored numbers; they come back as float32.
    """

    length: int
    width: int
    dtype: Literal["float32", "bfloat16", "float16"]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.width * (4 if self.dtype == "float32" else 2)

    @property
    def largest(self) -> int:
        """Bytes of an entry without a masked token."""
        return _HEADER.size + -(-self.length // 8) + self.length * self.token_bytes

    def rounded(self, context: Tensor) -> Tensor:
        """``context`` as it comes back from the store, float32."""
        return context.to(getattr(torch, self.dtype)).float()

    def pack(self, context: Tensor, mask: Tensor) -> list[bytes]:
        """One entry for each row of ``[B, L, D]`` and ``[B, L]``."""
        # Bytes rather than numbers: numpy knows no bfloat16.
        rows = context.to(getattr(torch, self.dtype)).cpu().contiguous().view(torch.uint8).numpy()
        return [self._pack_row(row, kept) for row, kept in zip(rows, mask.cpu().numpy(), strict=True)]

    def _pack_row(self, row: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bytes:
        tokens, bits = row[mask].data, np.packbits(mask).data
        checksum = zlib.crc32(tokens, zlib.crc32(bits))
        header = _HEADER.pack(_VERSION, _CODES[self.dtype], self.length, self.width, len(tokens), checksum)
        return b"".join((header, bits, tokens))

    def is_intact(self, entry: memoryview) -> bool:
        """Whether ``entry`` is of this format and still what was written."""
        if len(entry) < _HEADER.size:
            return False
        version, code, length, width, tokens, checksum = _HEADER.unpack_from(entry)
        return (
            (version, code, length, width) == (_VERSION, _CODES[self.dtype], self.length, self.width)
            and len(entry) == self.largest - (self.length - tokens) * self.token_bytes
            and zlib.crc32(entry[_HEADER.size :]) == checksum
        )

    def unpack(self, entry: memoryview, context: NDArray[np.float32], mask: NDArray[np.bool_]) -> bool:
        """Writes an intact entry into ``context`` ``[L, D]``, zeros where masked, and ``mask`` ``[L]``; else False."""
        if not self.is_intact(entry):
            return False
        bits = np.frombuffer(entry, np.uint8, -(-self.length // 8), _HEADER.size)
        mask[:] = np.unpackbits(bits, count=self.length)
        stored = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}[self.dtype]
        tokens = np.frombuffer(entry, stored, offset=_HEADER.size + len(bits)).reshape(-1, self.width)
        prefix = mask[: len(tokens)].all()  # the usual case needs no second copy
        target = context[: len(tokens)] if prefix else np.empty(tokens.shape, np.float32)
        if self.dtype == "bfloat16":  # the upper half of a float32
            np.left_shift(tokens, 16, out=target.view(np.uint32), dtype=np.uint32)
        else:
            target[:] = tokens
        if prefix:
            context[len(tokens) :] = 0
        else:
            context[:] = 0
            context[mask] = target
        return True
