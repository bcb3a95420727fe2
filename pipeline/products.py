"""Which columns can have a row's largest cosine: stored rows in, the places that remain out, and their exact cosines.

A fast product finds them with a proven bound on its error, and the caller compares them exactly: the precision changes
how many remain, never what is found. A processor that multiplies bfloat16 does so at twice the rate of float32.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.machine import bf16_flags
from pipeline.vectors import DOT_ROWS, Float16s, Float32s, Float64s, widened

if TYPE_CHECKING:
    import torch

BF16_WORK, LOADED_WORK = 2**32, 2**28
"""Multiplications of one call below which bfloat16 does not pay: where torch must be imported first, which takes as
long as some dozens of such calls save; and where it is there already."""

DENSE = 8  # places per row that remain of a bfloat16 product, above which a float32 product is cheaper than pairs
EPS32, EPS16 = 2.0**-24, 2.0**-8  # half a unit in the last place, relative
TILE = 32  # columns that a processor's bfloat16 unit multiplies at a time: a third faster where nothing remains
CONVERTED_ROWS = 2048  # 4 MiB of float32 at 512 dims: of fewer, threads wait for each other between the calls
FOLD, LEAST_STRETCH = 8, 256

Number = TypeVar("Number", np.float32, np.int16)
Float = TypeVar("Float", np.float32, np.float64)


@dataclass(frozen=True)
class Operand:
    """Rows, or the columns that they are compared with, ready to be multiplied.

    Attributes:
        vec: float32, shape (N, D): the values as they are stored.
        norm: float32, shape (N,): of `vec`, up to float32 sums; of columns about 1, for the bound grows with the rest.
        low: `vec` as bfloat16 (N, D), or None.
        lost: float32, shape (N,): norm of what bfloat16 lost of each row, up to float32 sums, or a bound of it.
    """

    vec: Float32s
    norm: Float32s
    low: torch.Tensor | None
    lost: Float32s

    def __getitem__(self, rows: slice) -> Operand:
        """Some of the rows, without a copy."""
        low = None if self.low is None else self.low[rows]
        return Operand(self.vec[rows], self.norm[rows], low, self.lost[rows])


def pays(work: int) -> bool:
    """Whether bfloat16 is worth its cost for so many multiplications of one call, of which a process has many."""
    return work >= (LOADED_WORK if "torch" in sys.modules else BF16_WORK) and bool(bf16_flags())


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


def operand(vec_ND: Float16s | Float32s, bf16: bool, measured: bool = True, into: Operand | None = None) -> Operand:
    """Rows made ready for `candidates` and `dots`.

    Args:
        vec_ND: float16 or float32, shape (N, D), multiples of 2^-24: stored rows, or centroids on their grid.
        bf16: whether products with it may be of bfloat16.
        measured: whether to measure what bfloat16 loses, which is less than half of its bound; for rows that are used
            once it pays more to compare a few more of them exactly.
        into: an operand of as many rows or more, made with the same `bf16`, that is no longer needed: its memory, which
            a processor's cache still holds, is overwritten; None: new memory.
    """
    if vec_ND.dtype == np.float32 and not bf16:
        wide_ND = cast("Float32s", vec_ND)
        return Operand(wide_ND, _norms(wide_ND), None, np.zeros(len(vec_ND), np.float32))
    made = (_memory(vec_ND.shape, bf16) if into is None else into)[: len(vec_ND)]
    for start in range(0, len(vec_ND), CONVERTED_ROWS):
        block = slice(start, start + CONVERTED_ROWS)
        few = made[block]
        _widen(vec_ND[block], few)
        few.norm[...] = _norms(few.vec)
        if few.low is not None:
            few.lost[...] = _norms(few.low.float().numpy() - few.vec) if measured else EPS16 * few.norm
    return made


def _memory(shape: tuple[int, ...], bf16: bool) -> Operand:
    """An operand without content."""
    norm_N, lost_N = np.empty(shape[0], np.float32), np.zeros(shape[0], np.float32)
    if not bf16:
        return Operand(np.empty(shape, np.float32), norm_N, None, lost_N)
    import torch

    # torch's memory begins where a cache line does, which each row's copy is the faster for.
    return Operand(torch.empty(shape).numpy(), norm_N, torch.empty(shape, dtype=torch.bfloat16), lost_N)


def _widen(vec_ND: Float16s | Float32s, to: Operand) -> None:
    """Write the float32 and bfloat16 values of rows."""
    torch = sys.modules.get("torch")  # twice as fast as numpy, which does not pay for its import
    if torch is None:
        to.vec[...] = widened(cast("Float16s", vec_ND))
        return
    # It warns of memory that is read-only.
    vec = torch.from_numpy(vec_ND if vec_ND.flags.writeable else vec_ND.copy())
    torch.from_numpy(to.vec).copy_(vec)
    if to.low is not None:
        to.low.copy_(torch.from_numpy(to.vec))


def _norms(vec_ND: Float32s) -> Float32s:
    """Up to float32 sums: float32, shape (N,)."""
    norm_N: Float32s = np.sqrt(np.vecdot(vec_ND, vec_ND))
    return norm_N


def add_rows(sum_KD: Float64s, cluster_B: NDArray[np.int32], vec_BD: Float16s) -> None:
    """Add each row to the sum of its cluster, in place, by torch: a few calls, where numpy takes some for each cluster.

    Args:
        sum_KD: float64, shape (K, D).
        cluster_B: int32, shape (B,), in [0, K).
        vec_BD: float16, shape (B, D), stored rows.
    """
    import torch

    torch.from_numpy(sum_KD).index_add_(0, torch.from_numpy(cluster_B), torch.from_numpy(vec_BD).double())


def dots(rows: Operand, columns: Operand, row_P: NDArray[np.int64], column_P: NDArray[np.int64]) -> Float64s:
    """Exact float64 dot of each pair of a row and a column: float64, shape (P,)."""
    return _pair_dots(rows, columns, row_P, column_P, np.float64)


def told_apart(
    rows: Operand, columns: Operand, row_P: NDArray[np.int64], column_P: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Which of a row's candidates remain after a float32 product of each pair: where more than a few do, half the cost.

    Args:
        row_P, column_P: int64, shape (P,): `candidates`, in their order.

    Returns:
        int64, ascending: places in `row_P`, of each row one at least.
    """
    dot_P = _pair_dots(rows, columns, row_P, column_P, np.float32)
    begins_P = np.diff(row_P, prepend=-1) > 0
    top_R = np.maximum.reduceat(dot_P, np.flatnonzero(begins_P))
    enough_R = _enough(top_R, _off(rows, columns)[row_P[begins_P]], rows, None)
    return np.flatnonzero(dot_P >= enough_R[np.cumsum(begins_P) - 1])


