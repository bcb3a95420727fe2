"""Semantic duplicates: the rows of a cluster, best first, in; each row's nearest earlier row out."""

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.vectors import Float16s, Float32s, all_cosines, norms, row_cosine

DENSE = 8  # near-tied pairs per row above which one float64 product of the block is cheaper than pairs


class _Block(NamedTuple):
    """Some rows of a cluster."""

    row: NDArray[np.int64]  # (B,), ascending: their places in the cluster
    vec: Float16s  # (B, D), as stored
    unit: Float32s  # (B, D)


def repeats(vec_ND: Float16s, block_rows: int = 2048) -> tuple[Float32s, NDArray[np.int64]]:
    """For each row, the largest cosine to any earlier row, kept or not, and the earliest row that has it.

    A float32 product finds the rows that can be nearest; those are compared as `vectors.row_cosine` does. The answer
    does not depend on `block_rows`; memory is a few blocks, so the rows may be a map of a file larger than memory.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows, best first: row 0 never repeats.
        block_rows: rows compared at a time, at least 1; changes speed and memory only.

    Returns:
        float32, shape (N,): the cosine, in [-1, 1], -1 for row 0; and int64, shape (N,): the row's place, -1 for row 0.

    Source: SemDeDup, arXiv:2303.09540, section 3 (maximum over the strict upper triangle of the cosine matrix).
    """
    # Rows with the same bytes are compared once: a later copy's best is its first copy, at cosine 1.
    first_N = _first_copies(vec_ND, block_rows)
    distinct_U = np.flatnonzero(first_N == np.arange(len(vec_ND)))
    cos_N = np.full(len(vec_ND), -1, np.float32)
    best_N = np.full(len(vec_ND), -1, np.int64)
    for start in range(0, len(distinct_U), block_rows):
        rows = _block(vec_ND, distinct_U[start : start + block_rows])
        cos_B, best_B = _nothing(len(rows.row))
        for begin in range(0, start + 1, block_rows):
            columns = rows if begin == start else _block(vec_ND, distinct_U[begin : begin + block_rows])
            _nearer(rows, columns, cos_B, best_B)
        cos_N[rows.row], best_N[rows.row] = cos_B, best_B
    cos_N[best_N < 0] = -1

    copy_C = np.flatnonzero(first_N < np.arange(len(vec_ND)))
    original_C = first_N[copy_C]
    best_N[copy_C] = np.where(cos_N[original_C] == 1, best_N[original_C], original_C)
    cos_N[copy_C] = 1
    return cos_N, best_N


def greedy(vec_ND: Float16s, min_cos: float, block_rows: int = 2048) -> tuple[Float32s, NDArray[np.int64]]:
    """As `repeats`, but compared with earlier kept rows only; a row is kept unless its cosine is above `min_cos`.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows, best first: row 0 is kept.
        min_cos: in [-1, 1]: a row is dropped when its largest cosine, as float64, is above.
        block_rows: rows compared at a time, at least 1; changes speed and memory only.

    Returns:
        float32, shape (N,): the largest cosine to an earlier kept row, -1 for row 0; and int64, shape (N,): the
        earliest kept row that has it, -1 for row 0.
    """
    cos_N = np.full(len(vec_ND), -1, np.float32)
    best_N = np.full(len(vec_ND), -1, np.int64)
    kept = np.zeros(0, np.int64)
    for start in range(0, len(vec_ND), block_rows):
        rows = _block(vec_ND, np.arange(start, min(start + block_rows, len(vec_ND))))
        cos_B, best_B = _nothing(len(rows.row))
        for begin in range(0, len(kept), block_rows):
            _nearer(rows, _block(vec_ND, kept[begin : begin + block_rows]), cos_B, best_B)
        cos_BB = all_cosines(rows.vec, rows.vec)
        kept_B = np.zeros(len(rows.row), np.bool_)
        for here in range(len(rows.row)):
            kept_B[here] = float(cos_B[here]) <= min_cos
            if kept_B[here]:
                later = slice(here + 1, None)
                nearer = cos_BB[here, later] > cos_B[later]
                best_B[later][nearer] = start + here
                np.maximum(cos_B[later], cos_BB[here, later], out=cos_B[later])
        cos_N[rows.row], best_N[rows.row] = cos_B, best_B
        kept = np.concatenate([kept, rows.row[kept_B]])
    cos_N[best_N < 0] = -1
    return cos_N, best_N


