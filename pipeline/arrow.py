"""Between Arrow columns and numpy arrays, without a copy where there is a choice."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def fixed(rows: np.ndarray, valid_N: np.ndarray | None = None) -> pa.FixedSizeBinaryArray:
    """An (N, W) array of any fixed-width type as N little-endian binary values, null where `valid_N` is False."""
    rows = np.ascontiguousarray(rows)
    width = rows.shape[1] * rows.dtype.itemsize
    bitmap = None
    if valid_N is not None and not valid_N.all():
        bitmap = pa.py_buffer(np.packbits(valid_N, bitorder="little").tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [bitmap, pa.py_buffer(rows)])


def unfixed(column: pa.ChunkedArray | pa.Array, dtype: type[np.generic] | str) -> np.ndarray:
    """The inverse of `fixed`: (N, W) rows of `dtype`; the content of null rows is unspecified but finite zero bytes.

    Args:
        column: fixed-size binary values whose width is a multiple of the item size.
        dtype: numpy type of one item.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    width = array.type.byte_width
    data = array.buffers()[1]
    raw = (
        np.frombuffer(data, np.uint8, count=len(array) * width, offset=array.offset * width)
        if data
        else np.empty(0, np.uint8)
    )
    rows = (
        raw.view(dtype).reshape(len(array), -1)
        if len(array)
        else np.empty((0, width // np.dtype(dtype).itemsize), dtype)
    )
    if array.null_count:
        rows = np.where(valid(array)[:, None], rows, np.zeros((), dtype))
    return rows


def valid(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """bool (N,): True where the value is not null."""
    return np.asarray(column.is_valid())


def hexes(column: pa.ChunkedArray | pa.Array) -> list[str | None]:
    """Lower-case hex text of binary values, None for null."""
    return [None if v is None else v.hex() for v in column.to_pylist()]


def hex_column(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Lower-case hex text of fixed-size binary values, null for null."""
    array = pa.chunked_array([column]).combine_chunks() if isinstance(column, pa.Array) else column.combine_chunks()
    raw = unfixed(array, np.uint8)
    text = pa.py_buffer(raw.tobytes().hex().encode())
    offsets = np.arange(len(raw) + 1, dtype=np.int64) * 2 * raw.shape[1]
    texts = pa.LargeStringArray.from_buffers(len(raw), pa.py_buffer(offsets), text).cast(pa.string())
    return pc.if_else(array.is_valid(), texts, pa.scalar(None, pa.string()))