def _pair_dots(
    rows: Operand, columns: Operand, row_P: NDArray[np.int64], column_P: NDArray[np.int64], dtype: type[Float]
) -> NDArray[Float]:
    dot_P = np.empty(len(row_P), dtype)
    for start in range(0, len(row_P), DOT_ROWS):
        few = slice(start, start + DOT_ROWS)
        row_FD, column_FD = rows.vec[row_P[few]], columns.vec[column_P[few]]
        dot_P[few] = np.vecdot(row_FD.astype(dtype, copy=False), column_FD.astype(dtype, copy=False))
    return dot_P


def candidates(
    rows: Operand,
    columns: Operand,
    least_B: Float32s | None = None,
    before: int | None = None,
    scratch: Float32s | None = None,
) -> NDArray[np.int64]:
    """Places of all columns that can have their row's largest cosine, and of some more.

    Args:
        rows: B of them.
        columns: C of them, at least one.
        least_B: float32, shape (B,): cosines below are of no interest; None for no such bound.
        before: row b is compared with the first `before` + b columns only; None: with all.
        scratch: float32, shape (at least B x C,), overwritten: for a caller whose products have many sizes, for each of
            which the system would hand out, and zero, new memory; None: new memory.

    Returns:
        int64, shape (P,), ascending: row x C + column. A row has one at least unless `least_B` or `before` leave none.
    """
    if rows.low is not None and columns.low is not None:
        place_P = _of_bf16(rows, columns, least_B, before, scratch)
        if place_P is not None:
            return place_P
    out = None if scratch is None else _shaped(scratch, len(rows.vec), len(columns.vec))
    dot_BC = np.matmul(rows.vec, columns.vec.T, out=out)
    if before is not None:
        _hide_later(dot_BC, before, -np.inf)
    first_B = dot_BC.argmax(axis=1)
    top_B = dot_BC[np.arange(len(first_B)), first_B]
    enough_B = _enough(top_B, _off(rows, columns), rows, least_B)
    if before == 0:
        enough_B[0] = np.inf
    return _beside(dot_BC, first_B, top_B, enough_B)


