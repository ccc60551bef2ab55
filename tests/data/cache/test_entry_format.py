import hashlib
import struct
import zlib

import numpy as np
import pytest
import torch

from emf_lightning.data.cache import entry_format
from emf_lightning.data.cache.entry_format import EntryFormat, gigabytes
from emf_lightning.data.cache.lmdb_store import LmdbStore

DTYPES = ("float32", "bfloat16", "float16", "float8")
MASKS = {
    "prefix": [True] * 4 + [False] * 7,
    "all": [True] * 11,
    "none": [False] * 11,
    "suffix": [False] * 4 + [True] * 7,
    "scattered": [True, False, False, True, True, False, True, False, False, False, True],
}


def row(dtype: str = "float32", mask: str = "prefix") -> tuple[EntryFormat, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return EntryFormat(length=11, width=5, dtype=dtype), torch.randn(1, 11, 5) * 100, torch.tensor([MASKS[mask]])


def unpacked(entries: EntryFormat, entry: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    assert entries.is_intact(entry)
    context, mask = entries.unpack([entry])
    return context[0], mask[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_round_trip_keeps_the_mask_and_the_rounded_tokens_and_zeroes_the_rest(dtype, mask):
    entries, context, kept = row(dtype, mask)
    (entry,) = entries.pack(context, kept)
    loaded, loaded_mask = unpacked(entries, entry)
    assert loaded.dtype == getattr(torch, "bfloat16" if dtype == "float8" else dtype)
    assert torch.equal(loaded_mask, kept[0])
    if dtype != "float8":
        expected = torch.where(kept[0, :, None], context[0].to(getattr(torch, dtype)), 0.0)
        assert torch.equal(loaded, expected)
    assert not loaded[~loaded_mask].any()
    assert torch.equal(entries.rounded(context)[kept], loaded[loaded_mask].float())


def test_several_entries_are_unpacked_in_order():
    entries, context, _ = row("bfloat16")
    contexts, masks = torch.cat([context, -context]), torch.tensor([MASKS["scattered"], MASKS["prefix"]])
    loaded, loaded_masks = entries.unpack(entries.pack(contexts, masks))
    assert torch.equal(loaded_masks, masks)
    assert torch.equal(loaded[masks], contexts.bfloat16()[masks])
    assert entries.unpack([])[0].shape == (0, 11, 5)


def test_float8_keeps_four_bits_of_each_number_whatever_the_size_of_its_token():
    entries = EntryFormat(length=4, width=2000, dtype="float8")
    context = torch.randn(1, 4, 2000, generator=torch.Generator().manual_seed(0))
    context *= torch.tensor([1e-6, 1.0, 300.0, 1e9])[:, None]
    mask = torch.ones(1, 4, dtype=torch.bool)
    loaded = unpacked(entries, entries.pack(context, mask)[0])[0].float()
    largest = context[0].abs().amax(-1, keepdim=True)
    kept = context[0].abs() > largest * 2**-14  # smaller ones lose bits
    assert ((loaded - context[0]).abs() / context[0].abs())[kept].max() <= 2**-4
    assert 0.02 < entries.error(context, mask) < 0.035
    assert EntryFormat(4, 2000, "bfloat16").error(context, mask) < 0.002
    assert EntryFormat(4, 2000, "float32").error(context, mask) == 0


def test_a_token_of_zeros_and_the_largest_number_survive_float8():
    entries = EntryFormat(length=2, width=3, dtype="float8")
    context = torch.tensor([[[0.0, 0.0, 0.0], [448.0 * 2**5, -448.0 * 2**5, 1.0]]])
    loaded = unpacked(entries, entries.pack(context, torch.ones(1, 2, dtype=torch.bool))[0])[0]
    assert torch.equal(loaded.float(), context[0])


def test_infinities_and_tiny_numbers_survive_bfloat16():
    entries = EntryFormat(length=11, width=5, dtype="bfloat16")
    context = torch.zeros(1, 11, 5)
    context[0, 0] = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-40, 3e38])
    (entry,) = entries.pack(context, torch.ones(1, 11, dtype=torch.bool))
    assert torch.equal(unpacked(entries, entry)[0], context[0].bfloat16())


def test_only_unmasked_tokens_take_space():
    entries, context, mask = row("bfloat16", "prefix")
    (entry,) = entries.pack(context, mask)
    assert entries.largest - len(entry) == 7 * 5 * 2
    assert len(EntryFormat(11, 5, "bfloat16").pack(context, torch.ones_like(mask))[0]) == entries.largest


def test_what_lies_in_masked_positions_is_not_stored():
    entries, context, mask = row()
    other = context.masked_fill(~mask[..., None], torch.nan)
    assert entries.pack(context, mask) == entries.pack(other, mask)


def test_rows_that_are_views_of_other_memory_are_packed_alike():
    entries, context, mask = row()
    strided = context.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert entries.pack(strided, mask) == entries.pack(context, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_flipped_bit_goes_unnoticed(dtype):
    entries, context, mask = row(dtype, "scattered")
    (entry,) = entries.pack(context, mask)
    for place in range(len(entry)):
        if place in (2, 3):  # padding of the header
            continue
        damaged = bytearray(entry)
        damaged[place] ^= 1 << place % 8
        assert not entries.is_intact(memoryview(damaged)), place


def test_a_shortened_or_lengthened_entry_is_not_intact():
    entries, context, mask = row()
    (entry,) = entries.pack(context, mask)
    for wrong in (b"", entry[:7], entry[:-1], entry + b"\0"):
        assert not entries.is_intact(memoryview(wrong))


@pytest.mark.parametrize("other", [(10, 5, "float32"), (11, 6, "float32"), (11, 5, "bfloat16")], ids=str)
def test_an_entry_of_another_shape_or_dtype_is_not_intact(other):
    entries, context, mask = row()
    (entry,) = entries.pack(context, mask)
    assert entries.is_intact(memoryview(entry))
    assert not EntryFormat(*other).is_intact(memoryview(entry))


def as_first_written(dtype: str, context: torch.Tensor, kept: torch.Tensor) -> bytes:
    """An entry of one sample as existing caches hold it, by zlib's checksum and ldexp."""
    numbers = context[kept]
    if dtype == "float8":
        powers = torch.frexp(numbers.abs().amax(-1, keepdim=True) / 448).exponent.clamp(-100, 100)
        codes = torch.ldexp(numbers, -powers).to(torch.float8_e4m3fn)
        tokens = torch.cat([codes.view(torch.uint8), powers.to(torch.int8).view(torch.uint8)], -1).numpy().tobytes()
    else:
        tokens = numbers.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
    body = np.packbits(kept.numpy()).tobytes() + tokens
    code = ("float32", "bfloat16", "float16", "float8").index(dtype)
    return struct.pack("<BBxxIIII", 1, code, *context.shape, int(kept.sum()), zlib.crc32(body)) + body


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_entries_have_the_bytes_that_existing_caches_hold(dtype, mask):
    entries, context, kept = row(dtype, mask)
    context *= torch.logspace(-30, 30, 11)[:, None] if dtype != "float16" else 1
    first = as_first_written(dtype, context[0], kept[0])
    assert entries.pack(context, kept) == [first]
    loaded, loaded_mask = unpacked(entries, memoryview(first))
    assert torch.equal(loaded_mask, kept[0])
    assert torch.equal(loaded[loaded_mask].float(), entries.rounded(context)[kept])


def test_every_float8_number_is_read_as_ldexp_gives_it():
    codes, exponents = torch.arange(256, dtype=torch.uint8), torch.arange(-100, 101)
    entries = EntryFormat(length=201, width=256, dtype="float8")
    body = np.packbits(np.ones(201, bool)).tobytes()
    body += (
        torch.cat([codes.expand(201, -1), exponents.to(torch.int8).view(torch.uint8)[:, None]], -1).numpy().tobytes()
    )
    entry = struct.pack("<BBxxIIII", 1, 3, 201, 256, 201, zlib.crc32(body)) + body
    numbers = torch.ldexp(codes.view(torch.float8_e4m3fn).float().expand(201, -1), exponents[:, None])
    expected = torch.from_numpy((numbers.contiguous().numpy().view(np.uint32) >> 16).astype(np.uint16))
    assert torch.equal(unpacked(entries, entry)[0].view(torch.uint16), expected)
    assert entries.unpack([entry])[0].isnan().sum() == 2 * 201


@pytest.mark.parametrize("number", [0.0, -0.0, 1e-45, 1e-38, 3e38, float("inf"), float("nan")])
def test_tokens_with_extreme_numbers_become_the_float8_codes_of_ldexp(number):
    context = torch.randn(1, 3, 7) * torch.tensor([1e-35, 1.0, 1e35])[:, None]
    context[0, :, 3] = number
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert EntryFormat(3, 7, "float8").pack(context, mask) == [as_first_written("float8", context[0], mask[0])]


def test_the_checksum_is_zlib_s_wherever_the_bytes_lie():
    data = np.random.default_rng(0).integers(0, 256, 70_000, dtype=np.uint8)
    for first in range(17):
        for length in (0, 1, 7, 63, 64, 65, 4096, 65_543):
            part = data[first : first + length]
            assert entry_format.crc32(part) == zlib.crc32(part)


@pytest.mark.parametrize("batch", [32, 512])
@pytest.mark.parametrize(("length", "width", "dtype"), [(4, 24, "float32"), (1, 10, "bfloat16"), (8, 64, "float32")])
def test_a_cache_of_the_advised_size_holds_all_entries(tmp_path, length, width, dtype, batch):
    count = 6000
    entry_format = EntryFormat(length, width, dtype)
    store = LmdbStore(str(tmp_path / "cache"), map_size=int(gigabytes(count * entry_format.on_disk()) * 1e9))
    store.open()
    entry = bytes(entry_format.largest)
    for first in range(0, count, batch):
        with store.transaction(write=True) as transaction:  # raises where the map is full
            for number in range(first, min(first + batch, count)):
                assert transaction.put(hashlib.sha256(f"{number}".encode()).digest(), entry)


@pytest.mark.parametrize("needed", [16.03e9, 1.0e9, 123_456_789, 1e7, 9.999e9, 24.8e9])
def test_the_advised_size_is_never_too_small(needed):
    assert needed <= gigabytes(int(needed)) * 1e9 <= needed + 1.2e7
