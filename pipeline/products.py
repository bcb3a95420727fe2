"""Which columns can have a row's largest dot product: float32 rows in, the places that remain out.

A fast product finds them with a proven bound on its error, and the caller compares them exactly: the precision changes
how many remain, never what is found. A processor that multiplies bfloat16 does so at twice the rate of float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.vectors import DOT_ROWS, Float32s

if TYPE_CHECKING:
    import torch

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags in /proc/cpuinfo of processors that multiply bfloat16 faster than float32; the last is ARM's."""

BF16_WORK = 2**33
"""Multiplications below which it does not pay to import torch, which takes a second or two."""

DENSE = 8  # places per row that remain of a bfloat16 product, above which a float32 product is cheaper than pairs
EPS32, EPS16 = 2.0**-24, 2.0**-8  # half a unit in the last place, relative
FOLD, LEAST_STRETCH = 8, 256

Number = TypeVar("Number", np.float32, np.int16)


@dataclass(frozen=True)
class Operand:
    """Rows, or the columns that they are compared with, ready to be multiplied.

    Attributes:
        vec: float32, shape (N, D); each column of unit norm, up to 4 roundings of float32.
        norm: float32, shape (N,): of `vec`, up to float32 sums.
        low: `vec` as bfloat16 (N, D), or None.
        lost: float32, shape (N,): norm of what bfloat16 lost of each row, up to float32 sums.
    """

    vec: Float32s
    norm: Float32s
    low: torch.Tensor | None
    lost: Float32s

    def __getitem__(self, rows: slice) -> Operand:
        """Some of the rows, without a copy."""
        low = None if self.low is None else self.low[rows]
        return Operand(self.vec[rows], self.norm[rows], low, self.lost[rows])


@functools.cache
def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & BF16_FLAGS)


def pays(work: int) -> bool:
    """Whether bfloat16 is worth its import for so many multiplications."""
    return work >= BF16_WORK and has_bf16()