def _shaped(scratch: NDArray[Number], rows: int, columns: int) -> NDArray[Number]:
    return scratch[: rows * columns].reshape(rows, columns)


def _hide_later(value_BC: NDArray[Number], before: int, hidden: float) -> None:
    """Overwrite what a row is not compared with."""
    last_BC = value_BC[:, before:]
    rows, columns = last_BC.shape
    np.copyto(last_BC, hidden, where=~np.tri(rows, columns, k=-1, dtype=np.bool_))


def _beside(dot_BC: Float32s, first_B: NDArray[np.int64], top_B: Float32s, enough_B: Float32s) -> NDArray[np.int64]:
    """Places of the values that are enough, ascending, where few rows have more than their largest: these are searched.

    One more pass, for the second largest of each row, takes less than to compare all; `dot_BC` is overwritten.

    Args:
        dot_BC: float32, shape (B, C).
        first_B, top_B: int64 and float32, shape (B,): where each row's largest value is, and the value.
        enough_B: float32, shape (B,): `_enough`.

    Returns:
        int64, shape (P,): row x C + column.
    """
    row_B, columns = np.arange(len(first_B)), dot_BC.shape[1]
    dot_BC[row_B, first_B] = -np.inf
    row_S = np.flatnonzero(dot_BC.max(axis=1) >= enough_B)
    row_P, column_P = np.divmod(np.flatnonzero(dot_BC[row_S] >= enough_B[row_S, None]), columns)
    place_P = np.append((row_B * columns + first_B)[top_B >= enough_B], row_S[row_P] * columns + column_P)
    place_P.sort()
    return place_P


