"""Look a uid up in the Bloom filter of a parquet column, which pyarrow writes but does not read.

In: an open parquet file and a uid. Out: False only where the row group surely lacks it; a few KB are read instead of
the column. The filter is Parquet's split-block one: blocks of eight 32-bit words, one bit in each word.

Source: Parquet format, BloomFilter.md; xxHash, XXH64.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import pyarrow.parquet as pq

VALUE_BYTES = 32
"""Of the values: uids in hex. Other lengths would need the rest of XXH64."""

SALTS = (0x47B6137B, 0x44974D91, 0x8824AD5B, 0xA2B7289D, 0x705495C7, 0x2DF1424B, 0x9EFC4947, 0x5C6BFB31)
BLOCK_BYTES = 4 * len(SALTS)

PRIME_1, PRIME_2, PRIME_3, PRIME_4 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63
MASK = (1 << 64) - 1


def may_hold(file: BinaryIO, group: pq.RowGroupMetaData, column: str, value: bytes) -> bool:
    """Whether a row group may hold a value; True where it has no filter.

    Args:
        file: the parquet file.
        group: metadata of the row group.
        column: of 32-byte strings.
        value: 32 bytes.
    """
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    offset, length = chunk.bloom_filter_offset, chunk.bloom_filter_length
    if offset is None or length is None:
        return True
    # A header of some 16 bytes stands before the bits, whose length is a power of two and at least one block.
    bits_bytes = 1 << (int(length).bit_length() - 1)
    hashed = xxh64(value)
    block = ((hashed >> 32) * (bits_bytes // BLOCK_BYTES)) >> 32
    file.seek(offset + length - bits_bytes + block * BLOCK_BYTES)
    words = struct.unpack("<8I", file.read(BLOCK_BYTES))
    low = hashed & 0xFFFFFFFF
    return all(word >> ((low * salt & 0xFFFFFFFF) >> 27) & 1 for word, salt in zip(words, SALTS, strict=True))


def xxh64(value: bytes) -> int:
    """XXH64 of exactly 32 bytes, seed 0.

    Raises:
        ValueError: of another length.
    """
    if len(value) != VALUE_BYTES:
        raise ValueError(f"{len(value)} bytes, not {VALUE_BYTES}")
    starts = (PRIME_1 + PRIME_2, PRIME_2, 0, -PRIME_1)
    lanes = [_round(start, lane) for start, lane in zip(starts, struct.unpack("<4Q", value), strict=True)]
    total = sum(_rotated(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
    for lane in lanes:
        total = ((total ^ _round(0, lane)) * PRIME_1 + PRIME_4) & MASK
    total = (total + VALUE_BYTES) & MASK
    total = (total ^ total >> 33) * PRIME_2 & MASK
    total = (total ^ total >> 29) * PRIME_3 & MASK
    return total ^ total >> 32


def _round(start: int, lane: int) -> int:
    return _rotated((start + lane * PRIME_2) & MASK, 31) * PRIME_1 & MASK


def _rotated(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & MASK