@contextmanager
def each_alone(threads: int, bf16: bool) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that each multiply alone, so that what stands between two products is done side by side, too.

    Products of float32 have numpy's threads, which nobody can part: one thread asks for all of them.

    Args:
        threads: at least 1.
        bf16: whether the products will be of bfloat16.
    """
    if not bf16:
        with ThreadPoolExecutor(1) as pool:
            yield pool
        return
    import torch

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # of threads that are yet to begin; this one has kept its own


def operand(vec_ND: Float32s, bf16: bool) -> Operand:
    """Rows made ready for `candidates`.

    Args:
        vec_ND: float32, shape (N, D), C-contiguous.
        bf16: whether products with it may be of bfloat16.
    """
    norm_N, lost_N = np.empty(len(vec_ND), np.float32), np.zeros(len(vec_ND), np.float32)
    low = None
    if bf16:
        import torch

        low = torch.empty(vec_ND.shape, dtype=torch.bfloat16)
        spare = torch.empty((DOT_ROWS, vec_ND.shape[1]))
    for start in range(0, len(vec_ND), DOT_ROWS):
        block = slice(start, start + DOT_ROWS)
        norm_N[block] = np.sqrt(np.vecdot(vec_ND[block], vec_ND[block]))
        if low is not None:
            whole = torch.from_numpy(vec_ND[block])
            lost_BD = spare[: len(whole)].copy_(low[block].copy_(whole)).sub_(whole).numpy()
            lost_N[block] = np.sqrt(np.vecdot(lost_BD, lost_BD))
    return Operand(vec_ND, norm_N, low, lost_N)


def candidates(
    rows: Operand, columns: Operand, least_B: Float32s | None = None, earlier: bool = False
) -> NDArray[np.int64]:
    """Places of all columns that can have their row's largest product, and of some more.

    Args:
        rows: B of them.
        columns: C of them, at least one.
        least_B: float32, shape (B,): products below are of no interest; None for no such bound.
        earlier: rows and columns are the same, and a row is compared with those before it only.

    Returns:
        int64, shape (P,), ascending: row x C + column. A row has one at least unless `least_B` or `earlier` leave none.
    """
    if rows.low is not None and columns.low is not None:
        place_P = _of_bf16(rows, columns, least_B, earlier)
        if place_P is not None:
            return place_P
    dot_BC = rows.vec @ columns.vec.T
    if earlier:
        np.copyto(dot_BC, -np.inf, where=~np.tri(len(dot_BC), k=-1, dtype=np.bool_))
    largest_BW = _folded(dot_BC)
    enough_B = _enough(largest_BW.max(axis=1), _off(rows), least_B)
    if earlier:
        enough_B[0] = np.inf
    return _reached(dot_BC, largest_BW, enough_B)


def _folded(value_BC: NDArray[Number]) -> NDArray[Number]:
    """The largest of each FOLD columns, those at the same place of as many stretches: one pass over memory, not three.

    Of fewer columns where FOLD does not divide them or they are few, for which a pass costs less than a stretch.
    """
    rows, columns = value_BC.shape
    fold = math.gcd(columns, FOLD) if columns >= FOLD * LEAST_STRETCH else 1
    folded_BW: NDArray[Number] = value_BC.reshape(rows, fold, columns // fold).max(axis=1)
    return folded_BW


def _reached(value_BC: NDArray[Number], largest_BW: NDArray[Number], enough_B: NDArray[Number]) -> NDArray[np.int64]:
    """Places of the values that are enough, ascending."""
    columns, width = value_BC.shape[1], largest_BW.shape[1]
    row_G, first_G = np.divmod(np.flatnonzero(largest_BW >= enough_B[:, None]), width)
    place_GF = (row_G * columns + first_G)[:, None] + np.arange(0, columns, width)
    place_P: NDArray[np.int64] = place_GF[value_BC.reshape(-1)[place_GF] >= enough_B[row_G][:, None]]
    place_P.sort()
    return place_P


def _off(rows: Operand) -> Float32s:
    """The most that a float32 product of a row and a unit column can be off, whatever the order of its sum."""
    off_B: Float32s = rows.norm * np.float32((rows.vec.shape[1] + 16) * EPS32)
    return off_B


def _enough(top_B: Float32s, off_B: Float32s, least_B: Float32s | None) -> Float32s:
    """What a product must reach, when each is off by `off_B` at most, to be the largest and `least_B` or more."""
    enough_B = top_B - off_B
    if least_B is not None:
        np.maximum(enough_B, least_B, out=enough_B)
    enough_B -= off_B
    return enough_B


def _of_bf16(rows: Operand, columns: Operand, least_B: Float32s | None, earlier: bool) -> NDArray[np.int64] | None:
    """`candidates` from a bfloat16 product; None where it cannot tell enough of them apart.

    A product of rounded rows is off by what rounding took of the row, times the column, and of the column, times the
    row (Cauchy and Schwarz); its sum is of float32, for which twice the bound covers how processors round inside; then
    the sum itself is rounded.
    """
    import torch

    assert rows.low is not None and columns.low is not None
    out = rows.low @ columns.low.T
    # Positive floats are in the order of their bits, and as integers all negative ones are below them.
    bits_BC = out.view(torch.int16).numpy()
    if earlier:
        np.copyto(bits_BC, 0, where=~np.tri(len(bits_BC), k=-1, dtype=np.bool_))
    largest_BW = _folded(bits_BC)
    top_B = torch.from_numpy(largest_BW.max(axis=1)).view(torch.bfloat16).float().numpy()
    off_B = (1.01 * (rows.lost + rows.norm * columns.lost.max()) + 2 * _off(rows)).astype(np.float32)
    enough_B = _enough(top_B * np.float32(1 - EPS16), off_B, least_B)
    if (enough_B[int(earlier) :] <= 0).any():
        return None
    enough_bits_B = torch.from_numpy(enough_B).bfloat16().view(torch.int16).numpy()
    if earlier:
        enough_bits_B[0] = np.iinfo(np.int16).max
    if np.count_nonzero(largest_BW >= enough_bits_B[:, None]) > DENSE * len(bits_BC):
        return None
    return _told_apart(rows, columns, _reached(bits_BC, largest_BW, enough_bits_B), least_B)


def _told_apart(
    rows: Operand, columns: Operand, place_P: NDArray[np.int64], least_B: Float32s | None
) -> NDArray[np.int64]:
    """What is left of the places by float32 products of the pairs."""
    row_P, column_P = np.divmod(place_P, len(columns.vec))
    begins_P = np.diff(row_P, prepend=-1) > 0
    if least_B is None:
        # One place alone needs no telling.
        alone_P = begins_P & np.append(begins_P[1:], True)
        some = np.flatnonzero(~alone_P)
        row_P, column_P, begins_P = row_P[some], column_P[some], begins_P[some]
    if not len(row_P):
        return place_P
    dot_P = np.empty(len(row_P), np.float32)
    for start in range(0, len(row_P), DOT_ROWS):
        pairs = slice(start, start + DOT_ROWS)
        dot_P[pairs] = np.vecdot(rows.vec[row_P[pairs]], columns.vec[column_P[pairs]])
    begin_R = np.flatnonzero(begins_P)
    row_R = row_P[begin_R]
    enough_R = _enough(
        np.maximum.reduceat(dot_P, begin_R), _off(rows)[row_R], None if least_B is None else least_B[row_R]
    )
    near_P = dot_P >= enough_R[np.cumsum(begins_P) - 1]
    keep_P = near_P
    if least_B is None:
        keep_P = alone_P
        keep_P[some] = near_P
    left_P: NDArray[np.int64] = place_P[keep_P]
    return left_P
