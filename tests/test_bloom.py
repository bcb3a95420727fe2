"""The filter never denies a uid that is there, denies most others, and reads no more than a block."""

from __future__ import annotations

import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bloom import BLOCK_BYTES, may_hold, xxh64
from pipeline.parts import to_parquet


def uids(prefix: str, count: int) -> list[str]:
    return [hashlib.md5(f"{prefix}{i}".encode()).hexdigest() for i in range(count)]


def asked(data: bytes, values: list[str]) -> list[bool]:
    group = pq.read_metadata(io.BytesIO(data)).row_group(0)
    return [may_hold(io.BytesIO(data), group, "uid", value.encode()) for value in values]


@pytest.mark.parametrize("rows", [1, 3, 30, 3000])
def test_every_uid_that_is_there_is_found_and_few_others(rows: int) -> None:
    data = to_parquet(pa.table({"other": ["x"] * rows, "uid": uids("there", rows)}), bloom=["uid"])
    assert all(asked(data, uids("there", rows)))
    assert sum(asked(data, uids("absent", 1000))) < 60


def test_without_a_filter_everything_may_be_there() -> None:
    assert asked(to_parquet(pa.table({"uid": uids("there", 3)})), uids("absent", 3)) == [True] * 3


def test_one_block_is_read() -> None:
    class Counting(io.BytesIO):
        bytes_read = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.bytes_read += len(data)
            return data

    data = to_parquet(pa.table({"uid": uids("there", 3000)}), bloom=["uid"])
    file = Counting(data)
    may_hold(file, pq.read_metadata(io.BytesIO(data)).row_group(0), "uid", uids("there", 1)[0].encode())
    assert file.bytes_read == BLOCK_BYTES


def test_only_values_of_32_bytes_can_be_hashed() -> None:
    with pytest.raises(ValueError, match="31 bytes, not 32"):
        xxh64(b"x" * 31)