def bucketise(size_K: NDArray[np.int64], max_rows: int) -> NDArray[np.int32]:
    """Put neighbouring clusters into buckets of at most `max_rows` rows; a larger cluster has a bucket of its own.

    Args:
        size_K: int64, shape (K,): rows of each cluster.
        max_rows: at least 1.

    Returns:
        int32, shape (K,): bucket of each cluster, from 0, without gaps, not descending.
    """
    bucket_K = np.zeros(len(size_K), np.int32)
    bucket, rows = 0, 0
    for cluster, size in enumerate(size_K.tolist()):
        if rows and size and rows + size > max_rows:
            bucket, rows = bucket + 1, 0
        bucket_K[cluster] = bucket
        rows += size
    return bucket_K


def _block(vec_ND: Float16s, row_B: NDArray[np.int64]) -> _Block:
    vec_BD = np.asarray(vec_ND[row_B])
    return _Block(row_B, vec_BD, (vec_BD / norms(vec_BD)[:, None]).astype(np.float32))


def _nothing(rows: int) -> tuple[Float32s, NDArray[np.int64]]:
    """No earlier row yet: below any cosine, so that a cosine of -1 counts."""
    return np.full(rows, -2, np.float32), np.full(rows, -1, np.int64)


def _first_copies(vec_ND: Float16s, block_rows: int) -> NDArray[np.int64]:
    """Place of the first row with the same values, by digest so that no rows are held: int64, shape (N,)."""
    first_N = np.empty(len(vec_ND), np.int64)
    seen: dict[bytes, int] = {}
    for start in range(0, len(vec_ND), block_rows):
        block_BD = vec_ND[start : start + block_rows] + np.float16(0)  # -0.0 is 0.0
        for place, vec_D in enumerate(np.ascontiguousarray(block_BD), start):
            first_N[place] = seen.setdefault(hashlib.blake2b(vec_D.data, digest_size=16).digest(), place)
    return first_N


def _nearer(rows: _Block, columns: _Block, cos_B: Float32s, best_B: NDArray[np.int64]) -> None:
    """Update each row's largest cosine, and the earliest row that has it, in place, by the earlier rows of `columns`.

    Blocks of columns must come in order: an equal cosine further on is not nearer.
    """
    slack = np.float32((rows.unit.shape[1] + 8) * 2.0**-24)  # the most that a float32 dot of unit rows can be off
    cos_BC = rows.unit @ columns.unit.T
    later = columns.row >= rows.row[0]
    if later.any():
        cos_BC[:, later] = np.where(columns.row[later] < rows.row[:, None], cos_BC[:, later], -4)
    top_B = cos_BC.max(axis=1)
    near = np.flatnonzero((top_B >= cos_B - slack) & (top_B > -3))
    enough = np.maximum(cos_B, top_B - slack)[near] - slack
    row_P, column_P = np.nonzero(cos_BC[near] >= enough[:, None])
    if not len(near):
        return
    if len(row_P) > DENSE * len(near):
        exact_P = all_cosines(rows.vec[near], columns.vec)[row_P, column_P]
    else:
        exact_P = row_cosine(rows.vec[near][row_P], columns.vec[column_P])
    begin = np.searchsorted(row_P, np.arange(len(near)))
    value = np.maximum.reduceat(exact_P, begin)
    first_P = np.flatnonzero(exact_P == value[row_P])
    column = column_P[first_P[np.searchsorted(row_P[first_P], np.arange(len(near)))]]
    better = value > cos_B[near]
    cos_B[near[better]] = value[better]
    best_B[near[better]] = columns.row[column[better]]