def _folded(value_BC: NDArray[np.int16]) -> NDArray[np.int16]:
    """The largest of each FOLD columns, those at the same place of as many stretches: one pass over memory, not three.

    Of fewer columns where FOLD does not divide them or they are few, for which a pass costs less than a stretch.
    """
    rows, columns = value_BC.shape
    fold = math.gcd(columns, FOLD) if columns >= FOLD * LEAST_STRETCH else 1
    if fold == 1:
        return value_BC
    folded_BW: NDArray[np.int16] = value_BC.reshape(rows, fold, columns // fold).max(axis=1)
    return folded_BW


def _groups(largest_BW: NDArray[np.int16], enough_B: NDArray[np.int16]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and place of each largest of folded columns that is enough, in any order."""
    at_BW = largest_BW >= enough_B[:, None]
    if at_BW.flags.c_contiguous:
        return np.divmod(np.flatnonzero(at_BW), at_BW.shape[1])
    first_G, row_G = np.divmod(np.flatnonzero(at_BW.T), at_BW.shape[0])
    return row_G, first_G


def _reached(
    value_BC: NDArray[np.int16],
    largest_BW: NDArray[np.int16],
    enough_B: NDArray[np.int16],
    row_G: NDArray[np.int64],
    first_G: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Places of the values that are enough, ascending, which are in these groups of folded columns."""
    columns, width = value_BC.shape[1], largest_BW.shape[1]
    place_P: NDArray[np.int64] = row_G * columns + first_G
    if columns > width:
        column_GF = first_G[:, None] + np.arange(0, columns, width)
        enough_GF = value_BC[row_G[:, None], column_GF] >= enough_B[row_G][:, None]
        place_P = ((row_G * columns)[:, None] + column_GF)[enough_GF]
    place_P.sort()
    return place_P


def _off(rows: Operand, columns: Operand) -> Float32s:
    """The most that a float32 product can be off the cosine times the row's norm, whatever the order of its sum."""
    rounding = (rows.vec.shape[1] + 16) * EPS32
    unit = float(np.abs(columns.norm - 1).max()) + rounding
    off_B: Float32s = rows.norm * np.float32(rounding * (1 + unit) + unit)
    return off_B


def _enough(top_B: Float32s, off_B: Float32s, rows: Operand, least_B: Float32s | None) -> Float32s:
    """What a product must reach, when each is off by `off_B` at most, to be of the largest cosine and `least_B`."""
    enough_B = top_B - off_B
    if least_B is not None:
        np.maximum(enough_B, least_B * rows.norm, out=enough_B)
    enough_B -= off_B
    return enough_B


def _of_bf16(
    rows: Operand, columns: Operand, least_B: Float32s | None, before: int | None, scratch: Float32s | None
) -> NDArray[np.int64] | None:
    """`candidates` from a bfloat16 product; None where it cannot tell enough of them apart.

    A product of rounded rows is off by what rounding took of the row, times the column, and of the column, times the
    row (Cauchy and Schwarz); its sum is of float32, for which twice the bound covers how processors round inside; then
    the sum itself is rounded.
    """
    import torch

    assert rows.low is not None and columns.low is not None
    # The second factor is packed for each product: the smaller one.
    turned = len(rows.low) < len(columns.low)
    a, b = (columns.low, rows.low) if turned else (rows.low, columns.low)
    width = len(b)
    if width > TILE and width % TILE:  # less than twice as wide, so that bfloat16 still fits `scratch`
        b = torch.nn.functional.pad(b, (0, 0, 0, -width % TILE))
    held = None if scratch is None else _shaped(scratch.view(np.int16), len(a), len(b))
    out = torch.mm(a, b.T, out=None if held is None else torch.from_numpy(held).view(torch.bfloat16))
    # Positive floats are in the order of their bits, and as integers all negative ones are below them.
    bits = out[:, :width].view(torch.int16).numpy()
    bits_BC = bits.T if turned else bits
    if before is not None:
        _hide_later(bits_BC, before, 0)
    largest_BW = _folded(bits_BC)
    # The least float32 that rounds to the largest: half a step of bfloat16 below it. What is not positive becomes next
    # to nothing, and the bound leaves nothing of that.
    top_B = ((np.maximum(largest_BW.max(axis=1), 1).astype(np.int32) << 16) - 2**15).view(np.float32)
    rounded_B = rows.lost * columns.norm.max() + rows.norm * columns.lost.max()
    off_B = np.float32(1.01) * rounded_B + 2 * _off(rows, columns)
    enough_B = _enough(top_B, off_B, rows, least_B)
    if (enough_B[int(before == 0) :] <= 0).any():
        return None
    enough_bits_B = torch.from_numpy(enough_B).bfloat16().view(torch.int16).numpy()
    if before == 0:
        enough_bits_B[0] = np.iinfo(np.int16).max
    row_G, first_G = _groups(largest_BW, enough_bits_B)
    if len(row_G) > DENSE * len(bits_BC):
        return None
    return _reached(bits_BC, largest_BW, enough_bits_B, row_G, first_G)
